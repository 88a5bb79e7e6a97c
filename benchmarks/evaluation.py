"""Checks and times the evaluation as a whole, on class folders of images and a checkpoint.

    python -m benchmarks.evaluation speed DATA MODEL       end to end beside the model alone
    python -m benchmarks.evaluation exactness DATA MODEL   layouts, devices, processes: one table
    python -m benchmarks.evaluation kills DATA MODEL       50 kills at random moments, resumed

On a CPU, devices are forced: XLA_FLAGS=--xla_force_host_platform_device_count=N.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from internimage_jax import evaluate as evaluation
from internimage_jax.data import Dataset, open_dataset
from internimage_jax.evaluate import evaluate
from internimage_jax.evaluation_step import Step, make_step
from internimage_jax.labels import ilsvrc2012_wnids, imagenet1k_classes
from internimage_jax.model import InternImage
from internimage_jax.normalize import normalize
from internimage_jax.predictions import read_predictions
from internimage_jax.preprocess import preprocess
from internimage_jax.pretrained import from_pretrained
from internimage_jax.report import TIMES

# Speed


def alone(step: Step, side: int, batches: int) -> None:
    """Runs the model on pixels that are on the devices, and reads its results as they come."""
    pixels = step.place(np.zeros((step.batch_size, side, side, 3), np.uint8))
    labels = [(0,)] * step.batch_size
    pending: deque[Any] = deque()
    for _ in range(batches):
        pending.append(step(pixels, labels))
        if len(pending) > 2:
            step.read(pending.popleft())
    while pending:
        step.read(pending.popleft())


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and of all cores together."""
    start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def speed(options: argparse.Namespace) -> None:
    model = from_pretrained(options.model)
    dataset = open_dataset(options.data)
    shared = functools.cache(make_step)
    evaluation.make_step = shared
    size = options.batch_size
    step = shared(model, batch_size=size, restricted_to=None, labels=1, parallel="pmap")
    count = options.num_images or len(dataset)
    batches = -(-count // step.batch_size)
    side = model.preprocessing.image_size

    def whole() -> None:
        evaluate(model, dataset, batch_size=size, num_images=count)

    runs = {"model alone": lambda: alone(step, side, batches), "end to end": whole}
    rows: list[list[tuple[float, float]]] = []
    for _ in range(options.repeats + 1):
        rows.append([timed(run) for run in runs.values()])
    rows = rows[1:]  # the first is to warm up
    print(f"{count} images, batches of {step.batch_size} on {len(step.devices)} devices")
    for place, name in enumerate(runs):
        wall, cpu = (statistics.median(row[place][kind] for row in rows) for kind in (0, 1))
        print(f"{name:12} {count / wall:8.2f} images/s {1e3 * cpu / count:8.1f} ms of CPU an image")
    for kind, name in enumerate(("images/s", "CPU time")):
        ratios = sorted(only[kind] / end[kind] for only, end in rows)
        middle = statistics.median(ratios)
        print(f"end to end / alone, by {name}: {middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


# Exactness


def layouts(dataset: Dataset, folder: Path) -> Iterator[tuple[str, str, str | None]]:
    """Writes the images in every layout; yields a name, DATA, and a file of labels or None."""
    labels = [row[0] for row in dataset.labels]
    images = [dataset.read(i) for i in range(len(dataset))]
    wnids = [str(imagenet1k_classes()[label].wnid) for label in labels]
    folders = dict(zip(dataset.names, images, strict=True))
    numbered = [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, len(dataset) + 1)]
    flat = dict(zip(numbered, images, strict=True))
    yield "class folders", dataset.source, None
    yield "class folders in a tar", _tar(folder / "folders.tar", folders), None

    (folder / "flat").mkdir()
    for name, image in flat.items():
        (folder / "flat" / name).write_bytes(image)
    pairs = list(zip(numbered, labels, strict=True))
    text = "".join(f"{name} {label}\n" for name, label in pairs)
    (folder / "val.txt").write_text(text)
    yield "flat folder, val.txt", str(folder / "flat"), str(folder / "val.txt")

    with open(folder / "val.csv", "w", newline="") as file:
        csv.writer(file).writerows(zip(numbered, wnids, strict=True))
    original = _tar(folder / "ILSVRC2012_img_val.tar", flat)
    yield "tar, CSV", original, str(folder / "val.csv")
    truth = folder / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{ilsvrc2012_wnids().index(one) + 1}\n" for one in wnids))
    yield "tar, devkit's ground truth", original, str(truth)

    with zipfile.ZipFile(folder / "val.zip", "w") as archive:
        for name, image in flat.items():
            archive.writestr(name, image)
    (folder / "val_map.txt").write_text(text)
    yield "zip, map file", str(folder / "val.zip"), str(folder / "val_map.txt")

    web = {}
    for i, image in enumerate(images):
        web |= {f"{i:06}.jpg": image, f"{i:06}.cls": str(labels[i]).encode()}
    yield "WebDataset", _tar(folder / "shard-000000.tar", web), None

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [{"bytes": one} for one in images], "label": labels})
    pq.write_table(table, folder / "validation-00000-of-00001.parquet", row_group_size=64)
    yield "parquet", str(folder / "validation-00000-of-00001.parquet"), None


def _tar(path: Path, files: Mapping[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return str(path)


def one_at_a_time(model: InternImage, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The five best classes of each image and their probabilities; the oracle."""
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    rows = []
    for i in range(len(dataset)):
        pixels = preprocess(dataset.read(i), model.preprocessing)[None]
        logits = forward(state, normalize(pixels, model.preprocessing))[0]
        rows.append(np.asarray(logits, np.float64))
    logits = np.stack(rows)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    best = np.argsort(-probabilities, axis=1)[:, :5]
    return best, np.take_along_axis(probabilities, best, axis=1)


def exactness(options: argparse.Namespace) -> None:
    model = from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as name:
        if options.num_images:
            options.data = _some(open_dataset(options.data), options.num_images, Path(name))
        _exactness(options, model, open_dataset(options.data))


def _some(dataset: Dataset, count: int, folder: Path) -> str:
    """Writes class folders of so many images, evenly spaced, and returns their path."""
    for i in range(count):
        name = dataset.names[i * len(dataset) // count]
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(dataset.read(i * len(dataset) // count))
    return str(folder)


def _exactness(options: argparse.Namespace, model: InternImage, dataset: Dataset) -> None:
    best, probabilities = one_at_a_time(model, dataset)
    labels = np.array([row[0] for row in dataset.labels])[:, None]
    wanted = int((best[:, :1] == labels).sum()), int((best == labels).sum()), len(dataset)
    headings = ("data", "processes x devices", "batch on each", "by", "top-1, top-5, images")
    headings += ("as one at a time", "largest difference of a probability")
    print(f"| {' | '.join(headings)} |\n{'| --- ' * 7}|")
    print(f"| class folders | one image at a time | 1 | jit | {wanted} | | |", flush=True)

    def row(name: str, where: str, batch: int, how: str, folder: Path) -> None:
        report = json.loads((folder / "report.json").read_text())
        results = read_predictions(folder)
        found = report["correct_top1"], report["correct_top5"], report["num_images"]
        order = [one.index for one in results] == list(range(len(dataset)))
        same = (
            found == wanted and order and all(one.top5[0] == best[one.index][0] for one in results)
        )
        error = max(
            float(np.abs(np.array(one.probabilities) - probabilities[one.index]).max())
            for one in results
        )
        print(f"| {name} | {where} | {batch} | {how} | {found} | {'yes' if same else 'NO'} | "
              f"{error:.1e} |", flush=True)  # fmt: skip

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        evaluation.make_step = functools.cache(make_step)
        devices = jax.local_device_count()
        for number, (layout, data, file) in enumerate(layouts(dataset, folder)):
            out = folder / f"layout{number}"
            evaluate(model, data, labels=file, batch_size=8, output=out)
            row(layout, f"1 x {devices}", 8, "pmap", out)
        for number, (processes, devices, batch, how) in enumerate(
            (
                (1, 8, 1, "pmap"),
                (1, 8, 32, "pmap"),
                (1, 3, 7, "pmap"),
                (1, 1, 256, "pmap"),
                (1, 4, 2, "fsdp"),
                (2, 2, 8, "pmap"),
                (3, 1, 16, "pmap"),
            )
        ):
            out = folder / f"run{number}"
            arguments = ["--batch-size", str(batch), "--parallel", how, "--output", str(out)]
            _run(options, arguments, processes, devices)
            row("class folders", f"{processes} x {devices}", batch, how, out)


def _command(options: argparse.Namespace, *arguments: str) -> list[str]:
    start = [sys.executable, "-m", "internimage_jax", "evaluate", options.data]
    return [*start, "--model", options.model, *arguments]


def _environment(devices: int) -> dict[str, str]:
    forced = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": forced}


def _run(options: argparse.Namespace, arguments: list[str], processes: int, devices: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for number in range(processes):
        group = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes)]
        group += ["--process-id", str(number)]
        command = _command(options, *arguments, *(group if processes > 1 else ()))
        started.append(
            subprocess.Popen(command, env=_environment(devices), stdout=subprocess.DEVNULL)
        )
    statuses = [process.wait() for process in started]
    if any(statuses):
        sys.exit(f"{processes} processes: exit statuses {statuses}")


# Kills


def kills(options: argparse.Namespace) -> None:
    stream = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        arguments = ["--batch-size", str(options.batch_size), "--output"]
        _run(options, [*arguments, str(folder / "warm")], 1, 1)
        start = time.perf_counter()
        _run(options, [*arguments, str(folder / "whole")], 1, 1)
        whole_time = time.perf_counter() - start
        whole = _without_times(folder / "whole")
        predictions = (folder / "whole" / "predictions.jsonl").read_bytes()
        killed, finished, different, unharmed, sizes = 0, 0, 0, 0, []
        while killed < options.kills:
            out = folder / f"run{finished}"
            resumed = 0
            # Some runs are killed once, some again and again.
            while killed < options.kills and resumed < stream.choice((1, 2, 5)):
                command = _command(options, *arguments, str(out), "--resume")
                process = subprocess.Popen(command, env=_environment(1), stdout=subprocess.DEVNULL)
                try:
                    process.wait(stream.uniform(0, whole_time))
                    unharmed += 1
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    killed += 1
                    resumed += 1
                    file = out / "predictions.jsonl"
                    sizes.append(file.stat().st_size if file.exists() else 0)
            _run(options, [*arguments, str(out), "--resume"], 1, 1)
            finished += 1
            same = _without_times(out) == whole
            same = same and (out / "predictions.jsonl").read_bytes() == predictions
            different += not same
            print(f"{killed} kills, {finished} evaluations, {different} different", flush=True)
        within = sum(0 < size < len(predictions) for size in sizes)
        print(
            f"{killed} kills, {within} of them among the predictions; {finished} evaluations "
            f"resumed to their ends, {different} with another report or other predictions"
        )


def _without_times(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in report.items() if key not in TIMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs: dict[str, Callable[[argparse.Namespace], None]] = {
        "speed": speed,
        "exactness": exactness,
        "kills": kills,
    }
    parser.add_argument("what", choices=runs)
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=8, help="of speed and kills")
    parser.add_argument("--repeats", type=int, default=5, help="of speed")
    parser.add_argument("--num-images", type=int, help="of speed and exactness; all by default")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    runs[options.what](options)


if __name__ == "__main__":
    main()

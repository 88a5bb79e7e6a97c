"""Times the input pipeline alone: read, decode, resize, crop and batch, beside a plain PIL loop.

    python -m benchmarks.loader DATA                        e.g. a folder of class folders
    python -m benchmarks.loader DATA --num-images 10000     and memory over so many images

DATA is what `open_dataset` reads; its images are repeated as needed. The pixels are compared before
anything is timed. The contestants take turns, and the figures are medians: the loop and the
pipeline with one thread on one core; threads on all cores; processes that hand over the pixels; and
the loop in processes that hand over nothing, which is what the machine can do at best.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import PIL
from PIL import Image

from internimage_jax.data import Dataset, open_dataset
from internimage_jax.loader import load_batches
from internimage_jax.preprocess import Preprocessing, preprocess

BATCH = 32


def plain(encoded: bytes, side: int) -> np.ndarray:
    """The published preprocessing as one writes it down: resize the whole image, then crop."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    width, height = image.size
    if width <= height:
        size = (side, int(side * height / width))
    else:
        size = (int(side * width / height), side)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def plain_loop(dataset: Dataset, side: int) -> None:
    for i in range(len(dataset)):
        plain(dataset.read(i), side)


def pipeline(dataset: Dataset, side: int, workers: int) -> None:
    batches = load_batches(
        dataset, Preprocessing(side), range(len(dataset)), batch_size=BATCH, workers=workers
    )
    for _ in batches:
        pass


_opened: dict[str, Dataset] = {}


def decode_in_process(path: str, side: int, i: int) -> np.ndarray:
    if path not in _opened:
        _opened[path] = open_dataset(path)
    return preprocess(_opened[path].read(i), Preprocessing(side))


def processes(pool: ProcessPoolExecutor, dataset: Dataset, side: int) -> None:
    function = functools.partial(decode_in_process, dataset.source, side)
    images = pool.map(function, range(len(dataset)), chunksize=4)
    while batch := list(itertools.islice(images, BATCH)):
        pixels = np.zeros((BATCH, side, side, 3), np.uint8)
        for row, image in zip(pixels, batch, strict=False):
            row[...] = image


def plain_in_process(path: str, side: int, indices: Sequence[int]) -> None:
    if path not in _opened:
        _opened[path] = open_dataset(path)
    for i in indices:
        plain(_opened[path].read(i), side)


def plain_processes(pool: ProcessPoolExecutor, dataset: Dataset, side: int) -> None:
    function = functools.partial(plain_in_process, dataset.source, side)
    count = len(dataset)
    list(pool.map(function, [range(i, min(i + 8, count)) for i in range(0, count, 8)]))


def on_one_core(run: Callable[[], None]) -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # threads that start from here inherit it
    try:
        run()
    finally:
        os.sched_setaffinity(0, cores)


def resident() -> float:
    """Memory of this process in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory_growth(dataset: Dataset, side: int, workers: int, count: int) -> tuple[float, float]:
    """MiB after a tenth of `count` images, and by how much it was ever above that later."""
    indices = list(itertools.islice(itertools.cycle(range(len(dataset))), count))
    settings = {"batch_size": BATCH, "workers": workers}
    used = [resident() for _ in load_batches(dataset, Preprocessing(side), indices, **settings)]
    start = used[len(used) // 10]
    return start, max(used[len(used) // 10 :]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-images", type=int, default=0, help="for memory (default: not asked)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    dataset, side, workers = open_dataset(args.data), args.image_size, args.workers
    for i in range(len(dataset)):
        ours, theirs = (
            preprocess(dataset.read(i), Preprocessing(side)),
            plain(dataset.read(i), side),
        )
        # A PIL that does tall images' height first rounds once more or less in between.
        if np.abs(ours.astype(int) - theirs.astype(int)).max() > 2:
            sys.exit(f"{dataset.names[i]}: other pixels than the plain loop's")

    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        contestants: dict[str, Callable[[], None]] = {
            "plain loop, one core": lambda: on_one_core(lambda: plain_loop(dataset, side)),
            "pipeline, one core": lambda: on_one_core(lambda: pipeline(dataset, side, 1)),
            f"pipeline, {workers} threads": lambda: pipeline(dataset, side, workers),
            f"{workers} processes": lambda: processes(pool, dataset, side),
            f"plain loop, {workers} processes": lambda: plain_processes(pool, dataset, side),
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        cpu_times: dict[str, list[float]] = {name: [] for name in contestants}
        for run in contestants.values():
            run()
        for _ in range(args.rounds):
            for name, run in contestants.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                run()
                times[name].append(time.perf_counter() - start)
                cpu_times[name].append(time.process_time() - cpu_start)

    # Of this process, so not of those that use others; they are spared where the machine is busy.
    cpu = [len(dataset) / statistics.median(cpu_times[name]) for name in [*contestants][:3]]
    rates = {name: len(dataset) / statistics.median(values) for name, values in times.items()}
    loop, single, threads, _, loops = rates.values()
    result: dict[str, object] = {
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "pipeline_to_plain_loop_on_one_core": round(single / loop, 3),
        "threads_to_one_core": round(threads / single, 3),
        "processes_of_the_plain_loop_to_one": round(loops / loop, 3),
        "images_per_cpu_second": dict(zip(rates, [round(rate, 1) for rate in cpu], strict=False)),
        "images": len(dataset),
        "image_size": side,
        "workers": workers,
        "pillow": PIL.__version__,
    }
    if args.num_images:
        start, growth = memory_growth(dataset, side, workers, args.num_images)
        result["memory_mib"] = round(start, 1)
        result["memory_growth_mib"] = round(growth, 1)
        result["num_images"] = args.num_images
    if args.json:
        print(json.dumps(result))
        return
    for name, rate in rates.items():
        print(f"{name:24s} {rate:8.1f} images/s   {rate / loop:5.2f} of the plain loop")
    print(f"{workers} threads are {threads / single:.2f} of the pipeline on one core;")
    print(f"{workers} processes of the plain loop are {loops / loop:.2f} of one")
    if args.num_images:
        print(f"memory over {args.num_images} images: {start:.0f} MiB, grew by {growth:.1f} MiB")


if __name__ == "__main__":
    main()

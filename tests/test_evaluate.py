"""Evaluation: every image counted once, whatever the batches, devices, kills and labels."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from internimage_jax import evaluate as evaluation
from internimage_jax.__main__ import main
from internimage_jax.commands.demo import write_checkpoint
from internimage_jax.config import InternImageConfig
from internimage_jax.data import Dataset, open_dataset
from internimage_jax.evaluate import evaluate
from internimage_jax.evaluation_step import Outputs, Step, make_step
from internimage_jax.initial import fill
from internimage_jax.labels import imagenet1k_classes, map_22k_to_1k
from internimage_jax.model import InternImage
from internimage_jax.predictions import read_predictions
from internimage_jax.preprocess import Preprocessing, normalize, preprocess
from internimage_jax.pretrained import from_pretrained
from internimage_jax.report import TIMES
from tests.support import recipe_model, reference, reference_config

CONFIG = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))
COUNT = 23  # images: with batches of 8 an uneven rest, and with 4 devices an uneven share
EACH = 2  # images on each of the four devices


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "released"
    write_checkpoint(folder, CONFIG, image_size=32)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> InternImage:
    return from_pretrained(checkpoint)


def one_at_a_time(model: InternImage) -> Callable[[np.ndarray], np.ndarray]:
    """The oracle: the logits of a single image's pixels (H, W, 3), in float64."""
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images))

    def logits(pixels: np.ndarray) -> np.ndarray:
        images = normalize(pixels, model.preprocessing)[None]
        return np.asarray(forward(state, images)[0], np.float64)

    return logits


@pytest.fixture(scope="module")
def logits_of(model: InternImage) -> Callable[[np.ndarray], np.ndarray]:
    return one_at_a_time(model)


def noise(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (40, 50, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(
    logits_of: Callable[[np.ndarray], np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Class folders of images, a third of them right, a third among the first five, or wrong."""
    root = tmp_path_factory.mktemp("data")
    for seed in range(COUNT):
        pixels = preprocess(noise(seed), Preprocessing(32))
        place = (0, 3, 50)[seed % 3]
        label = int(np.argsort(-logits_of(pixels))[place])
        path = root / str(imagenet1k_classes()[label].wnid) / f"{seed}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise(seed)).save(path)
    return root


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return open_dataset(folder)


@pytest.fixture(scope="module")
def logits(dataset: Dataset, logits_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The oracle's logits of all images, (COUNT, 1000)."""
    pixels = [preprocess(dataset.read(i), Preprocessing(32)) for i in range(COUNT)]
    return np.stack([logits_of(one) for one in pixels])


@pytest.fixture(scope="module")
def steps() -> Callable[..., Any]:
    return functools.cache(make_step)


@pytest.fixture(autouse=True)
def _compiled_once(steps: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests with the same model and settings share the compiled step."""
    monkeypatch.setattr(evaluation, "make_step", steps)


class Finished(NamedTuple):
    """What an evaluation that nothing disturbed leaves behind."""

    report: dict[str, Any]
    predictions: bytes
    compilations: int


@pytest.fixture(scope="module")
def finished(
    model: InternImage,
    dataset: Dataset,
    steps: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    model.fused()  # its few small programs are not what is counted
    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "make_step", steps)
        report = evaluate(model, dataset, batch_size=EACH, output=folder)
    count = len(compilations)
    assert json.loads((folder / "report.json").read_text()) == report
    return Finished(report, (folder / "predictions.jsonl").read_bytes(), count)


@pytest.fixture
def run(model: InternImage, dataset: Dataset, finished: Finished) -> Callable[..., dict[str, Any]]:
    return functools.partial(evaluate, model, dataset, batch_size=EACH)


def expected_counts(
    logits: np.ndarray, labels: list[tuple[int, ...]], classes: np.ndarray | None = None
) -> tuple[int, int, int]:
    """Top-1, top-5 and images, counted one at a time."""
    classes = np.arange(logits.shape[1]) if classes is None else classes
    order = classes[np.argsort(-logits[:, classes], axis=1)[:, :5]]
    right = [[one in wanted for one in row] for row, wanted in zip(order, labels, strict=True)]
    return sum(row[0] for row in right), sum(map(any, right)), len(labels)


def counts(report: dict[str, Any]) -> tuple[int, int, int]:
    return report["correct_top1"], report["correct_top5"], report["num_images"]


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in TIMES}


# Exactness


@pytest.mark.parametrize("num_images", [1, 7, 8, 9, COUNT])
def test_counts_are_those_of_one_image_at_a_time(
    run: Callable[..., dict[str, Any]], dataset: Dataset, logits: np.ndarray, num_images: int
) -> None:
    chosen = [i * COUNT // num_images for i in range(num_images)]
    expected = expected_counts(logits[chosen], [dataset.labels[i] for i in chosen])
    report = run(num_images=num_images)
    assert counts(report) == expected
    assert report["top1"] == 100 * expected[0] / num_images
    assert report["top5"] == 100 * expected[1] / num_images
    if num_images == COUNT:
        assert 0 < expected[0] < expected[1] < COUNT


def test_predictions_are_the_softmax_of_each_image_in_the_order_of_the_dataset(
    run: Callable[..., dict[str, Any]], dataset: Dataset, logits: np.ndarray, tmp_path: Path
) -> None:
    run(output=tmp_path / "out")
    predictions = read_predictions(tmp_path / "out")
    assert [one.index for one in predictions] == list(range(COUNT))
    assert [one.file for one in predictions] == list(dataset.names)
    assert [one.labels for one in predictions] == list(dataset.labels)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for one, expected in zip(predictions, probabilities, strict=True):
        assert list(one.top5) == np.argsort(-expected)[:5].tolist()
        np.testing.assert_allclose(one.probabilities, np.sort(expected)[:-6:-1], rtol=1e-4)


def test_one_program_is_compiled(finished: Finished) -> None:
    assert finished.compilations == 1


def test_fsdp_spreads_the_parameters_and_gives_the_same_counts(
    run: Callable[..., dict[str, Any]], model: InternImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[jax.Array] = []
    device_put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda *args: put.append(device_put(*args)) or put[-1])
    report = run(parallel="fsdp")
    assert counts(report) == counts(run(parallel="pmap"))
    parameters = jax.tree.leaves(nnx.state(model.fused()))
    leaves = put[: len(parameters)]
    whole = sum(leaf.nbytes for leaf in leaves)
    assert whole == sum(leaf.nbytes for leaf in parameters)
    for device in jax.local_devices():
        held = [
            s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == device
        ]
        assert sum(held) < 0.26 * whole


def test_21841_classes_are_mapped_to_those_that_may_be_chosen_and_one_of_several_labels_is_right(
    dataset: Dataset,
) -> None:
    wide = recipe_model(CONFIG.replace(num_classes=21841), preprocessing=Preprocessing(32))
    logits_of = one_at_a_time(wide)
    pixels = [preprocess(dataset.read(i), Preprocessing(32)) for i in range(COUNT)]
    logits = np.stack([logits_of(one) for one in pixels])[:, map_22k_to_1k()]  # (COUNT, 1000)
    logits[:, 850] = -np.inf  # it has no counterpart, and the map repeats 849's for it
    best = np.argsort(-logits, axis=1)
    classes = np.array(sorted({849, 850, *best[:, 1:4].ravel()} - set(best[:, 0])))
    order = classes[np.argsort(-logits[:, classes], axis=1)]
    labels = [
        ((850, int(row[0])), (int(row[2]), 850), (850,))[i % 3] for i, row in enumerate(order)
    ]
    subset = dataclasses.replace(dataset, labels=labels, classes=tuple(classes.tolist()))
    report = evaluate(wide, subset, batch_size=EACH)
    assert counts(report) == expected_counts(logits, labels, classes) == (8, 16, COUNT)
    assert counts(report) != expected_counts(logits, labels)
    by_class = {one["index"]: one for one in report["per_class"]}
    assert set(by_class) == {label for row in labels for label in row}
    assert sum(one["images"] for one in by_class.values()) == sum(map(len, labels))
    assert report["num_classes"] == 21841
    [note] = report["notes"]
    assert "850" in note and "masked" in note and "21,841" in note


@pytest.mark.parametrize("num_images", [40, pytest.param(200, marks=pytest.mark.large)])
def test_the_fitted_head_gives_the_reference_counts_and_logits(
    num_images: int, tmp_path: Path
) -> None:
    path = reference("goldens/imagenet_sample.npz")
    golden, photos = np.load(path), path.parents[2] / "images"
    head = np.load(reference("goldens/internimage_t_1k_224.fitted_head.npz"))
    model = recipe_model(reference_config("internimage_t_1k_224"))
    fill(model, {"head.kernel": head["head.weight"].T, "head.bias": head["head.bias"]})
    report = evaluate(model, photos, batch_size=2, num_images=num_images, output=tmp_path)
    predictions = read_predictions(tmp_path)
    row_of = {str(file): row for row, file in enumerate(golden["files"])}
    rows = [row_of[Path(one.file).name] for one in predictions]
    logits = golden["logits"][rows].astype(np.float64)
    labels = [(int(label),) for label in golden["label"][rows]]
    assert [one.labels for one in predictions] == labels
    assert counts(report) == expected_counts(logits, labels)
    if num_images == 200:
        assert counts(report) == (int(golden["top1"]), int(golden["top5"]), 200)
    for one, wanted in zip(predictions, logits, strict=True):
        assert list(one.top5) == np.argsort(-wanted)[:5].tolist()
        np.testing.assert_allclose(
            np.log(one.probabilities),
            wanted[list(one.top5)] - np.log(np.exp(wanted).sum()),
            atol=1e-4 * np.abs(wanted).max(),
        )


# Kills and resumption


@pytest.mark.parametrize("part", [0.0, 0.03, 0.34, 0.35, 0.6, 0.99, 1.0])
def test_resuming_after_a_kill_ends_with_the_same_report_and_predictions(
    run: Callable[..., dict[str, Any]],
    finished: Finished,
    part: float,
    tmp_path: Path,
) -> None:
    report, predictions, _ = finished
    run(output=tmp_path)
    for name in ("report.json", "report.html"):
        (tmp_path / name).unlink()
    (tmp_path / "predictions.jsonl").write_bytes(predictions[: int(part * len(predictions))])
    again = run(output=tmp_path, resume=True)
    assert without_times(again) == without_times(report)
    assert (tmp_path / "predictions.jsonl").read_bytes() == predictions
    assert (again["images_per_second"] is None) == (part == 1.0)
    assert (tmp_path / "report.html").exists()


def test_resuming_where_nothing_was_begun_is_an_evaluation(
    run: Callable[..., dict[str, Any]], finished: Finished, tmp_path: Path
) -> None:
    report = run(output=tmp_path / "new", resume=True)
    assert without_times(report) == without_times(finished.report)


def test_an_evaluation_is_not_overwritten(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(output=tmp_path, num_images=1)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds an evaluation; --resume goes on"):
        run(output=tmp_path)
    assert (tmp_path / "predictions.jsonl").read_bytes() == before


def test_resuming_with_other_settings_is_an_error_that_names_them(
    run: Callable[..., dict[str, Any]], dataset: Dataset, model: InternImage, tmp_path: Path
) -> None:
    run(output=tmp_path)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    other = dataclasses.replace(dataset, labels=[(i,) for i in range(COUNT)])
    changed = fill_copy(model, "head.bias")
    for settings, named in (
        ({"batch_size": 1}, "batch_size was 2 and is 1"),
        ({"model": other_config(model)}, "config.offset_scale was 1.0 and is 2.0"),
        ({"num_images": 3}, "dataset.images was 23 and is 3"),
        ({"parallel": "fsdp"}, 'parallel was "pmap" and is "fsdp"'),
        ({"data": other}, "dataset.names_and_labels_sha256 was"),
        ({"model": changed}, "weights was"),
    ):
        given = {"model": model, "data": dataset, "batch_size": EACH, **settings}
        with pytest.raises(ValueError, match="cannot be resumed with other settings: ") as caught:
            evaluate(given.pop("model"), given.pop("data"), output=tmp_path, resume=True, **given)
        assert named in str(caught.value)
        assert (tmp_path / "predictions.jsonl").read_bytes() == before


def other_config(model: InternImage) -> InternImage:
    """A model with the same arrays that computes something else with them."""
    copy = nnx.clone(model)
    copy.config = model.config.replace(offset_scale=2.0)
    return copy


def fill_copy(model: InternImage, name: str) -> InternImage:
    """A model like `model`, but for one array."""
    copy = nnx.clone(model)
    fill(copy, {name: np.asarray(model.head.bias[...]) + 1})
    return copy


def test_damaged_predictions_are_an_error_that_names_the_line(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(output=tmp_path, num_images=9)
    path = tmp_path / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"index": 1}\n' + b"".join(lines[2:]))
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 2: got"):
        run(output=tmp_path, num_images=9, resume=True)
    path.write_bytes(lines[1] + lines[0] + b"".join(lines[2:]))
    with pytest.raises(ValueError, match="not of these images, in this order"):
        run(output=tmp_path, num_images=9, resume=True)
    beyond = {**json.loads(lines[0]), "top5": [1000], "probabilities": [1.0]}
    path.write_bytes(json.dumps(beyond).encode() + b"\n" + b"".join(lines[1:]))
    with pytest.raises(ValueError, match="not of these images, in this order"):
        run(output=tmp_path, num_images=9, resume=True)


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_what_there_is(
    run: Callable[..., dict[str, Any]], finished: Finished, tmp_path: Path
) -> None:
    room = 3000  # bytes a file may have; all predictions need more
    assert len(finished.predictions) > room
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"predictions\.jsonl: cannot be written \(File too large\)"
        ):
            run(output=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = (tmp_path / "predictions.jsonl").read_bytes()
    assert kept and finished.predictions.startswith(kept)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["predictions.jsonl", "settings.json"]
    again = run(output=tmp_path, resume=True)
    assert without_times(again) == without_times(finished.report)


# Bad input


@pytest.fixture
def with_broken_image(folder: Path, tmp_path: Path) -> tuple[Dataset, str]:
    """A dataset whose twelfth image is cut off."""
    whole = open_dataset(folder)
    for name in whole.names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes((folder / name).read_bytes())
    broken = tmp_path / "data" / whole.names[11]
    broken.write_bytes(broken.read_bytes()[:200])
    return open_dataset(tmp_path / "data"), whole.names[11]


def test_a_damaged_image_ends_the_evaluation_after_the_batches_before_it(
    model: InternImage, with_broken_image: tuple[Dataset, str], tmp_path: Path
) -> None:
    broken, name = with_broken_image
    with pytest.raises(ValueError, match=f"^{name}: "):
        evaluate(model, broken, batch_size=EACH, output=tmp_path / "out")
    assert [one.index for one in read_predictions(tmp_path / "out")] == list(range(8))


def test_a_damaged_image_is_skipped_and_listed_and_a_kill_changes_nothing(
    model: InternImage,
    with_broken_image: tuple[Dataset, str],
    logits: np.ndarray,
    tmp_path: Path,
) -> None:
    broken, name = with_broken_image
    options: dict[str, Any] = {"batch_size": EACH, "on_error": "skip", "output": tmp_path / "out"}
    report = evaluate(model, broken, **options)
    others = [i for i in range(COUNT) if i != 11]
    assert counts(report) == expected_counts(logits[others], [broken.labels[i] for i in others])
    assert report["num_skipped"] == 1
    assert [one["file"] for one in report["skipped"]] == [name]
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert without_times(evaluate(model, broken, resume=True, **options)) == without_times(report)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"num_images": 24}, "num_images: expected 1 to 23, the dataset's images, got 24"),
        ({"num_images": 0}, "num_images: expected 1 to 23"),
        ({"resume": True}, "resume: needs the output folder"),
        ({"workers": 0}, "workers: got 0, expected at least 1"),
        ({"on_error": "ignore"}, "on_error: got 'ignore', expected 'fail' or 'skip'"),
        ({"parallel": "tensor"}, "parallel: expected 'pmap' or 'fsdp', got 'tensor'"),
    ],
)
def test_settings_out_of_range_are_named_and_nothing_is_written(
    model: InternImage, dataset: Dataset, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    output = None if "resume" in options else tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        evaluate(model, dataset, output=output, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_finite_is_an_error_that_names_the_image(
    run: Callable[..., dict[str, Any]], dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Step.read

    def overflowed(step: Step, outputs: Outputs) -> Outputs:
        found = read(step, outputs)
        found.probabilities[3] = np.nan
        return found

    monkeypatch.setattr(Step, "read", overflowed)
    with pytest.raises(ValueError, match=f"^{dataset.names[3]}: the model's output is not finite"):
        run()


def test_sums_of_the_devices_that_disagree_with_the_predictions_are_an_error(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Step.read
    monkeypatch.setattr(
        Step, "read", lambda self, outputs: (o := read(self, outputs))._replace(sums=o.sums + 1)
    )
    with pytest.raises(ValueError, match=r"the devices counted .* one of them is wrong"):
        run()


def test_progress_counts_up_to_all_images(
    run: Callable[..., dict[str, Any]],
) -> None:
    seen: list[tuple[int, int, int]] = []
    report = run(progress=lambda *figures: seen.append(figures))
    assert [one[0] for one in seen] == [8, 16, COUNT]
    assert {one[1] for one in seen} == {COUNT}
    assert seen[-1][2] == report["correct_top1"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [one.name for one in threading.enumerate() if one.name.startswith("decode")]


def test_a_checkpoint_is_reported_by_the_sha256_of_its_file(
    model: InternImage,
    checkpoint: Path,
    dataset: Dataset,
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "from_pretrained", lambda *_, **__: model)  # compiled already
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    report = evaluate(checkpoint, dataset, batch_size=EACH)
    assert report["weights"] == [{"file": "model.safetensors", "sha256": digest}]
    assert counts(report) == counts(finished.report)


# The command; tests/test_processes.py has runs of it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA/none"], "DATA/none: no such file or folder"),
        (["DATA", "--model", "DATA/none"], "DATA/none: no such file or folder"),
        (["DATA", "--resume"], "resume: needs the output folder"),
        (["DATA", "--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["DATA", "--labels", "DATA/none.txt"], "DATA/none.txt: no such file"),
        (["DATA", "--output", "FILE"], "FILE: is a file; the output is a folder"),
        (["DATA", "--output", "FILE/below"], "FILE: is a file; the output is a folder"),
        (["DATA", "--num-processes", "2"], "need --coordinator HOST:PORT"),
        (["DATA", "--coordinator", "localhost:1"], "expected all three, or none"),
        (["DATA", "--coordinator", "a:1", "--distributed"], "exclude each other"),
    ],
)
def test_bad_input_is_one_line_and_status_1(
    folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "file").touch()

    def named(text: str) -> str:
        return text.replace("DATA", str(folder)).replace("FILE", str(tmp_path / "file"))

    command = ["evaluate", *map(named, arguments)]
    if "--model" not in command:
        command += ["--model", str(checkpoint)]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert named(message) in err

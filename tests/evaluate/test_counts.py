"""Evaluation counts every image once, whatever the batches, devices and labels."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internimage_jax import evaluate as evaluation
from internimage_jax.data import Dataset
from internimage_jax.evaluate import evaluate
from internimage_jax.evaluation_step import _chooser, make_step
from internimage_jax.initial import fill
from internimage_jax.labels import map_22k_to_1k
from internimage_jax.model import InternImage
from internimage_jax.predictions import read_predictions
from internimage_jax.preprocess import Preprocessing, preprocess
from tests.evaluate.runs import (
    CONFIG,
    COUNT,
    EACH,
    Finished,
    counts,
    expected_counts,
    one_at_a_time,
)
from tests.support import recipe_model, reference, reference_config


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


def test_one_program_is_compiled(
    model: InternImage, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    model.fused()  # its few small programs are not what is counted
    monkeypatch.setattr(evaluation, "make_step", make_step)  # not one that is compiled already
    jax.monitoring.register_event_duration_secs_listener(listen)
    evaluate(model, dataset, batch_size=EACH)
    assert len(compilations) == 1


def test_fsdp_spreads_the_parameters_and_gives_the_same_counts(
    run: Callable[..., dict[str, Any]], model: InternImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[jax.Array] = []
    device_put = jax.device_put

    def spread(array: jax.Array, *where: jax.sharding.Sharding) -> jax.Array:
        array = device_put(array, *where)
        put.extend([array] * len(where))  # not what is put on one device
        return array

    monkeypatch.setattr(jax, "device_put", spread)
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


@pytest.mark.parametrize("restricted_to", [None, (3, 4, 5, 7, 849, 850, 999)])
def test_the_class_without_a_counterpart_is_never_chosen(
    restricted_to: tuple[int, ...] | None,
) -> None:
    column = map_22k_to_1k()[849]  # which the map has for 850 too
    logits = jnp.zeros((1, 21841)).at[0, column].set(9)
    classes, probabilities = _chooser(21841, True, restricted_to)(logits)
    assert classes[0, 0] == 849 and 850 not in np.asarray(classes)
    assert probabilities[0, 0] > 0.85 and (probabilities[0, 1:] < 0.001).all()


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


def test_progress_counts_up_to_all_images(
    run: Callable[..., dict[str, Any]],
) -> None:
    seen: list[tuple[int, int, int, int]] = []
    report = run(progress=lambda *figures: seen.append(figures))
    assert [one[0] for one in seen] == [8, 16, COUNT]
    assert {one[1] for one in seen} == {COUNT}
    assert seen[-1][2:] == (report["correct_top1"], COUNT)


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

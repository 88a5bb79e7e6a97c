"""Fixtures of evaluation: a small model, images that it is right or wrong about, a whole run."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internimage_jax import evaluate as evaluation
from internimage_jax.commands.demo import write_checkpoint
from internimage_jax.data import Dataset, open_dataset
from internimage_jax.evaluate import evaluate
from internimage_jax.evaluation_step import make_step
from internimage_jax.labels import imagenet1k_classes
from internimage_jax.model import InternImage
from internimage_jax.preprocess import Preprocessing, preprocess
from internimage_jax.pretrained import from_pretrained
from tests.evaluate.runs import CONFIG, COUNT, EACH, Finished, one_at_a_time


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "released"
    write_checkpoint(folder, CONFIG, image_size=32)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> InternImage:
    return from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def logits_of(model: InternImage) -> Callable[[np.ndarray], np.ndarray]:
    return one_at_a_time(model)


def noise(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (40, 50, 3)).astype(np.uint8)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def dataset(folder: Path) -> Dataset:
    return open_dataset(folder)


@pytest.fixture(scope="session")
def logits(dataset: Dataset, logits_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The oracle's logits of all images, (COUNT, 1000)."""
    pixels = [preprocess(dataset.read(i), Preprocessing(32)) for i in range(COUNT)]
    return np.stack([logits_of(one) for one in pixels])


@pytest.fixture(scope="session")
def steps() -> Callable[..., Any]:
    return functools.cache(make_step)


@pytest.fixture(autouse=True)
def _compiled_once(steps: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests with the same model and settings share the compiled step."""
    monkeypatch.setattr(evaluation, "make_step", steps)


@pytest.fixture(scope="session")
def finished(
    model: InternImage,
    dataset: Dataset,
    steps: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "make_step", steps)
        report = evaluate(model, dataset, batch_size=EACH, output=folder)
    assert json.loads((folder / "report.json").read_text()) == report
    return Finished(report, (folder / "predictions.jsonl").read_bytes())


@pytest.fixture
def run(model: InternImage, dataset: Dataset, finished: Finished) -> Callable[..., dict[str, Any]]:
    return functools.partial(evaluate, model, dataset, batch_size=EACH)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [one.name for one in threading.enumerate() if one.name.startswith("decode")]

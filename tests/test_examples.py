"""The example of fine-tuning: it learns, its model is one to predict and evaluate with."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from examples import finetune
from internimage_jax import create_model, from_pretrained, save_pretrained
from internimage_jax.evaluate import evaluate
from tests.support import SMALLEST

TINTS = {"fig": (90, 40, 120), "lemon": (220, 210, 40), "plum": (40, 40, 160)}


def photos(folder: Path, count: int, seed: int) -> Path:
    """Writes noisy photos of one tint a class."""
    random = np.random.default_rng(seed)
    for name, tint in TINTS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            size = (*random.integers(40, 60, 2), 3)
            pixels = np.clip(tint + random.normal(0, 30, size), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = create_model(SMALLEST, image_size=64, seed=3)
    return save_pretrained(model, tmp_path_factory.mktemp("model") / "before")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("data") / "train", 9, 0)


def test_it_learns_and_is_evaluated(
    checkpoint: Path, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, val = tmp_path / "mine", photos(tmp_path / "val", 4, 1)
    options = "--epochs 4 --batch-size 4 --learning-rate 2e-3 --image-size 32"
    named = ["--model", str(checkpoint), "--validate", str(val)]
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        finetune.main([str(train), str(mine), *named, *options.split()])
    said = capsys.readouterr().out
    assert said.startswith(f"27 images of 3 classes, {jax.device_count()} device(s)\n")
    losses = [float(found) for found in re.findall(r"epoch \d/4: loss (\S+),", said)]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    top1 = [float(found) for found in re.findall(rf"top-1 on {val}: (\S+) %", said)]
    assert len(top1) == 4 and 80 < top1[-1] <= 100

    model = from_pretrained(mine)
    assert model.classes == tuple(TINTS) and model.preprocessing.image_size == 32
    assert evaluate(mine, val, batch_size=4)["top1"] == pytest.approx(top1[-1], abs=0.01)


def test_crops_are_parts_of_the_image() -> None:
    gradient = np.zeros((50, 70, 3), np.uint8)
    gradient[..., 0] = np.arange(70) * 3
    gradient[..., 1] = np.arange(50)[:, None] * 5
    image = Image.fromarray(gradient)
    mirrored = 0
    for seed in range(50):
        crop = finetune.random_crop(image, 16, np.random.default_rng(seed)).astype(int)
        assert crop.shape == (16, 16, 3) and (np.diff(crop[..., 1], axis=0) >= 0).all()
        across = np.diff(crop[..., 0], axis=1)
        assert (across >= 0).all() or (across <= 0).all()
        mirrored += (across <= 0).all()
    assert 10 < mirrored < 40
    strip = Image.new("RGB", (300, 2), (9, 9, 9))
    assert (finetune.random_crop(strip, 8, np.random.default_rng(0)) == 9).all()


def test_order_and_crops_are_of_the_seed_and_the_epoch(train: Path) -> None:
    dataset = finetune.open_dataset(train, class_names=list(TINTS))

    def epoch(number: int, seed: int) -> list[finetune.Batch]:
        return list(finetune.random_batches(dataset, 16, 5, number, seed))

    first, again = epoch(1, 0), epoch(1, 0)
    assert [labels.shape for _, labels in first] == [(5,)] * 5  # of 27 images two are left out
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    for other in (epoch(2, 0), epoch(1, 1)):
        assert not np.array_equal(first[0][0], other[0][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "28"], "batch size: got 28, expected at most 27"),
        (["--batch-size", "0"], "batch size: got 0"),
        (["--epochs", "0"], "epochs: got 0"),
        (["--model", "internimage_q", "--batch-size", "4"], "internimage_q"),
    ],
)
def test_bad_input(
    checkpoint: Path, train: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    arguments = [str(train), str(tmp_path / "mine"), "--model", str(checkpoint), *options]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        finetune.main(arguments)
    assert not (tmp_path / "mine").exists()


def test_folders_that_are_not_what_they_should_be(train: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str, out: str = "mine") -> None:
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            finetune.main([str(folder), str(tmp_path / out), "--model", "not looked at"])
        assert not (tmp_path / "mine").exists()

    refused(train, "File exists", out="")
    (tmp_path / "file").write_text("")
    refused(train, "Not a directory", out="file/mine")
    refused(tmp_path / "nothing", "No such file")
    refused(train.parent, "expected two class folders or more, got 1")
    photos(tmp_path / "data" / "other", 1, 0)
    photos(tmp_path / "data" / "train", 1, 0)
    refused(tmp_path / "data", "a folder in a class folder")
    loose = photos(tmp_path / "loose", 1, 0)
    (loose / "fig" / "0.png").rename(loose / "0.png")
    refused(loose, r"outside the class folders there is image 0\.png")
    (loose / "0.png").unlink()
    refused(loose, "fig: no images of this class")


def test_the_learning_rate_rises_and_falls() -> None:
    def rates(steps: int) -> list[float]:
        optimizer = finetune.adamw(0.5, 0.0, steps)
        params = {"w": jax.numpy.zeros(1)}
        state, found = optimizer.init(params), []
        for _ in range(steps):
            updates, state = optimizer.update({"w": jax.numpy.ones(1)}, state, params)
            found.append(-float(updates["w"][0]))  # Adam's step, of a gradient that stays
        return found

    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        assert rates(1) == pytest.approx([0.5], rel=1e-4)
        found = rates(40)
    assert found[:3] == pytest.approx([0.5 / 3, 0.5 * 2 / 3, 0.5], rel=1e-4)
    assert all(np.diff(found[2:]) < 0) and 0 < found[-1] < 0.01

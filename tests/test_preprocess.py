"""Preprocessing: bit for bit the published pixels; its settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from internimage_jax import preprocess as pre
from internimage_jax.normalize import normalize
from internimage_jax.preprocess import Preprocessing
from tests.dataset_files import encoded
from tests.images import noise

# The published pixels


def golden_photos() -> list[Any]:
    reference = os.environ.get("INTERNIMAGE_REFERENCE")
    golden = Path(reference or "") / "goldens" / "preprocess.npz"
    photos = Path(reference or "") / ".." / "images"
    if not reference or not golden.exists() or not photos.is_dir():
        skip = pytest.mark.skip(reason="needs INTERNIMAGE_REFERENCE and the photos beside it")
        return [pytest.param(None, None, None, marks=skip)]
    with np.load(golden) as file:
        keys = list(file)
    found = {path.name: path for path in photos.glob("*/*")}
    return [pytest.param(golden, key, found[key.split("/")[1]], id=key) for key in keys]


@pytest.mark.parametrize(("golden", "key", "photo"), golden_photos())
def test_photo_equals_the_published_pixels(golden: Path, key: str, photo: Path) -> None:
    with np.load(golden) as file:
        expected = file[key]
    result = pre.preprocess(photo, Preprocessing(int(key.split("/")[0])))
    np.testing.assert_array_equal(result, expected)


def bicubic_matrix(length: int, new_length: int) -> np.ndarray:
    """Weights (new_length, length) of PIL's antialiased bicubic filter, times 2^22."""
    scale = length / new_length
    stretch = max(scale, 1.0)
    rows = np.zeros((new_length, length))
    for i in range(new_length):
        centre = (i + 0.5) * scale
        first = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), length)
        x = abs((np.arange(first, last) - centre + 0.5) / stretch)
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
        rows[i, first:last] = weights / weights.sum()
    return np.trunc(rows * 2**22 + np.copysign(0.5, rows)).astype(np.int64)


def published(image: np.ndarray, crop: int, short: int) -> np.ndarray:
    """Resize, pad and crop in plain integer arithmetic, each step as it is documented."""
    height, width = image.shape[:2]
    if width <= height:
        size = (int(short * height / width), short)
    else:
        size = (short, int(short * width / height))
    for axis in (1, 0):  # the width first; PIL rounds to 8 bits between its two passes
        if size[axis] != image.shape[axis]:
            weights = bicubic_matrix(image.shape[axis], size[axis])
            sums = np.moveaxis(np.tensordot(weights, image.astype(np.int64), (1, axis)), 0, axis)
            image = np.clip((sums + 2**21) >> 22, 0, 255).astype(np.uint8)
    missing = [max(crop - length, 0) for length in image.shape[:2]]
    image = np.pad(image, [((n + 1) // 2, n // 2) for n in missing] + [(0, 0)])
    top, left = ((length - crop) // 2 for length in image.shape[:2])
    return image[top : top + crop, left : left + crop]


@pytest.mark.parametrize(
    ("height", "width", "crop", "short"),
    [
        (37, 50, 16, 16),
        (50, 37, 16, 16),
        (60, 60, 16, 16),
        (9, 5, 16, 16),  # smaller than the crop: enlarged
        (1, 1, 8, 8),
        (1, 7, 5, 5),
        (33, 47, 16, 21),
        (33, 47, 16, 11),  # padded, the long side cropped too: 15
        (33, 80, 16, 11),  # padded above and below, cropped left and right
        (80, 33, 17, 10),
        (80, 33, 10, 10),  # PIL 13 by itself would do the height first, one level off
        (16, 16, 16, 16),
    ],
)
def test_resize_and_crop_follow_the_published_rules(
    height: int, width: int, crop: int, short: int
) -> None:
    image = noise(height, width)
    result = pre.preprocess(image, Preprocessing(crop, resize_size=short))
    assert result.dtype == np.uint8 and result.shape == (crop, crop, 3)
    np.testing.assert_array_equal(result, published(image, crop, short))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_any_size_follows_the_published_rules(
    height: int, width: int, crop: int, short: int
) -> None:
    image = noise(height, width)
    result = pre.preprocess(image, Preprocessing(crop, resize_size=short))
    np.testing.assert_array_equal(result, published(image, crop, short))


@pytest.mark.parametrize(("width", "left"), [(4, 0), (5, 0), (6, 1), (7, 1), (9, 2), (11, 3)])
def test_crop_offsets_are_rounded_down(width: int, left: int) -> None:
    image = noise(4, width)  # the short side fits: nothing is resized
    result = pre.preprocess(image, Preprocessing(4))
    np.testing.assert_array_equal(result, image[:, left : left + 4])
    turned = pre.preprocess(image.transpose(1, 0, 2), Preprocessing(4))
    np.testing.assert_array_equal(turned, image[:, left : left + 4].transpose(1, 0, 2))


def test_long_side_is_truncated_not_rounded() -> None:
    # 10 * 500 / 375 = 13.33, 10 * 59 / 30 = 19.67: with 19 the crop starts at 4, with 20 at 5.
    image = noise(30, 59)
    whole = Image.fromarray(image).resize((19, 10), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[:, 4:14]
    np.testing.assert_array_equal(pre.preprocess(image, Preprocessing(10)), expected)


# Normalisation


def every_value() -> np.ndarray:
    return np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1).reshape(4, 8, 8, 3)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "setting", [Preprocessing(8), Preprocessing(8, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1))]
)
def test_normalize_is_bit_for_bit_float32(jit: bool, setting: Preprocessing) -> None:
    mean, std = (np.asarray(t, np.float32) for t in (setting.mean, setting.std))
    expected = (every_value().astype(np.float32) / np.float32(255) - mean) / std

    def run(x: Any) -> jax.Array:
        return normalize(x, setting)

    result = (jax.jit(run) if jit else run)(every_value())
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(result), expected)


def test_normalize_is_bit_for_bit_what_pytorch_computes() -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    image = torch.from_numpy(every_value()).permute(0, 3, 1, 2).to(torch.float32).div(255)
    mean, std = (torch.tensor(t)[:, None, None] for t in (pre.IMAGENET_MEAN, pre.IMAGENET_STD))
    expected = image.sub_(mean).div_(std).permute(0, 2, 3, 1).numpy()
    result = np.asarray(normalize(every_value(), Preprocessing(8)))
    np.testing.assert_array_equal(result, expected)


def test_normalize_takes_one_image_and_jax_arrays() -> None:
    image = every_value()[0]
    one = normalize(image, Preprocessing(8))
    np.testing.assert_array_equal(one, normalize(jnp.asarray(every_value()), Preprocessing(8))[0])


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 3, 2, 2), np.uint8), np.uint8(3)]
)
def test_normalize_refuses_other_arrays(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^pixels: got .* expected uint8 with 3 channels last; "):
        normalize(wrong, Preprocessing(8))


# Settings


def test_settings_survive_json() -> None:
    setting = Preprocessing(384, 400, (0.1, 0.2, 0.3), (1, 2, 3))
    assert Preprocessing.from_dict(json.loads(json.dumps(setting.to_dict()))) == setting
    assert Preprocessing.from_dict({"image_size": 224}) == Preprocessing(224)
    hash(Preprocessing.from_dict(setting.to_dict()))  # usable as a static argument of jit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "image_size is missing"),
        ({"image_size": 8, "crop": 8}, "unknown keys ['crop'], expected some of ['image_size'"),
        ({"image_size": 0}, "image_size: got 0, expected an integer from 1 to 8192"),
        ({"image_size": 8.0}, "image_size: got 8.0, expected an integer"),
        ({"image_size": True}, "image_size: got True, expected an integer"),
        ({"image_size": 8, "resize_size": 10**6}, "resize_size: got 1000000, expected"),
        ({"image_size": 8, "mean": [0.5]}, "mean: got [0.5], expected three numbers"),
        ({"image_size": 8, "mean": 0.5}, "mean: got 0.5, expected three numbers"),
        ({"image_size": 8, "std": "123"}, "std: got '123', expected three numbers"),
        ({"image_size": 8, "std": [1, 0, 1]}, "std: got (1.0, 0.0, 1.0), expected positive"),
        ({"image_size": 8, "std": [1, float("nan"), 1]}, "std: got [1, nan, 1], expected three"),
        ([224], "got list, expected names and values"),
    ],
)
def test_wrong_settings_are_errors(values: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Preprocessing.from_dict(values, "config.json")
    assert str(caught.value).startswith(f"config.json: {message}")


def test_no_memory_is_not_a_damaged_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", no_memory)
    with pytest.raises(MemoryError):
        pre.load_image(encoded(0))


HUGGINGFACE = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Preprocessing(224)),
        ({"size": 256}, Preprocessing(224, resize_size=256)),
        (
            {"size": {"shortest_edge": 448}, "crop_size": {"height": 384, "width": 384}},
            Preprocessing(384, resize_size=448),
        ),
        ({"image_mean": [0.5] * 3}, Preprocessing(224, mean=(0.5, 0.5, 0.5))),
        (
            {"rescale_factor": 0.00392156862745098, "do_rescale": True, "do_pad": None},
            Preprocessing(224),
        ),
    ],
)
def test_huggingface_settings(change: dict[str, Any], expected: Preprocessing) -> None:
    assert Preprocessing.from_huggingface(HUGGINGFACE | change) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 2}, "resample is 2, expected 3"),
        ({"do_resize": False}, "do_resize is False, expected True"),
        ({"do_center_crop": False}, "do_center_crop is False, expected True"),
        ({"do_normalize": False}, "do_normalize is False, expected True"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, expected 0.0039"),
        ({"crop_size": None}, "missing keys ['crop_size']"),
        ({"crop_size": {"height": 224, "width": 192}}, "crop_size is {'height': 224, 'width': 192"),
        ({"crop_size": "224"}, "crop_size is '224', expected N or"),
        ({"size": {"height": 224, "width": 224}}, "size is {'height': 224, 'width': 224}"),
        ({"size": 0}, "resize_size: got 0"),
        ({"crop_pct": 0.9}, "unknown key 'crop_pct'"),
        ({"image_mean": None}, "missing keys ['image_mean']"),
    ],
)
def test_other_huggingface_processing_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Preprocessing.from_huggingface(HUGGINGFACE | change)
    assert str(caught.value).startswith(f"preprocessor_config.json: {message}")

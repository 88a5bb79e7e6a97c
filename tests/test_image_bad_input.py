"""Files and arrays that are no images, or none to use: an error that names them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internimage_jax import preprocess as pre
from internimage_jax.preprocess import Preprocessing, resize_and_crop
from tests.images import COLOURS, encode, noise, pixels, png


def error_of(source: Any, kind: type[Exception] = ValueError, size: int = 8) -> str:
    with pytest.raises(kind) as caught:
        pre.preprocess(source, Preprocessing(size))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"no image at all", "not an image that PIL can read"),
        (b"\xff\xd8\xff\xe0", "not an image that PIL can read"),
        (encode(noise(64, 64), "JPEG")[:900], "cannot be decoded (image file is truncated"),
        (encode(noise(64, 64), "PNG")[:900], "cannot be decoded ("),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript"),
    ],
    ids=["empty", "text", "jpeg_header", "jpeg", "png", "eps"],
)
def test_broken_file_is_an_error_that_names_it(
    content: bytes, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    assert error_of(path).startswith(f"{path}: {expected}")
    assert error_of(io.BytesIO(content)).startswith(f"BytesIO: {expected}")
    with path.open("rb") as file:
        assert error_of(file).startswith(f"{path}: {expected}")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_truncation_at_any_byte_is_an_error_or_harmless(file_format: str) -> None:
    data = encode(noise(24, 24), file_format)
    whole = pixels(data)
    harmless = []
    for end in range(0, len(data), 3):
        try:
            np.testing.assert_array_equal(pixels(data[:end]), whole)
            harmless.append(len(data) - end)
        except ValueError as error:
            assert str(error).startswith("image bytes: ")
    # Only what follows the pixels may be missing: JPEG's end marker, PNG's checksum and last chunk.
    assert max(harmless, default=0) <= {"JPEG": 2, "PNG": 20}[file_format]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_corrupt_bytes_give_pixels_or_a_value_error(
    file_format: str, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(encode(COLOURS.repeat(5, 0), file_format))
    for position, value in changes:
        data[position % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = pre.preprocess(data, Preprocessing(4))
        except ValueError as error:
            assert str(error).startswith("image bytes: ") and "\n" not in str(error)
        else:
            assert result.shape == (4, 4, 3)


def test_missing_file_folder_and_odd_names(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jpg"
    assert error_of(missing, FileNotFoundError) == f"{missing}: no such file"
    assert error_of(tmp_path) == f"{tmp_path}: cannot be opened as an image file (Is a directory)"
    assert error_of("two\nlines", FileNotFoundError) == "'two\\nlines': no such file"
    assert error_of("nul\0.jpg").startswith(r"'nul\x00.jpg': cannot be opened")
    assert error_of("", FileNotFoundError) == "'': no such file"


def test_name_is_used_in_errors() -> None:
    with pytest.raises(ValueError, match=r"^train\.tar/7\.jpg: the file is empty$"):
        pre.preprocess(b"", Preprocessing(8), name="train.tar/7.jpg")


@pytest.mark.parametrize("action", ["error", "ignore"])
@pytest.mark.parametrize("side", [9_999, 30_000])  # PIL warns at 89 million pixels, fails at twice
def test_image_bomb_is_an_error(action: Any, side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
        message = error_of(png(side, side))
        assert before == (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    assert message.startswith("image bytes: ") and str(Image.MAX_IMAGE_PIXELS)[:2] in message


def test_pixel_limit_of_pil_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(noise(10, 10), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error_of(data).startswith("image bytes: 10x10 pixels, more than the 60 that PIL")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert pixels(data).shape == (10, 10, 3)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_image_too_elongated_to_resize_is_an_error(shape: tuple[int, int]) -> None:
    message = error_of(encode(np.zeros(shape, np.uint8), "PNG"), size=224)
    height, width = shape
    assert message.startswith(f"image bytes: {width}x{height} pixels would be resized to ")


def test_images_without_pixels_are_errors() -> None:
    empty = Image.new("RGB", (0, 5))
    assert error_of(empty) == "Image: 0x5, an image without pixels"
    with pytest.raises(ValueError, match="without pixels"):
        resize_and_crop(empty, Preprocessing(4))
    with pytest.raises(ValueError, match=r"^image: mode L, expected RGB$"):
        resize_and_crop(Image.new("L", (5, 5)), Preprocessing(4))


def test_text_file_and_closed_file_are_errors(tmp_path: Path) -> None:
    assert error_of(io.StringIO("text")).startswith("StringIO: cannot be decoded")
    with (tmp_path / "image.png").open("wb") as file:
        pass
    assert error_of(file).startswith(f"{tmp_path}")

"""What an image may come from, and its pixel formats."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internimage_jax import preprocess as pre
from internimage_jax.preprocess import Preprocessing, load_image
from tests.images import BLUE, COLOURS, GREEN, GREY, RED, encode, noise, pixels, png

# What an image may come from


@pytest.mark.parametrize(
    "kind", ["path", "str", "bytes", "bytearray", "memoryview", "file", "stream", "PIL"]
)
def test_every_kind_of_source_gives_the_same_pixels(kind: str, tmp_path: Path) -> None:
    data = encode(COLOURS, "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(data)
    if kind == "stream":  # a pipe cannot seek
        read_end, write_end = os.pipe()
        os.write(write_end, data)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as stream:
            result = pixels(stream)
    elif kind == "file":
        with path.open("rb") as file:
            result = pixels(file)
            assert not file.closed
    else:
        sources = {"path": path, "str": str(path), "PIL": Image.open(io.BytesIO(data))}
        sources |= {"bytes": data, "bytearray": bytearray(data), "memoryview": memoryview(data)}
        result = pixels(sources[kind])
    np.testing.assert_array_equal(result, COLOURS)


def test_arrays_of_every_shape() -> None:
    grey_as_rgb = np.repeat(GREY[..., None], 3, axis=2)
    alpha = np.full((2, 3, 1), 9, np.uint8)
    np.testing.assert_array_equal(pixels(COLOURS), COLOURS)
    np.testing.assert_array_equal(pixels(np.concatenate([COLOURS, alpha], 2)), COLOURS)
    np.testing.assert_array_equal(pixels(COLOURS[:, ::-1]), COLOURS[:, ::-1])
    np.testing.assert_array_equal(pixels(GREY), grey_as_rgb)
    np.testing.assert_array_equal(pixels(GREY[..., None]), grey_as_rgb)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_array_keeps_its_high_byte(dtype: str) -> None:
    wide = (COLOURS.astype(np.uint16) * 256 + 255).astype(dtype)
    np.testing.assert_array_equal(pixels(wide), COLOURS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (COLOURS / np.float32(255), "array: dtype float32, expected uint8"),
        (COLOURS.astype(np.int64), "array: dtype int64, expected uint8"),
        (COLOURS > 100, "array: dtype bool, expected uint8"),
        (np.zeros((3, 4, 2), np.uint8), "array: shape (3, 4, 2), expected one image"),
        (COLOURS[None], "array: shape (1, 2, 3, 3), expected one image"),
        (COLOURS[0, 0], "array: shape (3,), expected one image"),
        (COLOURS[:0], "array: shape (0, 3, 3), expected one image"),
        ([1, 2], "list: expected a path"),
        (None, "NoneType: expected a path"),
    ],
)
def test_other_arrays_and_objects_are_errors(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        pre.preprocess(wrong, Preprocessing(4))
    assert str(caught.value).startswith(message)


# Pixel formats


@pytest.mark.parametrize("mode", ["RGBA", "RGBX", "RGBa"])
def test_alpha_is_dropped_not_blended(mode: str) -> None:
    image = Image.fromarray(np.dstack([COLOURS, np.full((2, 3), 255, np.uint8)]))
    half = Image.fromarray(np.dstack([COLOURS, np.full((2, 3), 128, np.uint8)]))
    np.testing.assert_array_equal(pixels(image.convert(mode)), COLOURS)
    np.testing.assert_array_equal(pixels(encode(half, "PNG")), COLOURS)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_becomes_three_equal_channels(mode: str) -> None:
    image = Image.fromarray(GREY).convert(mode)
    if mode == "LA":
        image.putalpha(100)
    np.testing.assert_array_equal(pixels(encode(image, "PNG")), np.dstack([GREY] * 3))


def test_one_bit_becomes_black_and_white() -> None:
    bits = np.array([[True, False, True]])
    expected = np.dstack([bits * np.uint8(255)] * 3)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(bits), "PNG")), expected)


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"], ids=["none", "one", "bytes"])
@pytest.mark.parametrize("file_format", ["PNG", "GIF", "PIL"])
def test_palette_is_looked_up_and_transparency_dropped(
    transparency: Any, file_format: str, recwarn: pytest.WarningsRecorder
) -> None:
    if file_format == "GIF" and isinstance(transparency, bytes):
        transparency = 2
    image = Image.fromarray(np.array([[0, 1, 2], [2, 0, 1]], np.uint8))
    image.putpalette([*RED, *GREEN, *BLUE])
    assert image.mode == "P"
    options = {} if transparency is None else {"transparency": transparency}
    image.info |= options
    source = image if file_format == "PIL" else encode(image, file_format, **options)
    np.testing.assert_array_equal(pixels(source), COLOURS)
    assert image.info == options, "the caller's image was changed"
    assert not recwarn.list


def test_palette_with_alpha() -> None:
    image = Image.fromarray(np.array([[0, 1, 2], [2, 0, 1]], np.uint8))
    image.putpalette([*RED, *GREEN, *BLUE])
    np.testing.assert_array_equal(pixels(image.convert("PA")), COLOURS)


def test_cmyk() -> None:
    inks = np.array([[(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 0, 255)]], np.uint8)
    expected = np.array([[(255, 255, 255), (0, 255, 255), (255, 0, 255), (0, 0, 0)]], np.uint8)
    image = Image.frombytes("CMYK", (4, 1), inks.tobytes())
    np.testing.assert_array_equal(pixels(encode(image, "TIFF")), expected)
    patches = image.resize((64, 16), Image.Resampling.NEAREST)
    jpeg = pixels(encode(patches, "JPEG", quality=100))[::16, 8::16]
    np.testing.assert_allclose(jpeg.astype(int), expected, atol=3)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV"])
def test_other_colour_spaces(mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    np.testing.assert_allclose(pixels(image).astype(int), COLOURS, atol=5)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM", "I;16", "I;16B"])
def test_16_bit_grey_is_scaled_not_clipped_to_white(kind: str) -> None:
    values = np.array([[0, 255, 256, 32768, 65279, 65535]], np.uint16)
    if kind == "PGM":
        source: Any = b"P5 6 1 65535\n" + values.astype(">u2").tobytes()
    elif kind.startswith("I"):
        order = ">u2" if kind == "I;16B" else "<u2"
        source = Image.frombytes(kind, (6, 1), values.astype(order).tobytes())
    else:
        source = encode(values, kind)
    expected = np.array([[0, 0, 1, 128, 254, 255]], np.uint8)
    np.testing.assert_array_equal(pixels(source), np.dstack([expected] * 3))


def test_16_bit_colour_is_scaled() -> None:
    # PIL cannot write 16-bit colour: a PNG by hand, one row of one pixel.
    row = b"\x00" + struct.pack(">3H", 0x12FF, 0x8000, 0xFFFF)
    source = png(1, 1, bit_depth=16, colour_type=2, rows=row)
    np.testing.assert_array_equal(pixels(source), [[(0x12, 0x80, 0xFF)]])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_an_error(mode: str) -> None:
    data = encode(Image.new(mode, (2, 2), 5), "TIFF")
    with pytest.raises(ValueError, match=rf"^x\.tif: 32-bit pixels \(mode {mode}\), expected 8 or"):
        load_image(data, name="x.tif")


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_many(file_format: str) -> None:
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    data = encode(first, file_format, save_all=True, append_images=[second], lossless=True)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    np.testing.assert_array_equal(pixels(data), np.asarray(first))


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(COLOURS, "PNG", exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    np.testing.assert_array_equal(pixels(data), COLOURS)


def test_jpeg_is_decoded_in_full() -> None:
    data = encode(Image.fromarray(noise(8, 8)).resize((512, 512)), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pre.preprocess(data, Preprocessing(32)), expected)


def test_pil_image_is_left_as_it_was() -> None:
    image = Image.fromarray(noise(9, 13))
    before = image.copy()
    pre.preprocess(image, Preprocessing(4))
    assert image == before


def test_result_can_be_written_to() -> None:
    result = pre.preprocess(COLOURS, Preprocessing(2))
    result[0, 0] = 1
    assert load_image(COLOURS).size == (3, 2)

"""Preprocessing: bit for bit the published pixels, from anything that holds an image."""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internimage_jax import preprocess as pre
from internimage_jax.preprocess import Preprocessing, load_image, normalize, resize_and_crop

RED, GREEN, BLUE = (200, 10, 20), (30, 210, 40), (50, 60, 220)
COLOURS = np.array([[RED, GREEN, BLUE], [BLUE, RED, GREEN]], np.uint8)  # (2, 3, 3)
GREY = np.array([[0, 7, 128], [200, 254, 255]], np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, file_format: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(source: Any) -> np.ndarray:
    return np.asarray(load_image(source))


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
    image = np.pad(image, [(n // 2, (n + 1) // 2) for n in missing] + [(0, 0)])
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
    with pytest.raises(ValueError, match=r"^pixels: got .* expected uint8 with 3 channels last$"):
        normalize(wrong, Preprocessing(8))


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


# Bad input


def png(
    width: int, height: int, *, bit_depth: int = 8, colour_type: int = 2, rows: bytes = b""
) -> bytes:
    """A PNG that claims this size, whatever its rows are."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">2I5B", width, height, bit_depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


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
        ({"image_size": 8, "std": [1, 0, 1]}, "std: got (1.0, 0.0, 1.0), expected positive"),
        ({"image_size": 8, "std": [1, float("nan"), 1]}, "std: got [1, nan, 1], expected three"),
        ([224], "got list, expected names and values"),
    ],
)
def test_wrong_settings_are_errors(values: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Preprocessing.from_dict(values, "config.json")
    assert str(caught.value).startswith(f"config.json: {message}")


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

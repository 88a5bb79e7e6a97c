"""From an image file to the pixels that the model reads: decode, resize, crop.

The pixels are bit for bit those of the published evaluation: PIL decodes and converts to RGB,
PIL's antialiased bicubic filter brings the short side to the image size, the middle square is cut
out, and (v / 255 - mean) / std follows in float32. Images travel to the device as uint8 and are
normalised there (`normalize`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from internimage_jax.messages import one_line, printable

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_IMAGE_SIZE = 8192
# The whole image is resized before it is cropped; 1 x 60000 pixels would become 224 x 13440000.
MAX_RESIZED_PIXELS = MAX_IMAGE_SIZE**2

Encoded: TypeAlias = bytes | bytearray | memoryview | IO[bytes]
ImageSource: TypeAlias = str | os.PathLike[str] | Encoded | Image.Image | np.ndarray

# Settings of a Hugging Face preprocessor_config.json that this preprocessing has built in.
_HUGGINGFACE_FIXED: Mapping[str, Any] = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_pad": False,
    "resample": 3,  # PIL's number for bicubic
    "rescale_factor": 1 / 255,
}
# Settings that do not change the pixels.
_HUGGINGFACE_IGNORED = (
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "default_to_square",
    "data_format",
    "input_data_format",
    "return_tensors",
    "device",
    "disable_grouping",
    "_valid_processor_keys",
)


@dataclass(frozen=True)
class Preprocessing:
    """How images become model input.

    Args:
        image_size: Side of the square that the model reads, in pixels.
        resize_size: Length of the short side before the crop; None for `image_size`.
        mean: Of each channel (red, green, blue), for pixel values from 0 to 1.
        std: Likewise.

    Raises:
        ValueError: A value has the wrong type or range.
    """

    image_size: int
    resize_size: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_side("image_size", self.image_size)
        if self.resize_size is not None:
            _check_side("resize_size", self.resize_size)
        for name in ("mean", "std"):
            values = _three_floats(name, getattr(self, name))
            object.__setattr__(self, name, values)  # lists, as JSON has them, become tuples
        if min(self.std) <= 0:
            raise ValueError(f"std: got {self.std}, expected positive numbers")

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON values; `from_dict` reads them back."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], name: str = "preprocessing") -> Preprocessing:
        """Reads what `to_dict` wrote.

        Args:
            settings: The keys of this class; all but `image_size` may be left out.
            name: Where the settings are from, for errors.

        Raises:
            ValueError: A key is unknown, `image_size` is missing, or a value does not fit.
        """
        _check_mapping(settings, name)
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(f"{name}: unknown keys {unknown}, expected some of {known}")
        if "image_size" not in settings:
            raise ValueError(f"{name}: image_size is missing")
        try:
            return cls(**settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    @classmethod
    def from_huggingface(
        cls, settings: Mapping[str, Any], name: str = "preprocessor_config.json"
    ) -> Preprocessing:
        """Reads the settings of a Hugging Face CLIP image processor, as the released models have.

        Args:
            settings: The content of preprocessor_config.json. `size` is a number or
                {"shortest_edge"}, `crop_size` a number or {"height", "width"} of equal values.
            name: Where the settings are from, for errors.

        Raises:
            ValueError: A key is missing or unknown, or the processing differs from this one.
        """
        _check_mapping(settings, name)
        settings = {key: value for key, value in settings.items() if value is not None}
        required = ("size", "crop_size", "image_mean", "image_std")
        if missing := [key for key in required if key not in settings]:
            raise ValueError(f"{name}: missing keys {missing}")
        for key, value in settings.items():
            if key in _HUGGINGFACE_FIXED:
                if value != _HUGGINGFACE_FIXED[key]:
                    expected = _HUGGINGFACE_FIXED[key]
                    raise ValueError(f"{name}: {key} is {value!r}, expected {expected!r}")
            elif key not in required and key not in _HUGGINGFACE_IGNORED:
                raise ValueError(f"{name}: unknown key {key!r}")
        crop = _huggingface_side(settings["crop_size"], ("height", "width"), "crop_size", name)
        short = _huggingface_side(settings["size"], ("shortest_edge",), "size", name)
        found = {
            "image_size": crop,
            "resize_size": None if short == crop else short,
            "mean": settings["image_mean"],
            "std": settings["image_std"],
        }
        return cls.from_dict(found, name)


def preprocess(
    source: ImageSource, preprocessing: Preprocessing, name: str | None = None
) -> np.ndarray:
    """Loads an image and cuts out the square that the model reads.

    Args:
        source: As for `load_image`.
        preprocessing: The sizes.
        name: As for `load_image`.

    Returns:
        uint8 (image_size, image_size, 3), RGB, not normalised.

    Raises:
        FileNotFoundError, ValueError: As `load_image` and `resize_and_crop` do; one line that names
            the image.
    """
    name = _name_of(source, name)
    return resize_and_crop(load_image(source, name), preprocessing, name)


def load_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Decodes an image to 8-bit RGB, as PIL's `Image.open(file).convert("RGB")` does.

    As in the published evaluation, alpha is dropped without blending, EXIF orientation is not
    applied, and of several frames the first counts (of a PIL image, the current one). The one
    difference: 16-bit grey keeps its high byte, where PIL would turn everything above 255 white.

    Args:
        source: A path; an encoded image as bytes or as a file opened for reading; a PIL image; or
            an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 (0 to 255) or uint16 (0 to
            65535).
        name: What errors call the image; None for the file's name.

    Returns:
        A PIL image of mode RGB; one that is RGB already is returned itself.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image, is empty, truncated, of 32-bit pixels, PostScript (PIL would
            start another program), or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (PIL itself
            only warns up to twice as many).
    """
    name = _name_of(source, name)
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source, name)
    if isinstance(source, Image.Image):
        return _to_rgb(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(BytesIO(source), name)
    if isinstance(source, str | os.PathLike):
        try:
            file = open(source, "rb")  # noqa: SIM115 - closed below: decoding has errors of its own
        except FileNotFoundError:
            raise FileNotFoundError(f"{name}: no such file") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{name}: cannot be opened as an image file ({reason})") from None
        with file:
            return _decode(file, name)
    if hasattr(source, "read"):
        return _decode(source, name)
    raise ValueError(f"{name}: expected a path, bytes, an open file, a PIL image or a NumPy array")


def resize_and_crop(
    image: Image.Image, preprocessing: Preprocessing, name: str = "image"
) -> np.ndarray:
    """Brings the short side to its size and cuts out the middle square.

    Args:
        image: An RGB image, as `load_image` returns it.
        preprocessing: The sizes. A resized image that is smaller than the square is padded with
            zeros.
        name: What errors call the image.

    Returns:
        uint8 (image_size, image_size, 3).

    Raises:
        ValueError: The mode is not RGB, or the image so elongated that it would have, resized, more
            than `MAX_RESIZED_PIXELS` pixels.

    Source: torchvision's Resize on PIL images, and the crop of the image processor released with
    the weights.
    """
    if image.mode != "RGB":
        raise ValueError(f"{name}: mode {image.mode}, expected RGB")
    _check_pixels(image, name)
    crop = preprocessing.image_size
    short = preprocessing.resize_size or crop
    width, height = image.size
    if width <= height:
        size = (short, int(short * height / width))
    else:
        size = (int(short * width / height), short)
    if size[0] * size[1] > MAX_RESIZED_PIXELS:
        raise ValueError(
            f"{name}: {width}x{height} pixels would be resized to {size[0]}x{size[1]}, "
            f"expected at most {MAX_RESIZED_PIXELS} pixels"
        )
    left, top = _crop_start(size[0], crop), _crop_start(size[1], crop)
    # One axis at a time: PIL rounds to 8 bits in between, and the published pixels come from a PIL
    # that always did the width first. Since version 13 it does the height of tall images first.
    if size[0] != width:
        image = image.resize((size[0], height), Image.Resampling.BICUBIC)
    image = image.crop((max(left, 0), 0, min(left + crop, size[0]), height))
    if size[1] != height:
        image = image.resize((image.width, size[1]), Image.Resampling.BICUBIC)
    left = min(left, 0)  # what is missing on the left, to be padded
    return np.array(image.crop((left, top, left + crop, top + crop)))  # (crop, crop, 3)


def _decode(file: IO[bytes], name: str) -> Image.Image:
    try:
        with _errors_naming(name):
            image = Image.open(file)
    except UnidentifiedImageError:
        reason = "the file is empty" if _is_empty(file) else "not an image that PIL can read"
        raise ValueError(f"{name}: {reason}") from None
    if image.format == "EPS":
        raise ValueError(f"{name}: PostScript, expected a pixel image")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{name}: {image.width}x{image.height} pixels, more than the {limit} that "
            "PIL.Image.MAX_IMAGE_PIXELS allows"
        )
    return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_pixels(image, name)
    with _errors_naming(name):
        image.load()
    if image.mode == "RGB":
        return image  # convert would copy it, which takes half as long as decoding a JPEG
    is_16_bit = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    if is_16_bit:
        return _array_to_rgb(np.asarray(image).astype(np.uint16), name)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name}: 32-bit pixels (mode {image.mode}), expected 8 or 16 bits a channel"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]  # it has no effect on RGB but a warning
    with _errors_naming(name):
        return image.convert("RGB")


def _array_to_rgb(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ValueError(
            f"{name}: dtype {array.dtype}, expected uint8 (0 to 255) or uint16 (0 to 65535)"
        )
    if array.ndim not in (2, 3) or array.size == 0 or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(
            f"{name}: shape {array.shape}, expected one image, (H, W) or (H, W, 1, 3 or 4)"
        )
    if array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    if array.ndim == 3:
        array = array[..., 0] if array.shape[2] == 1 else array[..., :3]
    return Image.fromarray(array).convert("RGB")


def _check_pixels(image: Image.Image, name: str) -> None:
    if 0 in image.size:
        raise ValueError(f"{name}: {image.width}x{image.height}, an image without pixels")


def _crop_start(length: int, crop: int) -> int:
    """Returns where the square begins; PIL fills what lies outside the image with zeros."""
    # Rounded down, as the image processor released with the weights does it. torchvision's crop,
    # in the authors' training code, rounds half to even: one pixel further for every other odd
    # difference.
    return (length - crop) // 2


@contextlib.contextmanager
def _errors_naming(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises on a broken file into one line that names it."""
    try:
        yield
    except (UnidentifiedImageError, MemoryError):
        raise
    except Exception as error:
        reason = one_line(error)
        raise ValueError(f"{name}: cannot be decoded ({reason})") from error


def _is_empty(file: IO[bytes]) -> bool:
    with contextlib.suppress(Exception):
        file.seek(0)
        return not file.read(1)
    return False


def _name_of(source: object, name: str | None) -> str:
    if name is None and isinstance(source, str | os.PathLike):
        name = os.fsdecode(source)
    elif name is None and isinstance(source, np.ndarray):
        name = "array"
    elif name is None and isinstance(source, bytes | bytearray | memoryview):
        name = "image bytes"
    elif name is None:
        own = getattr(source, "filename", None) or getattr(source, "name", None)
        name = str(own or type(source).__name__)
    return printable(name)


def _check_side(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_IMAGE_SIZE:
        raise ValueError(f"{name}: got {value!r}, expected an integer from 1 to {MAX_IMAGE_SIZE}")


def _three_floats(name: str, values: Any) -> tuple[float, float, float]:
    try:
        red, green, blue = map(float, [values] if isinstance(values, str) else values)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {values!r}, expected three numbers") from None
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError(f"{name}: got {values!r}, expected three finite numbers")
    return red, green, blue


def _huggingface_side(value: Any, keys: tuple[str, ...], setting: str, name: str) -> int:
    side = value
    if isinstance(value, Mapping):
        side = value.get(keys[0])
        if dict(value) != dict.fromkeys(keys, side):
            side = None
    if type(side) is not int:
        expected = "{" + ", ".join(f'"{key}": N' for key in keys) + "}"
        raise ValueError(f"{name}: {setting} is {value!r}, expected N or {expected}")
    return side


def _check_mapping(settings: object, name: str) -> None:
    if not isinstance(settings, Mapping):
        raise ValueError(f"{name}: got {type(settings).__name__}, expected names and values")

"""Small images, their files and their pixels."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from internimage_jax.preprocess import load_image

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

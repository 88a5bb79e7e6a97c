"""Reads the one table that is needed of the ILSVRC2012 devkit's meta.mat, a MATLAB 5 file.

Such a file is a sequence of elements: type, size, content. A matrix is an element of elements: its
class, its shape, its name, then its content; of a struct, the fields' names and a matrix for each
field of each row. Here in Python, since a damaged file can crash scipy.io.loadmat and the process.

Source: MAT-File Format, The MathWorks; the Level 5 format.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

INT8, UINT8, UINT16, MATRIX, COMPRESSED, UTF8 = 1, 2, 4, 14, 15, 16
STRUCT_CLASS = 2
NUMBERS = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
NUMBERS |= {12: "<i8", 13: "<u8"}
CHARACTERS = {INT8: "ascii", UINT8: "ascii", UINT16: "utf-16-le", UTF8: "utf-8"}
MAX_BYTES = 2**27  # decompressed; the devkit's has 1.5 million


def read_ilsvrc2012_ids(content: bytes) -> dict[int, str]:
    """Returns the WordNet id of each ILSVRC2012 id in a meta.mat. Ids above 1000 are inner nodes.

    Raises ValueError for anything else than such a file; of a damaged one also what struct, zlib
    or an index raise.
    """
    if content[124:128] != b"\x00\x01IM":
        raise ValueError("no little-endian MATLAB 5 file")
    for kind, data in _elements(memoryview(content)[128:]):
        if kind == COMPRESSED:
            decompressor = zlib.decompressobj()
            plain = decompressor.decompress(data, MAX_BYTES)
            if not decompressor.eof:
                raise ValueError(f"cut off, or more than {MAX_BYTES} bytes when decompressed")
            kind, data = next(_elements(memoryview(plain)), (0, data))
        if kind == MATRIX:
            flags, _, name, *parts = (part for _, part in _elements(data))
            if bytes(name) == b"synsets" and flags[0] == STRUCT_CLASS:
                return _ids(parts)
    raise ValueError("has no struct called synsets")


def _ids(parts: list[memoryview]) -> dict[int, str]:
    """Takes the two columns out of the struct: widths of names, names, and the fields' matrices."""
    width = int.from_bytes(parts[0][:4], "little")
    if not 0 < width < 1000:
        raise ValueError(f"names of {width} characters")
    text = bytes(parts[1])
    names = [text[i : i + width].split(b"\0")[0] for i in range(0, len(text), width)]
    columns = [names.index(name) for name in (b"ILSVRC2012_ID", b"WNID")]
    ids = {}
    for row in range(2, len(parts), len(names)):
        number, wnid = (list(_elements(parts[row + column]))[3] for column in columns)
        key = int(np.frombuffer(number[1], NUMBERS[number[0]])[0])
        ids[key] = str(wnid[1], CHARACTERS[wnid[0]])
    return ids


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields type and content of each element."""
    start = 0
    while start < len(data):
        kind, size = struct.unpack_from("<II", data, start)
        if kind >> 16:  # a small one: sizes and content within 8 bytes
            kind, size, begin = kind & 0xFFFF, kind >> 16, start + 4
            start += 8
        else:
            begin = start + 8
            start = begin + size + (0 if kind == COMPRESSED else -size % 8)
        if begin + size > len(data):
            raise ValueError("ends early")
        yield kind, data[begin : begin + size]

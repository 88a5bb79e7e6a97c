"""Reads the zip that torch.save writes, whose entries are not compressed.

The standard zipfile module is not strict enough here: it reads archives with bytes before, after or
between their parts, and never compares a file's size with what the directory says.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from convert.lazy_tensor import SourceFile, quote

MAX_METADATA = 2**27  # bytes of directory or pickle; the largest released model has 0.3 MB


@dataclass(frozen=True)
class Entry:
    """A file in the zip: where its bytes are, how many, and their CRC-32."""

    offset: int
    size: int
    crc: int


def read_directory(file: SourceFile) -> dict[str, Entry]:
    """Returns the entries of a zip by name, checked against their own headers and the file's size.

    Args:
        file: The open file.

    Returns:
        Name to entry.

    Raises:
        ValueError: The zip is truncated, damaged, compressed, or holds anything else.
    """
    count, start, size = _find_directory(file)
    if size > MAX_METADATA:
        raise ValueError(f"has a zip directory of {size} bytes; at most {MAX_METADATA} are read")
    directory = file.read(start, size)
    headers: list[tuple[int, bytes, int, int]] = []  # header's offset, name, size, crc
    at = 0
    while at < size:
        if size - at < 46 or directory[at : at + 4] != b"PK\x01\x02":
            raise ValueError("has a damaged zip directory")
        (_, _, _, flags, method, _, _, crc, packed, unpacked, *lengths, _, _, _, offset) = (
            struct.unpack("<4s6H3I5H2I", directory[at : at + 46])
        )
        name_end = at + 46 + lengths[0]
        name = directory[at + 46 : name_end]
        extra = directory[name_end : name_end + lengths[1]]
        at += 46 + sum(lengths)
        # Values of 4 GiB and above stand in a "zip64" field, in this order.
        wide = _zip64_values(extra, [v for v in (unpacked, packed, offset) if v == 2**32 - 1])
        unpacked, packed, offset = (
            wide.pop(0) if v == 2**32 - 1 else v for v in (unpacked, packed, offset)
        )
        if flags & 1 or method or packed != unpacked:
            raise ValueError(
                f"is a compressed or encrypted zip ({quote(name.decode('latin1'))});"
                " write it with torch.save, which does not compress"
            )
        headers.append((offset, name, packed, crc))
    if at != size or len(headers) != count:
        raise ValueError(f"has a zip directory of {len(headers)} entries; {count} are announced")

    headers.sort()
    entries: dict[str, Entry] = {}
    limits = [offset for offset, *_ in headers[1:]] + [start]
    for (offset, name, length, crc), limit in zip(headers, limits, strict=True):
        text = name.decode("utf-8", "backslashreplace")
        header = file.read(offset, 30 + len(name)) if offset < start else b""
        if header[:4] != b"PK\x03\x04" or header[30:] != name:
            raise ValueError(f"has no {quote(text)} where its zip directory says")
        method, local_name, local_extra = struct.unpack("<8xH16xHH", header[:30])
        data = offset + 30 + local_name + local_extra
        if method or local_name != len(name) or data + length > limit or text in entries:
            raise ValueError(f"has a damaged zip entry {quote(text)}")
        entries[text] = Entry(data, length, crc)
    return entries


def _find_directory(file: SourceFile) -> tuple[int, int, int]:
    """Returns number of entries, offset and size of a zip's directory, by the file's last bytes."""
    truncated = ValueError("does not end as a zip does: truncated, or something was appended")
    tail = file.read(max(0, file.size - 98), min(98, file.size))
    end = tail[-22:]
    if len(end) < 22 or end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        raise truncated
    count, size, start = struct.unpack("<10xHII2x", end)
    stop = file.size - 22
    if tail[-42:-38] == b"PK\x06\x07":  # torch always writes the 64-bit form before the short one
        wide = tail[:-42]
        if len(wide) != 56 or wide[:4] != b"PK\x06\x06":
            raise truncated
        count, size, start = struct.unpack("<32xQQQ", wide)
        stop = file.size - 98
    if start + size != stop:
        raise truncated
    return count, start, size


def _zip64_values(extra: bytes, wanted: list[int]) -> list[int]:
    """Returns as many 64-bit values as `wanted` has, from a directory entry's extra fields."""
    while wanted and len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        if kind == 1 and size >= 8 * len(wanted) and len(extra) >= 4 + size:
            return list(struct.unpack(f"<{len(wanted)}Q", extra[4 : 4 + 8 * len(wanted)]))
        extra = extra[4 + size :]
    if wanted:
        raise ValueError("has a zip directory without its 64-bit sizes")
    return []


def read_entry(file: SourceFile, entry: Entry, name: str) -> bytes:
    """Returns the bytes of a small entry, `name` in messages, checked against its CRC-32."""
    if entry.size > MAX_METADATA:
        raise ValueError(f"has a {name} of {entry.size} bytes; at most {MAX_METADATA} are read")
    data = file.read(entry.offset, entry.size)
    if entry.crc not in (0, zlib.crc32(data)):  # torch can be told to write 0 in its place
        raise ValueError(f"has a damaged {name}: its CRC-32 is not the one recorded")
    return data

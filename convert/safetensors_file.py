"""Reads .safetensors: the length of a JSON header, the header, then the tensors without a gap.

The safetensors library maps the file, and pages that were read stay resident; hence plain reads.
"""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np

from convert.lazy_tensor import CheckpointError, LazyTensor, SourceFile, check_shape, quote

MAX_JSON = 2**24  # bytes; the largest released model has 0.2 MB

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_safetensors(file: SourceFile) -> dict[str, LazyTensor]:
    """Returns the tensors of a .safetensors file by name.

    Args:
        file: The open file.

    Returns:
        Name to tensor.

    Raises:
        CheckpointError: The file is truncated or its header does not describe its bytes exactly.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    header = read_json(file, 8, length)
    header.pop("__metadata__", None)
    found = [(*_read_entry(file, name, entry), name) for name, entry in header.items()]
    # Without gaps and overlaps, each byte after the header is part of exactly one tensor.
    at = 0
    tensors: dict[str, LazyTensor] = {}
    for begin, end, shape, dtype, name in sorted(found, key=lambda entry: entry[:2]):
        if begin != at:
            raise file.error(f"tensor {quote(name)} begins at {begin}; the last one ended at {at}")
        tensors[name] = LazyTensor(name, shape, dtype, file, 8 + length + begin)
        at = end
    if 8 + length + at != file.size:
        raise file.error(
            f"has {file.size} bytes; its header describes {8 + length + at}: truncated or damaged"
        )
    return {name: tensors[name] for name in header}


def _read_entry(
    file: SourceFile, name: str, entry: object
) -> tuple[int, int, tuple[int, ...], np.dtype]:
    """Returns begin, end, shape and dtype of a tensor in a header."""
    match entry:
        case {"dtype": str(kind), "shape": [*sizes], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise file.error(f"tensor {quote(name)} lacks dtype, shape or data_offsets")
    if kind not in _DTYPES:
        raise file.error(
            f"tensor {quote(name)} has dtype {quote(kind)}; one of {' '.join(_DTYPES)} expected"
        )
    dtype = _DTYPES[kind]
    try:
        shape = check_shape(sizes, dtype)
    except ValueError as error:
        raise file.error(f"{error} ({quote(name)})") from None
    nbytes = LazyTensor(name, shape, dtype, file, 0).nbytes
    if not 0 <= begin <= end or end - begin != nbytes:
        raise file.error(f"tensor {quote(name)} of {nbytes} bytes has data_offsets that do not fit")
    if end > file.size:
        raise file.error(f"ends at {file.size} bytes, within tensor {quote(name)}: truncated")
    return begin, end, shape, dtype


def read_json(file: SourceFile, offset: int, size: int) -> dict[str, object]:
    """Returns the JSON object in `size` bytes of a file; raises CheckpointError if it is none."""
    if size > MAX_JSON:
        raise file.error(f"announces {size} bytes of JSON; at most {MAX_JSON} are read")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a name stands there twice")
        return values

    try:
        value = json.loads(file.read(offset, size).decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise file.error("has JSON that is nested too deeply") from None
    except UnicodeDecodeError:
        raise file.error("has JSON that is not UTF-8") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise file.error(f"has damaged JSON: {error}") from None
    if not isinstance(value, dict):
        raise file.error("has JSON that is not an object")
    return value

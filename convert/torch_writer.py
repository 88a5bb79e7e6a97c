"""Writes a file that torch.load reads, without torch.

The file is a zip of the arrays' bytes and of a pickle that says what they are. The pickle names
torch's functions, so Python's own pickler could write it only where torch is installed; its few
instructions are put together by hand here.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

_STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
}
# The folder within the zip; torch.save has one of another name, so that files are told apart.
_ROOT = "internimage_jax"


def write_torch(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes `{"model": {name: tensor, ...}}`, as the released .pth files have it.

    Args:
        path: The file to write.
        tensors: Shape and dtype of each tensor by name.
        arrays: In the order of `tensors`, of their shapes and dtypes.
    """

    def entry(name: str) -> zipfile.ZipInfo:  # of a fixed date: equal tensors make equal files
        return zipfile.ZipInfo(f"{_ROOT}/{name}")

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(entry("data.pkl"), _pickle(tensors))
        archive.writestr(entry("byteorder"), "little")
        for key, array in enumerate(arrays):
            with archive.open(entry(f"data/{key}"), "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        archive.writestr(entry("version"), "3\n")


def is_written_here(path: Path) -> bool:
    """Whether a file is one that `write_torch` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[:1] == [f"{_ROOT}/data.pkl"]
    except zipfile.BadZipFile:
        return False


def _pickle(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    items = b"".join(
        _text(name) + _tensor(str(key), shape, dtype)
        for key, (name, (shape, dtype)) in enumerate(tensors.items())
    )
    state_dict = pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    whole = pickle.EMPTY_DICT + _text("model") + state_dict + pickle.SETITEM
    return pickle.PROTO + b"\x02" + whole + pickle.STOP


def _tensor(key: str, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Calls torch._utils._rebuild_tensor_v2 on the storage `key`."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    storage = _tuple(
        _text("storage"),
        _name("torch", _STORAGES[dtype.name]),
        _text(key),
        _text("cpu"),
        _integer(math.prod(shape)),
    )
    hooks = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _integer(0),  # offset in the storage
        _tuple(*map(_integer, shape)),
        _tuple(*map(_integer, strides)),
        pickle.NEWFALSE,  # requires_grad
        hooks,
    )
    return _name("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data

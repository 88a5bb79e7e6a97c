"""Writes small checkpoints by hand, byte for byte, so that tests need no torch and can lie."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


@dataclass(frozen=True)
class Name:
    """A global name in a pickle."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """A call in a pickle."""

    function: Name
    args: tuple


@dataclass(frozen=True)
class Reference:
    """A persistent id in a pickle."""

    value: object


def pickle(value: object) -> bytes:
    """Returns the pickle of a value made of the classes above and plain Python."""
    return _encode(value) + b"."


def _encode(value: object) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"I%d\n" % value
        case str():
            return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
        case tuple():
            return b"(" + b"".join(map(_encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_encode(k) + _encode(v) for k, v in value.items()) + b"u"
        case Name(module, name):
            return b"c" + module.encode() + b"\n" + name.encode() + b"\n"
        case Call(function, args):
            return _encode(function) + _encode(args) + b"R"
        case Reference(inner):
            return _encode(inner) + b"Q"
    raise TypeError(type(value))


def storage(key: str, dtype: str, count: int) -> Reference:
    """Returns the reference to a storage."""
    return Reference(("storage", Name("torch", STORAGES[dtype]), key, "cpu", count))


def tensor(store: object, offset: object, shape: object, strides: object) -> Call:
    """Returns the call that rebuilds a tensor as a view of a storage."""
    hooks = Call(Name("collections", "OrderedDict"), ())
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"), (store, offset, shape, strides, False, hooks)
    )


def torch_zip(data_pkl: bytes, storages: dict[str, bytes], **extra: bytes) -> bytes:
    """Returns a file as torch.save writes it, around a pickle; `extra` are further entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", data_pkl)
        archive.writestr("weights/byteorder", b"little")
        for key, values in storages.items():
            archive.writestr(f"weights/data/{key}", values)
        for name, values in extra.items():
            archive.writestr(f"weights/{name}", values)
    return file.getvalue()


def torch_file(arrays: dict[str, np.ndarray], entry: str | None = None) -> bytes:
    """Returns a torch file of named arrays, or of one entry that has them."""
    tree, storages = {}, {}
    for key, (name, array) in enumerate(arrays.items()):
        strides = tuple(s // array.itemsize for s in array.strides)
        store = storage(str(key), str(array.dtype), array.size)
        tree[name] = tensor(store, 0, array.shape, strides)
        storages[str(key)] = array.tobytes()
    return torch_zip(pickle(tree if entry is None else {entry: tree}), storages)


def safetensors_file(header: object, data: bytes) -> bytes:
    """Returns a .safetensors file with any header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(path: Path, content: bytes) -> Path:
    """Writes a file and returns its path."""
    path.write_bytes(content)
    return path

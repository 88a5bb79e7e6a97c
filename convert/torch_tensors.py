"""Reads a file of torch.save: a zip with a pickle and the bytes of each storage.

The pickle calls functions of torch to rebuild each tensor as a view of a storage. Those calls are
read here as descriptions, which give a `LazyTensor`; every other class or function is `Inert`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from convert.lazy_tensor import (
    CheckpointError,
    LazyTensor,
    SourceFile,
    check_shape,
    quote,
    span,
)
from convert.torch_pickle import Inert, read_pickle
from convert.torch_zip import Entry, read_directory, read_entry

MAX_OBJECTS = 2**20  # a shared one counted wherever it appears
MAX_DEPTH = 64  # of containers in one another

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_STORAGES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": _BFLOAT16,
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
    "torch.ComplexFloatStorage": np.dtype("<c8"),
    "torch.ComplexDoubleStorage": np.dtype("<c16"),
    "torch.storage.UntypedStorage": np.dtype("u1"),
}
# The dtype of a tensor that names it, which torch does where there is no storage class for it.
_DTYPES = {
    "torch.float64": np.dtype("<f8"),
    "torch.float32": np.dtype("<f4"),
    "torch.float16": np.dtype("<f2"),
    "torch.bfloat16": _BFLOAT16,
    "torch.int64": np.dtype("<i8"),
    "torch.int32": np.dtype("<i4"),
    "torch.int16": np.dtype("<i2"),
    "torch.int8": np.dtype("i1"),
    "torch.uint64": np.dtype("<u8"),
    "torch.uint32": np.dtype("<u4"),
    "torch.uint16": np.dtype("<u2"),
    "torch.uint8": np.dtype("u1"),
    "torch.bool": np.dtype("?"),
}
# A subclass may mean something else by its values.
_TENSOR_TYPES = (
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
)


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of bytes that tensors are views of."""

    offset: int
    nbytes: int
    dtype: np.dtype


def read_torch_file(file: SourceFile) -> object:
    """Returns the object in a file of torch.save, with a `LazyTensor` for each dense tensor.

    The object is a finite tree of dicts, lists, tuples, scalars, `LazyTensor`s and `Inert`s.

    Args:
        file: The open file, which begins as a zip does.

    Returns:
        The object.

    Raises:
        CheckpointError: The file is truncated, damaged, hostile, or not of this kind.
    """
    try:
        entries = read_directory(file)
        pickles = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"is a zip with {len(pickles)} data.pkl; torch.save writes one")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "constants.pkl" in entries:
            raise ValueError("is a TorchScript program; save its state_dict() with torch.save")
        if folder + "byteorder" in entries:
            order = read_entry(file, entries[folder + "byteorder"], "byteorder")
            if order != b"little":
                raise ValueError(f"has byte order {order[:20]!r}; only b'little' is read")
        data = read_entry(file, entries[pickles[0]], "data.pkl")
        rebuilder = _Rebuilder(file, entries, folder + "data/")
        root = read_pickle(data, rebuilder.calls(), rebuilder.load_storage)
        return _Tree().copy(root, "", 0)
    except CheckpointError:
        raise
    except ValueError as error:
        raise file.error(str(error)) from None


@dataclass(frozen=True)
class _Rebuilder:
    """What the calls in a data.pkl mean.

    Args:
        file: The open file.
        entries: The entries of the zip.
        prefix: What stands before a storage's key in the name of its entry.
    """

    file: SourceFile
    entries: dict[str, Entry]
    prefix: str

    def calls(self) -> dict[str, Callable[..., object]]:
        """Returns the functions that are read, by the names that the pickle has for them."""
        return {
            **self.rebuilds(),
            "torch._tensor._rebuild_from_type_v2": self.from_type,
            "torch.Size": lambda sizes: sizes,
            "collections.OrderedDict": _ordered_dict,
        }

    def rebuilds(self) -> dict[str, Callable[..., object]]:
        """Returns the functions that rebuild a tensor from simple arguments."""
        return {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.untyped_tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        }

    def load_storage(self, reference: object) -> Storage | Inert:
        """Returns the storage that a persistent id refers to; Inert if of an unknown type."""
        match reference:
            case ("storage", Inert(name=kind), str(key), _, int(count)):
                pass
            case _:
                raise ValueError("a reference that is not to a storage")
        if kind not in _STORAGES:
            return Inert(kind + "()")
        entry, dtype = self.entries.get(self.prefix + key), _STORAGES[kind]
        if entry is None:
            raise ValueError(f"storage {quote(key)} is not in the file")
        if count != entry.size // dtype.itemsize:
            raise ValueError(
                f"storage {quote(key)} has {entry.size} bytes, not {count} times {dtype.itemsize}"
            )
        return Storage(entry.offset, entry.size, dtype)

    def tensor(
        self, storage: object, offset: object, shape: object, strides: object, *rest: object
    ) -> LazyTensor | Inert:
        """Returns a tensor that has its storage's dtype."""
        if not isinstance(storage, Storage):
            return Inert("torch.Tensor()")
        # requires_grad, hooks, and a mark that the values are to be negated or conjugated.
        if len(rest) > 2 and rest[2]:
            return Inert("torch.Tensor()")
        return self.view(storage, storage.dtype, offset, shape, strides)

    def untyped_tensor(
        self, storage: object, offset: object, shape: object, strides: object, *rest: object
    ) -> LazyTensor | Inert:
        """Returns a tensor that has a dtype of its own, after requires_grad and hooks."""
        dtype = _DTYPES.get(rest[2].name) if len(rest) > 2 and isinstance(rest[2], Inert) else None
        if not isinstance(storage, Storage) or dtype is None or (len(rest) > 3 and rest[3]):
            return Inert("torch.Tensor()")
        return self.view(storage, dtype, offset, shape, strides)

    def from_type(self, function: object, kind: object, args: object, *_: object) -> object:
        """Returns a tensor that had attributes; Inert if it is of a subclass of unknown meaning."""
        match function, kind, args:
            case Inert(name=name), Inert(name=type_name), tuple() if (
                name in self.rebuilds() and type_name in _TENSOR_TYPES
            ):
                return self.rebuilds()[name](*args)
        return Inert("torch.Tensor()")

    def view(
        self, storage: Storage, dtype: np.dtype, offset: object, shape: object, strides: object
    ) -> LazyTensor:
        """Returns the tensor that views a storage, offset and strides being in elements."""
        if not isinstance(shape, tuple | list) or not isinstance(strides, tuple | list):
            raise ValueError("a tensor without shape or strides")
        sizes = check_shape(shape, dtype)
        steps = tuple(s for s in strides if type(s) is int and 0 <= s < 2**63)
        if not len(sizes) == len(steps) == len(strides) or type(offset) is not int or offset < 0:
            raise ValueError(f"a tensor of shape {list(sizes)} has an impossible offset or stride")
        if (offset + span(sizes, steps)) * dtype.itemsize > storage.nbytes:
            raise ValueError(f"a tensor of shape {list(sizes)} reaches outside of its storage")
        in_order = all(
            n == 1 or step == math.prod(sizes[axis + 1 :])
            for axis, (n, step) in enumerate(zip(sizes, steps, strict=True))
        )
        start = storage.offset + offset * dtype.itemsize
        tensor = LazyTensor("", sizes, dtype, self.file, start, None if in_order else steps)
        if tensor.nbytes > self.file.size:  # by stride 0 a few bytes would fill the memory
            raise ValueError(f"a tensor of shape {list(sizes)} is larger than the whole file")
        return tensor


def _ordered_dict(*args: object) -> object:
    """Returns a plain dict; a list of pairs is what no version that writes zips has pickled."""
    if not args:
        return {}
    return args[0] if isinstance(args[0], dict) else Inert("collections.OrderedDict()")


class _Tree:
    """Copies an object that may share or contain its own parts into a finite tree."""

    def __init__(self) -> None:
        self.count = 0

    def copy(self, value: object, name: str, depth: int) -> object:
        """Returns the copy of `value`, whose tensors are named by the nearest key above them."""
        self.count += 1
        if self.count > MAX_OBJECTS or depth > MAX_DEPTH:
            raise ValueError(
                f"holds more than {MAX_OBJECTS} objects, or more than {MAX_DEPTH} in one another"
            )
        match value:
            case dict():
                return {
                    k: self.copy(v, k[:200] if isinstance(k, str) else name, depth + 1)
                    for k, v in value.items()
                }
            case list():
                return [self.copy(v, name, depth + 1) for v in value]
            case tuple():
                return tuple(self.copy(v, name, depth + 1) for v in value)
            case LazyTensor():
                return dataclasses.replace(value, name=name)
            case Storage():
                return Inert("torch.Storage()")
            case _:
                return value

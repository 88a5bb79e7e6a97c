"""A named tensor in an open file, whose values are read when they are asked for."""

from __future__ import annotations

import math
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MAX_DIMENSIONS = 32  # NumPy 1's limit; NumPy 2 has 64


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: one line that begins with the file's name as given.

    What is not printable in it is escaped, since names in a file may hold anything.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class SourceFile:
    """A regular file, open for reads at any offset from any thread.

    Plain reads, not a memory map: the pages of a map that were touched count as resident memory
    until it is closed, which for the largest model is 12 GB.

    Args:
        name: Path of the file, which begins every error message.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is a pipe, a device or anything else that is not a file.
    """

    def __init__(self, name: str):
        self.name = name
        try:
            status = os.stat(name)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{name}: no such file or folder") from None
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise self.error("is not a file")
        self._file = open(name, "rb", buffering=0)  # noqa: SIM115 (see `close`)
        self.size = os.fstat(self._file.fileno()).st_size
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the file; tensors in it can no longer be read."""
        self._file.close()

    def error(self, message: str) -> CheckpointError:
        """Returns the error that says `message` about this file."""
        return CheckpointError(f"{self.name}: {message}")

    def read(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, or raises CheckpointError if the file ends before."""
        if not 0 <= offset <= offset + size <= self.size:  # before anything is allocated
            raise self.error(f"has {self.size} bytes; {size} at {offset} are needed (truncated?)")
        values = np.empty(size, np.uint8)
        self.read_into(offset, values)
        return values.tobytes()

    def read_into(self, offset: int, array: np.ndarray) -> None:
        """Fills the contiguous `array` from `offset`; raises CheckpointError if the file ends."""
        left = array.reshape(-1).view(np.uint8).data
        with self._lock:
            self._file.seek(offset)
            while left:  # one read returns at most 2 GiB
                try:
                    count = self._file.readinto(left)
                except OSError as error:
                    raise self.error(f"cannot be read: {error.strerror}") from None
                if not count:
                    raise self.error(f"ended {len(left)} bytes early while it was read")
                left = left[count:]


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor in an open checkpoint, of known shape and dtype, whose values are not yet read.

    Args:
        name: Its name in the checkpoint, for messages.
        shape: Its shape.
        dtype: Its dtype; ml_dtypes' bfloat16 where the file has bfloat16.
        file: The open file.
        offset: Position of its first element in the file, in bytes.
        strides: Distance of neighbours along each axis, in elements; None in C order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: SourceFile = field(repr=False)
    offset: int = field(repr=False)
    strides: tuple[int, ...] | None = field(repr=False, default=None)

    @property
    def nbytes(self) -> int:
        """Size of the values in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Returns the values as a new array in C order; reads no byte outside of the tensor."""
        if self.strides is None:
            values = np.empty(self.shape, self.dtype)
            self.file.read_into(self.offset, values)
            return values
        run = np.empty(span(self.shape, self.strides), self.dtype)
        self.file.read_into(self.offset, run)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(run, self.shape, strides, writeable=False).copy()


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Returns how many elements lie from a strided tensor's first to its last, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def check_shape(shape: Sequence[object], dtype: np.dtype) -> tuple[int, ...]:
    """Returns `shape` as a tuple of ints, or raises ValueError if no array can have it."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read")
    sizes = tuple(n for n in shape if type(n) is int and 0 <= n < 2**63)
    if len(sizes) < len(shape):
        raise ValueError("a tensor's shape is not made of sizes")
    if math.prod(max(n, 1) for n in sizes) * dtype.itemsize >= 2**63:
        raise ValueError(f"a tensor has the impossible shape {list(sizes)}")
    return sizes


def quote(text: str) -> str:
    """Returns text from a file in a form that is safe in a message: short, ASCII, one line."""
    return ascii(text if len(text) <= 80 else text[:80] + "...")

"""Writes a model: `model.safetensors` + `config.json` for this library, or a .pth for PyTorch.

Arrays are written one at a time as they come. What is complete is moved into place; until then it
has another name beside its own, so that nobody ever sees half of it.
"""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS, SETTINGS = "model.safetensors", "config.json"
_UNFINISHED = ".unfinished"

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@contextmanager
def moved_when_done(out: Path) -> Iterator[Path]:
    """Gives a path beside `out` to write a file or folder to, and moves it to `out` at the end.

    After an error nothing is left. A process that was killed leaves what it had written under the
    other name; the next one to write `out` removes it.

    Raises:
        FileExistsError: `out` is a folder that was not written here.
    """
    if out.is_dir() and any(path.name not in (WEIGHTS, SETTINGS) for path in out.iterdir()):
        raise FileExistsError(f"{out}: is a folder with other files in it; choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.{socket.gethostname()}."
    for left in out.parent.glob(f"{glob.escape(prefix)}*{_UNFINISHED}"):
        if not _is_running(left.name.removeprefix(prefix).split(".")[0]):
            _remove(left)
    unfinished = out.parent / f"{prefix}{os.getpid()}{_UNFINISHED}"
    try:
        yield unfinished
        if out.is_dir():
            # One folder cannot replace another in one step; for a moment there is none.
            old = out.parent / f"{prefix}{os.getpid()}.old{_UNFINISHED}"
            out.rename(old)
            unfinished.rename(out)
            _remove(old)
        else:
            unfinished.replace(out)
    finally:
        _remove(unfinished)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError):
        return True  # not ours to remove
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_weights(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Makes `folder` and writes its `model.safetensors`.

    Args:
        folder: Made here.
        tensors: Shape and dtype of each array by name.
        arrays: In the order of `tensors`, of their shapes and dtypes.
    """
    # The safetensors library writes only what is in memory all at once.
    entries: dict[str, Any] = {"__metadata__": {"format": "flax"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        kind = _SAFETENSORS[dtype.name]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the folder's `config.json`."""
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

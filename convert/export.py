"""Writes a model as this library takes it: `model.safetensors` and `config.json`.

Arrays are written one at a time as they come. What is complete is moved into place; until then it
lies beside it under another name, so that nobody ever sees half of it.
"""

from __future__ import annotations

import glob
import json
import math
import os
import secrets
import shutil
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from convert.torch_writer import is_written_here
from internimage_jax.config import InternImageConfig
from internimage_jax.preprocess import Preprocessing

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "internimage_jax"  # `format` in the config.json of a converted folder
_UNFINISHED, _REPLACED = ".unfinished", ".replaced"

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@contextmanager
def moved_when_done(out: Path) -> Iterator[Path]:
    """Gives a path beside `out` to write a file or folder to, and moves it to `out` at the end.

    After an error nothing is left, and what was there before is there. A process that was killed
    leaves what it had written under the other name; the next one to write `out` removes it.

    Raises:
        FileExistsError: `out` is a folder or file that was not written here, or the current folder.
        OSError: It cannot be written; the error names `out`.
    """
    place = Path(os.path.realpath(out))  # of a link, what it points to is replaced
    if place.is_dir() and not _is_ours(place):
        raise FileExistsError(f"{out}: is a folder with other files in it; choose another name")
    if place.is_file() and not is_written_here(place):
        raise FileExistsError(f"{out}: is there, and was not written here; choose another name")
    if place.is_dir() and os.path.samefile(place, os.curdir):
        # To be replaced, and who is in it would be in a folder that is gone.
        raise FileExistsError(f"{out}: is the current folder; choose another name, or leave it")
    prefix = f".{place.name}.{socket.gethostname()}."
    _clean_up(place, prefix)
    start = f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    unfinished, replaced = place.with_name(start + _UNFINISHED), place.with_name(start + _REPLACED)
    new_parents = [folder for folder in place.parents if not folder.exists()]
    try:
        if new_parents:
            place.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        if place.is_dir():
            place.rename(replaced)  # one folder cannot replace another in one step
        unfinished.replace(place)
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(unfinished)):
            raise OSError(error.errno, error.strerror, str(out)) from None
        raise
    finally:
        if os.path.exists(replaced) and not place.exists():
            replaced.rename(place)
        _remove(replaced)
        _remove(unfinished)
        for folder in new_parents:
            with suppress(OSError):  # that it is not empty
                folder.rmdir()


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty, or a converted model without anything else in it."""
    names = {path.name for path in folder.iterdir()}
    if not names <= {WEIGHTS, CONFIG}:
        return False
    try:
        return not names or json.loads((folder / CONFIG).read_bytes())["format"] == FORMAT
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return False


def _clean_up(place: Path, prefix: str) -> None:
    """Removes what killed processes have left; what one was about to replace is put back."""
    for left in place.parent.glob(f"{glob.escape(prefix)}*-*"):
        if _is_running(left.name.removeprefix(prefix).split("-")[0]):
            continue
        if left.suffix == _REPLACED and not place.exists():
            left.rename(place)
        elif left.suffix in (_UNFINISHED, _REPLACED):
            _remove(left)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True  # not ours to remove
    return True


def _remove(path: Path) -> None:
    if os.path.isdir(path):  # False also where the name is too long
        try:
            shutil.rmtree(path)
        except BaseException:  # Ctrl-C: gigabytes take a while to remove
            shutil.rmtree(path, ignore_errors=True)
            raise
    elif os.path.exists(path):
        path.unlink()


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


def settings_of(
    name: str,
    dtype: np.dtype,
    config: InternImageConfig,
    preprocessing: Preprocessing,
    classes: Sequence[str] | None,
) -> dict[str, Any]:
    """What a converted folder's `config.json` says of the model."""
    settings = {
        "format": FORMAT,
        "format_version": 1,
        "model": name,
        "dtype": dtype.name,
        "config": config.to_dict(),
        "preprocessing": preprocessing.to_dict(),
    }
    return settings if classes is None else {**settings, "classes": list(classes)}


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the folder's `config.json`."""
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

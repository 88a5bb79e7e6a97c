"""Opens a checkpoint in any released layout, told apart by its content, never by its name.

A checkpoint is a file of torch.save, a .safetensors file, a Hugging Face index of shards of either,
or a folder with one of these. Nothing in it is executed, no tensor is read before it is asked for,
and torch is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.lazy_tensor import CheckpointError, LazyTensor, SourceFile, quote
from convert.safetensors_file import read_json, read_safetensors
from convert.torch_pickle import Inert
from convert.torch_tensors import read_torch_file

__all__ = ["Checkpoint", "CheckpointError", "Inert", "LazyTensor", "open_checkpoint"]

# What is read in a folder: the first that is there, in the order of the transformers library.
IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_RESAVE = "load it with torch and write it with torch.save of torch 1.6 or newer"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Args:
        tree: For safetensors, and for shards, name to `LazyTensor`; for a torch file, the saved
          object: dicts, lists, tuples, scalars, `LazyTensor` for each tensor, `Inert` for the rest.
        files: The files that were read, in a fixed order.
        format: "torch" or "safetensors".
    """

    tree: Any
    files: tuple[Path, ...]
    format: str


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Opens a checkpoint; its tensors can be read until the context ends.

    Args:
        path: A file, an index of shards, or a folder with one of `IN_FOLDER`.

    Returns:
        A context manager that gives the `Checkpoint`.

    Raises:
        FileNotFoundError: The file is missing, or the folder has no checkpoint.
        CheckpointError: The file is no checkpoint, truncated, damaged or hostile.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        present = [n for n in IN_FOLDER if os.path.lexists(os.path.join(name, n))]
        if not present:
            raise FileNotFoundError(f"{name}: the folder has none of {', '.join(IN_FOLDER)}")
        name = os.path.join(name, present[0])
    with ExitStack() as stack:
        file = _open(name, stack)
        yield _read_index(file, stack) if _kind(file) == "index" else _read_file(file)


def _open(name: str, stack: ExitStack) -> SourceFile:
    """Opens a file until the stack ends."""
    file = SourceFile(name)
    stack.callback(file.close)
    return file


def _kind(file: SourceFile) -> str:
    """Returns "torch", "safetensors" or "index" by a file's first bytes; else says what it is."""
    head = file.read(0, min(512, file.size))
    if head[:4] == b"PK\x03\x04":
        return "torch"
    if head[4:9] == b"\0\0\0\0{":  # a header's length, below 4 GiB, and its first character
        return "safetensors"
    if head[:1] == b"{":
        return "index"
    if not head:
        raise file.error("is empty")
    if head[:1] == b"\x80" or head[257:262] == b"ustar":
        # A pickle, or a tar of pickles: what torch.save wrote before 1.6, or never a checkpoint.
        raise file.error(f"is in a format older than torch 1.6, or a bare pickle: {_RESAVE}")
    if head.startswith(b"version https://git-lfs"):
        raise file.error("is a Git LFS pointer, not the file that it stands for: run git lfs pull")
    raise file.error(
        f"is no checkpoint: a torch.save, .safetensors or index file expected, got {head[:8]!r}..."
    )


def _read_file(file: SourceFile) -> Checkpoint:
    """Returns the checkpoint in a single file."""
    kind = _kind(file)
    if kind == "index":
        raise file.error("is an index of shards, where a shard is expected")
    tree = read_torch_file(file) if kind == "torch" else read_safetensors(file)
    return Checkpoint(tree, (Path(file.name),), kind)


def _read_index(index: SourceFile, stack: ExitStack) -> Checkpoint:
    """Returns the checkpoint whose tensors are in several files, named by an index."""
    folder = os.path.dirname(index.name)
    tree: dict[str, object] = {}
    files, formats = [Path(index.name)], set()
    for shard, names in _shards(index).items():
        path = os.path.join(folder, shard)
        if not os.path.isfile(path):
            raise index.error(f"names the shard {quote(shard)}, which is not in its folder")
        part = _read_file(_open(path, stack))
        if not isinstance(part.tree, dict):
            raise index.error(f"names the shard {quote(shard)}, which has no named tensors")
        found = {n for n, value in part.tree.items() if isinstance(value, LazyTensor)}
        for text, wrong in (
            ("lacks", names - found),
            ("has tensors that the index does not put there:", set(part.tree) - names),
        ):
            if wrong:
                some = ", ".join(quote(str(n)) for n in sorted(wrong, key=str)[:3])
                raise index.error(f"shard {quote(shard)} {text} {some} ({len(wrong)} in all)")
        tree |= part.tree
        files.append(Path(path))
        formats.add(part.format)
    if len(formats) != 1:
        raise index.error("names shards of different formats")
    return Checkpoint(tree, tuple(files), formats.pop())


def _shards(index: SourceFile) -> dict[str, set[str]]:
    """Returns an index's shards, sorted: plain file name to names of tensors."""
    weight_map = read_json(index, 0, index.size).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise index.error("is JSON without a weight_map: not an index of shards")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        # Plain names only, on every system: no folder, drive, parent, or hidden file.
        if not isinstance(shard, str) or not shard or set(shard) & set("/\\:\0") or shard[0] == ".":
            raise index.error(f"puts {quote(tensor)} into a file outside of its folder")
        shards.setdefault(shard, set()).add(tensor)
    return dict(sorted(shards.items()))

"""From a checkpoint to a converted folder, or back to a .pth."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from convert.check import FLOATS
from convert.export import moved_when_done, settings_of, write_settings, write_weights
from convert.head import with_classes
from convert.permute import torch_layout
from convert.rules import BATCH_COUNTER, Rule, rules
from convert.source import Source, Weights, check_named, open_source
from convert.torch_file import CheckpointError
from convert.torch_writer import write_torch
from internimage_jax.config import InternImageConfig

log = logging.getLogger("internimage_jax")

DTYPES = {dtype.name: dtype for dtype in FLOATS}


@contextmanager
def open_model(
    path: str | os.PathLike[str],
    *,
    model: str | InternImageConfig | None = None,
    weights: Weights = "model",
    num_classes: int | None = None,
    to_1k: bool = False,
) -> Iterator[Source]:
    """Opens a checkpoint, checked and with the head that was asked for; see `convert`."""
    with open_source(path, model=model, weights=weights) as source:
        if model is not None:
            check_named(source, model, any_classes=num_classes is not None)
        source = with_classes(source, num_classes, to_1k)
        for note in source.notes:
            log.warning("%s: %s", source.path, note)
        yield source


def read_arrays(source: Source, dtype: np.dtype) -> Iterator[tuple[Rule, np.ndarray]]:
    """Yields each array of the model in its Flax shape, in the order of `rules`.

    Raises:
        CheckpointError: A value is not finite, or does not fit `dtype`.
    """
    for rule in rules(source.config):
        array, wanted = source.read(rule), dtype_of(rule, dtype)
        if array.dtype != wanted:
            with np.errstate(over="ignore"):
                array = array.astype(wanted)
            if not np.isfinite(array).all():
                raise CheckpointError(
                    f"{source.path}: {rule.flax} has values too large for {dtype}"
                )
        yield rule, array


def dtype_of(rule: Rule, dtype: np.dtype) -> np.dtype:
    """The dtype of an array in a model of `dtype`: BatchNorm statistics are at least float32."""
    if rule.flax.endswith((".mean", ".var")) and dtype.itemsize < 4:
        return np.dtype(np.float32)
    return dtype


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | InternImageConfig | None = None,
    weights: Weights = "model",
    dtype: str = "float32",
    num_classes: int | None = None,
    to_1k: bool = False,
    to_torch: bool = False,
) -> Path:
    """Converts a checkpoint of any layout to a folder of this library, or to a .pth.

    Every tensor of the checkpoint is used once and every parameter filled once, or nothing is
    written. What was done besides, such as a new head, is logged and kept in config.json.

    Args:
        source: A file, an index of shards, or a folder: a released .pth, a training run's, a
            detector's or segmenter's, a Hugging Face folder, or a converted one.
        out: The folder to write, or with `to_torch` the file; replaces what was written before,
            and nothing else.
        model: Which model it is: a released name, the path of a config.json, or a config. Needed
            where neither a config.json nor the file's name says it.
        weights: "model", or "ema" for the moving average that a training run keeps.
        dtype: Of the arrays written: float32, bfloat16, float16 or float64.
        num_classes: Classes wanted. A head of another size is replaced by a new one; 0 leaves out
            the head.
        to_1k: Takes the ImageNet-1K classes out of a head of 21,841, by the released map.
        to_torch: Writes a .pth that the official code loads.

    Returns:
        The path of `out`.

    Raises:
        FileNotFoundError, FileExistsError: A path is not what it has to be.
        ValueError: The checkpoint is damaged or not of that model; one line that says why.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if to_torch and out.exists() and not out.is_file():
        raise FileExistsError(f"{out}: is no file; a .pth is one")
    if not to_torch and out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: is a file; the converted model is a folder")
    heads = {"num_classes": num_classes, "to_1k": to_1k}
    with open_model(source, model=model, weights=weights, **heads) as opened:
        for path in (opened.path, *opened.files):
            real = Path(os.path.realpath(path))
            if Path(os.path.realpath(out)) in (real, *real.parents):
                raise FileExistsError(f"{out}: is the source or holds it; choose another name")
        with moved_when_done(out) as unfinished:
            if to_torch:
                _write_torch(unfinished, opened, DTYPES[dtype])
            else:
                _write_folder(unfinished, opened, DTYPES[dtype], weights)
    return out


def _write_folder(folder: Path, source: Source, dtype: np.dtype, weights: Weights) -> None:
    tensors = {r.flax: (r.flax_shape, dtype_of(r, dtype)) for r in rules(source.config)}
    settings = settings_of(source.name, dtype, source.config, source.preprocessing, source.classes)
    settings["source"] = {"layout": source.layout, "weights": weights, "files": []}
    settings["notes"] = list(source.notes)
    stop = threading.Event()
    # Hashing takes about as long as the rest, on a core of its own.
    with ThreadPoolExecutor(1) as pool:
        digests = [pool.submit(_sha256, path, stop) for path in source.files]
        try:
            write_weights(folder, tensors, (array for _, array in read_arrays(source, dtype)))
            settings["source"]["files"] = [
                {"name": path.name, "sha256": digest.result()}
                for path, digest in zip(source.files, digests, strict=True)
            ]
        finally:
            stop.set()  # after an error there is nothing to wait for
    write_settings(folder, settings)


def _sha256(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while not stop.is_set() and (chunk := file.read(2**20)):
            digest.update(chunk)
    return digest.hexdigest()


def _write_torch(path: Path, source: Source, dtype: np.dtype) -> None:
    tensors: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for rule in rules(source.config):
        tensors[rule.torch] = rule.torch_shape, dtype_of(rule, dtype)
        if rule.torch.endswith("running_var"):
            counter = rule.torch.removesuffix("running_var") + BATCH_COUNTER
            tensors[counter] = (), np.dtype(np.int64)

    def arrays() -> Iterator[np.ndarray]:
        for rule, array in read_arrays(source, dtype):
            yield torch_layout(array, rule.axes, rule.torch_shape)
            if rule.torch.endswith("running_var"):
                yield np.zeros((), np.int64)

    write_torch(path, tensors, arrays())

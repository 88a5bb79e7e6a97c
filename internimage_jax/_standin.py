"""A stand-in for the readers: class folders only."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from internimage_jax.labels import wnid_to_index
from internimage_jax.preprocess import preprocess


@dataclass(frozen=True)
class Dataset:
    source: str
    kind: str
    names: Sequence[str]
    labels: Sequence[tuple[int, ...]]
    classes: tuple[int, ...] | None
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        with open(os.path.join(self.source, self.names[i]), "rb") as f:
            return f.read()


def open_dataset(path, *, labels=None) -> Dataset:
    names, found = [], []
    for folder in sorted(os.listdir(path)):
        for name in sorted(os.listdir(os.path.join(path, folder))):
            names.append(f"{folder}/{name}")
            found.append((wnid_to_index()[folder],))
    return Dataset(str(path), "class folders", names, found, None, ())


class Batch(NamedTuple):
    pixels: np.ndarray
    indices: np.ndarray
    failed: tuple[tuple[int, str], ...]


def load_batches(
    dataset, preprocessing, indices, *, batch_size, workers=None, on_error="fail"
) -> Iterator[Batch]:
    side = preprocessing.image_size
    with ThreadPoolExecutor(2) as pool:

        def one(i):
            try:
                return preprocess(dataset.read(i), preprocessing, dataset.names[i])
            except ValueError as error:
                if on_error == "fail":
                    raise
                return str(error)

        def empty():
            return np.zeros((batch_size, side, side, 3), np.uint8), np.full(batch_size, -1, np.int64)

        pixels, numbers = empty()
        row, failed = 0, []
        for i, got in zip(indices, pool.map(one, indices)):
            if isinstance(got, str):
                failed.append((int(i), got))
                continue
            pixels[row], numbers[row] = got, i
            row += 1
            if row == batch_size:
                yield Batch(pixels, numbers, tuple(failed))
                pixels, numbers = empty()
                row, failed = 0, []
        if row or failed:
            yield Batch(pixels, numbers, tuple(failed))

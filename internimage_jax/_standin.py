"""A stand-in for the readers: class folders only."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from internimage_jax.labels import wnid_to_index


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

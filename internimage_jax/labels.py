"""Class names of ImageNet-1K, and where its classes stand among those of ImageNet-22K."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from types import MappingProxyType

import numpy as np

from internimage_jax.config import NUM_CLASSES_1K, NUM_CLASSES_22K

# "teddy" is not in ImageNet-22K; the released map repeats the index of 849, "teapot", for it.
CLASSES_WITHOUT_22K = frozenset({850})


@dataclass(frozen=True, slots=True)
class ImageClass:
    """A class: its index in the model's output, its WordNet id (None if unknown), and its name."""

    index: int
    wnid: str | None
    name: str


@functools.cache
def imagenet1k_classes() -> tuple[ImageClass, ...]:
    """Returns the 1000 classes of ImageNet-1K in the order of the models' outputs.

    Raises:
        ValueError: The package's table is damaged.
    """
    return _parse_classes(_read("imagenet1k_classes.tsv"), "imagenet1k_classes.tsv")


@functools.cache
def wnid_to_index() -> Mapping[str, int]:
    """Returns the ImageNet-1K class index of each WordNet id, such as "n01440764"."""
    return MappingProxyType({one.wnid: one.index for one in imagenet1k_classes() if one.wnid})


@functools.cache
def map_22k_to_1k() -> np.ndarray:
    """Returns the ImageNet-22K class index of each ImageNet-1K class.

    Returns:
        int32 (1000,), read-only: `logits_22k[..., map_22k_to_1k()]` are the logits of the 1000
        classes. Those of `CLASSES_WITHOUT_22K` are another class's and have to be masked.

    Raises:
        ValueError: The package's table is damaged.

    Source: map22kto1k.txt of the released InternImage.
    """
    return _parse_map(_read("map22kto1k.txt"), "map22kto1k.txt")


@functools.cache
def ilsvrc2012_wnids() -> tuple[str, ...]:
    """Returns the WordNet id of each ILSVRC2012 id: the first is that of id 1, "n02119789".

    The devkit's ground truth counts classes so, in an order of its own.

    Raises:
        ValueError: The package's table is damaged.

    Source: meta.mat of the ILSVRC2012 devkit.
    """
    wnids = _parse_wnids(_read("ilsvrc2012_ids.txt"), "ilsvrc2012_ids.txt", NUM_CLASSES_1K)
    return tuple(wnids)


@functools.cache
def class_subsets() -> Mapping[str, tuple[int, ...]]:
    """Returns the class indices, rising, of the data sets that have 200 of the 1000 classes.

    Their published evaluation compares the logits of these classes only.

    Raises:
        ValueError: The package's table is damaged.

    Source: Hendrycks et al., Natural Adversarial Examples (CVPR 2021); The Many Faces of
    Robustness (ICCV 2021).
    """
    subsets = {}
    for name, file in (("A", "imagenet_a_classes.txt"), ("R", "imagenet_r_classes.txt")):
        wnids = _parse_wnids(_read(file), file, 200)
        subsets[f"ImageNet-{name}"] = tuple(sorted(wnid_to_index()[wnid] for wnid in wnids))
    return MappingProxyType(subsets)


def own_names(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """Returns the names of classes where they are not ImageNet's."""
    if classes is None:
        return None
    if len(classes) in (NUM_CLASSES_1K, NUM_CLASSES_22K):
        pairs = zip(class_names(len(classes)), classes, strict=True)
        if all(one.wnid is None or one.name == name for one, name in pairs):
            return None
    return tuple(classes)


def own_classes(
    name: str, num_classes: int, classes: Sequence[str] | None
) -> tuple[str, ...] | None:
    """Returns the names of a model's classes where they are its own, None where ImageNet's.

    Args:
        name: Of the model.
        num_classes: How many it has.
        classes: Their names, if it has any.

    Raises:
        ValueError: It cannot be said which classes they are.
    """
    if classes is None and num_classes not in (NUM_CLASSES_1K, NUM_CLASSES_22K):
        raise ValueError(
            f"{name}: has {num_classes} classes without names, expected {NUM_CLASSES_1K} "
            f"(ImageNet-1K), {NUM_CLASSES_22K} (ImageNet-22K) or names (`classes` of "
            "from_pretrained; save_pretrained keeps them), which labels can be compared with"
        )
    return own_names(classes)


@dataclass(frozen=True)
class LabelClasses:
    """The classes that labels stand for: ImageNet-1K's, or a model's own.

    Args:
        names: Of a model's own classes, in the order of its outputs; None for ImageNet-1K's.
    """

    names: tuple[str, ...] | None = None

    @property
    def count(self) -> int:
        return NUM_CLASSES_1K if self.names is None else len(self.names)

    @property
    def expected(self) -> str:
        """What a label has to be, in words."""
        if self.names is None:
            return f"WordNet ids such as n01440764, or numbers from 0 to {self.count - 1}"
        shown = f"the model's, such as {self.names[0]!r}"
        if self.has_indices:
            shown += f", or numbers from 0 to {self.count - 1}"
        repeated = next((n for n, count in Counter(self.names).items() if count > 1), None)
        return shown + (f" ({repeated!r} is several classes)" if repeated is not None else "")

    @functools.cached_property
    def has_indices(self) -> bool:
        """Whether labels may be indices: not where a name is a number, which would be in doubt."""
        return self.names is None or not any(map(_is_number, self.names))

    def named(self, text: str) -> int | None:
        """The class of that name, None for other text.

        Names are ImageNet-1K's WordNet ids, or those of the model's own classes, in which "_" may
        stand for a blank. The name of several classes is none.
        """
        return self._indices.get(unicodedata.normalize("NFC", text))

    def parse(self, text: str) -> int | None:
        """The class that a name or an index stands for, None for other text."""
        if (index := self.named(text)) is not None:
            return index
        number = int(text) if self.has_indices and _is_number(text) else -1
        return number if 0 <= number < self.count else None

    @functools.cached_property
    def _indices(self) -> Mapping[str, int]:
        if self.names is None:
            return wnid_to_index()
        composed = [unicodedata.normalize("NFC", name) for name in self.names]
        return _of_one([name.replace(" ", "_") for name in composed]) | _of_one(composed)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,8}", text) is not None


def _of_one(names: Sequence[str]) -> dict[str, int]:
    """The index of each name that is there once."""
    counts = Counter(names)
    return {name: i for i, name in enumerate(names) if counts[name] == 1}


@functools.lru_cache(maxsize=4)
def class_names(num_classes: int) -> tuple[ImageClass, ...]:
    """Returns a class for each output of a model.

    Args:
        num_classes: 1000 gives ImageNet-1K's classes. 21841 gives ImageNet-22K's, of which only
            those 999 are named that ImageNet-1K has too. Any other count gives numbers only:
            "class 7".

    Raises:
        ValueError: The count is negative.
    """
    if num_classes < 0:
        raise ValueError(f"num_classes: got {num_classes}, expected 0 or more")
    if num_classes == NUM_CLASSES_1K:
        return imagenet1k_classes()
    known: dict[int, ImageClass] = {}
    if num_classes == NUM_CLASSES_22K:
        known = {
            int(index): replace(one, index=int(index))
            for index, one in zip(map_22k_to_1k(), imagenet1k_classes(), strict=True)
            if one.index not in CLASSES_WITHOUT_22K
        }
    return tuple(known.get(i) or ImageClass(i, None, f"class {i}") for i in range(num_classes))


def checked_names(classes: Sequence[str], num_classes: int | None = None) -> tuple[str, ...]:
    """Returns names of a model's classes, of which there are `num_classes`, as a tuple.

    Raises:
        ValueError: They are no sequence of str, none, or not as many.
    """
    if not isinstance(classes, Sequence) or isinstance(classes, str):
        raise ValueError(f"classes: expected a list of names, got a {type(classes).__name__}")
    odd = [name for name in classes if not isinstance(name, str) or not name.strip()]
    if odd:
        raise ValueError(f"classes: expected a list of names, got {odd[0]!r}")
    if not classes:
        raise ValueError("classes: expected at least one name, got none")
    if num_classes is not None and len(classes) != num_classes:
        raise ValueError(f"classes: expected {num_classes} names, got {len(classes)}")
    return tuple(classes)


def _parse_classes(text: str, name: str) -> tuple[ImageClass, ...]:
    """Reads lines of index, WordNet id and name between tabs; errors call the table `name`."""
    header, *lines = text.splitlines() or [""]
    if header != "index\twnid\tname":
        raise ValueError(f"{name}, line 1: got {header!r}, expected 'index\\twnid\\tname'")
    if len(lines) != NUM_CLASSES_1K:
        raise ValueError(f"{name}: {len(lines)} classes, expected {NUM_CLASSES_1K}")
    classes: dict[str, ImageClass] = {}
    for index, line in enumerate(lines):
        match = re.fullmatch(r"(\d+)\t(n\d{8})\t(\S(?:[^\t]*\S)?)", line)
        if match is None or match[1] != str(index):
            raise ValueError(
                f"{name}, line {index + 2}: got {line!r}, expected {index}, a WordNet id and a name"
            )
        wnid, class_name = match[2], match[3]
        if wnid in classes:
            raise ValueError(
                f"{name}, line {index + 2}: {wnid} is also the id of {classes[wnid].index}"
            )
        classes[wnid] = ImageClass(index, wnid, class_name)
    return tuple(classes.values())


def _parse_map(text: str, name: str) -> np.ndarray:
    """Reads the ImageNet-22K index of each ImageNet-1K class; errors call the map `name`."""
    lines = text.split()
    if len(lines) != NUM_CLASSES_1K:
        raise ValueError(f"{name}: {len(lines)} indices, expected {NUM_CLASSES_1K}")
    last = -1
    for number, line in enumerate(lines):
        # Both lists are sorted by WordNet id, so the indices rise.
        low = last if number in CLASSES_WITHOUT_22K else last + 1
        if not re.fullmatch("[0-9]+", line) or not low <= int(line) < NUM_CLASSES_22K:
            raise ValueError(
                f"{name}, line {number + 1}: got {line!r}, expected an index from {low} to "
                f"{NUM_CLASSES_22K - 1}"
            )
        last = int(line)
    indices = np.array(lines, dtype=np.int32)
    indices.setflags(write=False)
    return indices


def _parse_wnids(text: str, name: str, count: int) -> list[str]:
    """Reads WordNet ids of ImageNet-1K, one a line, none twice; errors call the table `name`."""
    wnids = text.split()
    if len(wnids) != count or len(set(wnids)) != count or not set(wnids) <= set(wnid_to_index()):
        raise ValueError(f"{name}: expected {count} different WordNet ids of ImageNet-1K")
    return wnids


def _read(name: str) -> str:
    return (resources.files("internimage_jax") / "data_files" / name).read_text("utf-8")

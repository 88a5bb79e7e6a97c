"""Files that say which class an image has, in the forms that go round for ImageNet's validation."""

from __future__ import annotations

import csv
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from internimage_jax.config import NUM_CLASSES_1K
from internimage_jax.data_sources import DataError, one_line_errors
from internimage_jax.image_files import IMAGE_SUFFIXES
from internimage_jax.labels import LabelClasses, ilsvrc2012_wnids, wnid_to_index
from internimage_jax.messages import listing, printable

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT = "ILSVRC2012_devkit_t12"
# Where a label file is looked for, the first that is there. {} is the images' folder or archive.
USUAL_NAMES = (
    *("{}_map.txt", "{}.txt", "{}.csv", "val_map.txt", "val.txt", "val.csv", "labels.csv"),
    *("LOC_val_solution.csv", "meta/val.txt", "meta_data/val.txt"),
    *(GROUND_TRUTH, DEVKIT, f"{DEVKIT}.tar.gz", f"{DEVKIT}.tar"),
)
MAX_DEVKIT_FILE = 2**25


class Labels(NamedTuple):
    """What a label file says.

    Args:
        file: Its path.
        classes: By image, named without folder for ILSVRC2012's, else without suffix: the classes
            that count as right. None at all in ReaL's file means that the image is left out.
        is_real: It is the file of the ReaL labels.
    """

    file: str
    classes: dict[str, tuple[int, ...]]
    is_real: bool = False


def is_wnid(text: str) -> bool:
    """Whether the text has the form of a WordNet id, of whatever class."""
    return re.fullmatch(r"n\d{8}", text, re.ASCII) is not None


def find_labels(folders: Iterable[str], name: str) -> str | None:
    """Returns the first label file with a usual name in `folders`, None if there is none.

    Args:
        folders: Looked at in this order.
        name: Of the images' folder or archive, without its suffix.
    """
    candidates = dict.fromkeys(usual.format(name) for usual in USUAL_NAMES)
    for folder in folders:
        for candidate in candidates:
            path = os.path.join(folder, candidate)
            if os.path.isfile(path) or (candidate == DEVKIT and os.path.isdir(path)):
                return path
    return None


def read_labels(path: str, known: LabelClasses) -> Labels:
    """Reads a label file, told apart by its content.

    Args:
        path: A text file of names and classes (separated by tab, comma or blank; classes by name or
            index); of ImageNet-1K's classes also Kaggle's LOC_val_solution.csv; the devkit (folder,
            tar or tar.gz) or its ground truth; a WordNet id a line; real.json.
        known: The classes that it may name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of these, or has a class that is none or an image twice.
    """
    if os.path.isdir(path):
        path = next(
            (
                inner
                for inner in (os.path.join(path, *part, GROUND_TRUTH) for part in ((), ("data",)))
                if os.path.isfile(inner)
            ),
            os.path.join(path, "data", GROUND_TRUTH),
        )
    with one_line_errors(path, "label"), open(path, "rb") as file:
        start = file.read(512)
        is_tar = start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar"
        content = b"" if is_tar else start + file.read()
    if is_tar and known.names is None:
        return _devkit(path)
    text = None if is_tar else _decoded(content)
    if text is None:
        raise DataError(f"{printable(path)}: not a text file, expected labels")
    if text.lstrip()[:1] == "[" and known.names is None:
        return _real(path, text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{printable(path)}: empty, expected labels")
    one_a_line = all(re.fullmatch(r"\S+", line) and "," not in line for line in lines)
    if one_a_line and known.names is None:
        return _ground_truth(path, lines)
    return _names_and_classes(path, lines, known)


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def assign(labels: Labels, paths: Sequence[str], source: str) -> list[tuple[int, ...]]:
    """Returns the classes of each image, in the order of `paths`.

    Args:
        labels: Of all images.
        paths: Of the images.
        source: What errors call the images.

    Raises:
        ValueError: An image has no label, or a label no image; of ReaL's, the latter is no error.
    """
    keys = [_key(path) for path in paths]
    positions: dict[str, int] = {}
    bare: dict[str, int] = {}  # without folders; -1 where that is not unique
    for i, key in enumerate(keys):
        if key in positions:
            both = {paths[positions[key]], paths[i]}
            raise DataError(f"{source}: one label for {listing('image', both)}")
        positions[key] = i
        base = posixpath.basename(key)
        bare[base] = -1 if base in bare else i
    found: list[tuple[int, ...] | None] = [None] * len(paths)
    missing = []
    for name, classes in labels.classes.items():
        i = positions.get(name, bare.get(posixpath.basename(name), -1))
        if i < 0 or found[i] is not None:
            missing.append(name)
        else:
            found[i] = classes
    file = printable(labels.file)
    unlabelled = [path for path, classes in zip(paths, found, strict=True) if classes is None]
    if unlabelled:
        raise DataError(f"{file}: no label for {listing('image', unlabelled)} of {source}")
    if missing and not labels.is_real:
        raise DataError(f"{file}: {source} does not have {listing('image', missing)}")
    return [classes for classes in found if classes is not None]


def _key(path: str) -> str:
    """What an image is called in `Labels`."""
    # Hugging Face appends the WordNet id, and some convert the images to another format.
    if match := re.search(r"ILSVRC2012_val_\d{8}", posixpath.basename(path)):
        return match[0]
    path = re.sub(r"^[^/]*\.zip@/?", "", path)  # as maps for zip files in Swin's style may have it
    path = path.removeprefix("./").lstrip("/")
    stem, suffix = posixpath.splitext(path)
    return stem if suffix.lower() in IMAGE_SUFFIXES else path


def _numbered(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}"


def _names_and_classes(path: str, lines: list[str], known: LabelClasses) -> Labels:
    classes: dict[str, tuple[int, ...]] = {}
    wrong, twice = [], []
    for number, (name, *labels) in enumerate(_fields(lines), 1):
        if known.names is None:
            labels = labels[0].split()[:1]  # of Kaggle's labels with boxes, the first one's
        # A class's name may have commas.
        whole, label = ",".join(labels).strip(), (*labels, "")[0].strip()
        index = known.parse(whole)
        if index is None:
            index = known.parse(label)
        is_image = name.lower().endswith(IMAGE_SUFFIXES)
        is_header = number == 1 and not is_image and not re.fullmatch(r"n\d{8}|-?\d+", label)
        if index is None:
            if not is_header or len(lines) == 1:
                wrong.append(f"line {number}: {label or name}")
            continue
        key = _key(name)
        if key in classes:
            twice.append(name)
        classes[key] = (index,)
    if wrong:
        _raise_unmapped(path, wrong, f"an image's name and its class: {known.expected}")
    if twice:
        raise DataError(f"{printable(path)}: several labels for {listing('image', twice)}")
    return Labels(path, classes)


def _fields(lines: list[str]) -> Iterator[list[str]]:
    """Yields name, label and what else there is of each line."""
    if "\t" in lines[0]:
        rows: Iterable[list[str]] = (line.split("\t", 1) for line in lines)
    elif "," in lines[0]:
        rows = map(_comma_separated, lines)
    else:
        rows = (line.rsplit(None, 1) for line in lines)
    for row in rows:
        name, *rest = row or [""]
        yield [name.strip(), *(rest or [""])]


def _comma_separated(line: str) -> list[str]:
    """A line's fields. By itself, since a quote that is not closed takes in all that follows."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # a field of more than 128 KB
        return [line]


def _ground_truth(path: str, lines: list[str]) -> Labels:
    """Reads a class a line: a WordNet id, or ILSVRC2012's own number of it, which is no index."""
    wnids = dict(enumerate(ilsvrc2012_wnids(), 1))
    classes = {}
    wrong = []
    for number, line in enumerate(lines, 1):
        wnid = wnids.get(int(line), "") if re.fullmatch("[0-9]{1,8}", line) else line
        index = wnid_to_index().get(wnid)
        if index is None:
            wrong.append(f"line {number}: {line}")
        else:
            classes[_numbered(number)] = (index,)
    if wrong:
        _raise_unmapped(path, wrong, "an ILSVRC2012 id from 1 to 1000 or a WordNet id")
    return Labels(path, classes)


def _devkit(path: str) -> Labels:
    """Reads the ground truth in the devkit's tar or tar.gz."""
    content: bytes | None = None
    with one_line_errors(path, "tar"), tarfile.open(path, "r:*") as tar:
        for member in tar:
            if posixpath.basename(member.name) == GROUND_TRUTH and member.isreg():
                if member.size > MAX_DEVKIT_FILE:
                    raise DataError(f"{printable(path)}: {GROUND_TRUTH} has {member.size} bytes")
                file = tar.extractfile(member)
                assert file is not None  # for plain files it never is
                content = file.read()
    if content is None:
        raise DataError(f"{printable(path)}: holds no {GROUND_TRUTH}, expected ILSVRC2012's devkit")
    return _ground_truth(path, content.decode("ascii", "replace").split())


def _real(path: str, text: str) -> Labels:
    """Reads ReaL's file: a list of classes for each image of the validation set.

    Source: Beyer et al., Are we done with ImageNet? (2020).
    """
    try:
        lists = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{printable(path)}: damaged JSON, expected lists of classes") from None
    classes = {}
    wrong = []
    for number, one in enumerate(lists, 1):
        indices = one if isinstance(one, list) else [None]
        if all(type(i) is int and 0 <= i < NUM_CLASSES_1K for i in indices):
            classes[_numbered(number)] = tuple(indices)
        else:
            wrong.append(f"image {number}: {one!r}")
    if wrong:
        _raise_unmapped(path, wrong, "lists of classes from 0 to 999")
    return Labels(path, classes, is_real=True)


def _raise_unmapped(path: str, wrong: list[str], expected: str) -> None:
    shown = "; ".join(printable(text[:80]) for text in wrong[:5])
    more = f" ... ({len(wrong)} in all)" if len(wrong) > 5 else ""
    raise DataError(f"{printable(path)}: no class: {shown}{more}; expected {expected}")

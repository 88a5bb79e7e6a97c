"""ImageNet and its relatives, in whatever form they lie: recognised, labelled, read in place.

Classes come from names (WordNet ids, numbered folders, label files, a model's own classes), never
from the order of what happens to be there. What cannot be mapped to a class is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from internimage_jax.data_labels import (
    USUAL_NAMES,
    Labels,
    assign,
    find_labels,
    is_wnid,
    read_labels,
)
from internimage_jax.data_sources import (
    DataError,
    FolderSource,
    ParquetSource,
    Source,
    TarSource,
    ZipSource,
    is_hidden,
    is_image,
)
from internimage_jax.image_files import IMAGE_SUFFIXES
from internimage_jax.labels import LabelClasses, checked_names, class_subsets, own_names
from internimage_jax.messages import listing, one_line, printable

# Of a folder with several splits, the one that is evaluated; and where Kaggle's archive has it.
EVALUATED = ("val", "validation", "ILSVRC2012_img_val", "Data", "CLS-LOC")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with their labels, read one by one; nothing is unpacked to disk.

    Args:
        source: The path as given.
        kind: What it was recognised as, in words.
        names: The name of each image, printable and unique, in the order of the images: sorted by
            path, or as stored in the shards of a WebDataset or of parquet files.
        labels: For each image, the classes that count as right: one, except with ReaL.
        classes: The classes that logits are to be restricted to; None for all.
        notes: What else a report should say, a sentence each.
        container: Where the images lie.
        positions: The position of each image in the container.
        class_names: Names of the classes that `labels` index; None for the 1000 of ImageNet-1K.
    """

    source: str
    kind: str
    names: Sequence[str] = field(repr=False)
    labels: Sequence[tuple[int, ...]] = field(repr=False)
    classes: tuple[int, ...] | None = field(repr=False)
    notes: tuple[str, ...]
    container: Source = field(repr=False)
    positions: Sequence[int] = field(repr=False)
    class_names: tuple[str, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """Returns image `i` as it is encoded. Safe to call from several threads.

        Raises ValueError or FileNotFoundError, with one line that names the image.
        """
        try:
            return self.container.read(self.positions[i])
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.names[i]}: no such file") from None
        except Exception as error:  # of zipfile, zlib, pyarrow or the system
            reason = getattr(error, "strerror", None) or one_line(error)
            raise ValueError(f"{self.names[i]}: cannot be read ({reason})") from error


def open_dataset(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Recognises a data set by its content and finds the class of each image.

    Args:
        path: A folder of class folders, of images, of tars or of parquet files; a tar, zip or
            parquet file; or a folder with one of these inside. See docs/data.md.
        labels: A label file, the ILSVRC2012 devkit or ReaL's real.json, used instead of what is
            found.
        class_names: Names of a model's own classes; labels and folders are these names or indices
            into them. None for ImageNet-1K's.

    Raises:
        ValueError: There are no images, an image has no class, a label no image, or a file is
            damaged. The message names it, in one line.
        FileNotFoundError: `path` or `labels` does not exist.
    """
    path = os.fsdecode(path)
    for needed in [path] if labels is None else [path, os.fsdecode(labels)]:
        if not os.path.exists(needed):
            raise FileNotFoundError(f"{printable(needed)}: no such file or folder")
    known = LabelClasses(None if class_names is None else own_names(checked_names(class_names)))
    place = _locate(path, known)
    source = _open(place, known)
    positions, names, notes = _without_splits(source, known)
    notes = [*place.notes, *notes]
    shown = printable(path)
    if not positions:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise DataError(f"{printable(place.paths[0])}: no images; looked for {suffixes}")

    kind = _kind_of(source, set(map(_folder_of, names)), known)
    given = None if labels is None else read_labels(os.fsdecode(labels), known)
    if given is None and source.labels is None and not any("/" in name for name in names):
        given = _found_beside(place, shown, known)
    if given is None:
        classes = _own_classes(source, positions, names, shown, known)
    else:
        classes = assign(given, names, shown)
        notes.append(f"labels from {printable(given.file)}")
    if given is not None and given.is_real:
        kept = [i for i, one in enumerate(classes) if one]
        notes += _real_notes(given, len(names), len(kept), shown)
        positions = [positions[i] for i in kept]
        names = [names[i] for i in kept]
        classes = [classes[i] for i in kept]
    subset = _subset(classes) if known.names is None else None
    if subset:
        notes.append(f"the 200 classes of {subset}: logits are restricted to them")
    return Dataset(
        source=path,
        kind=kind,
        names=[printable(name) for name in names],
        labels=classes,
        classes=class_subsets()[subset] if subset else None,
        notes=tuple(notes),
        container=source,
        positions=positions,
        class_names=known.names,
    )


def _folder_of(name: str) -> str:
    """The class folder of an image; "" for one in none."""
    return name.split("/")[0] if "/" in name else ""


def _own_classes(
    source: Source, positions: list[int], names: list[str], shown: str, known: LabelClasses
) -> list[tuple[int, ...]]:
    """The classes of images that the data set says itself, by its labels or by folders."""
    if source.labels is not None:
        own = [source.labels[i] for i in positions]
        return _mapped(own, names, shown, "label", known)
    if known.names is not None:
        _check_one_level(names, shown, known)
    return _mapped(list(map(_folder_of, names)), names, shown, "folder", known)


def _real_notes(given: Labels, images: int, labelled: int, shown: str) -> list[str]:
    """What is to be said of ReaL's labels, which not all images have."""
    if labelled == 0:
        raise DataError(f"{printable(given.file)}: no image of {shown} has a label")
    notes = [f"ReaL labels: {images - labelled} of {images} images have none"]
    if missing := len(given.classes) - images:
        notes.append(f"ReaL labels: {missing} of {len(given.classes)} images are not here")
    return notes


class _Place(NamedTuple):
    """Where a data set is: one folder, or archives; and the folders to look for labels in."""

    paths: list[str]
    kind: str
    folders: list[str]
    notes: list[str]


def _locate(path: str, known: LabelClasses) -> _Place:
    """Follows a folder to where the images are."""
    if not os.path.isdir(path):
        return _Place([path], _kind(path), [_parent(path)], [])
    folders, notes = [path], []
    while True:
        here = folders[0]
        entries = sorted(name for name in os.listdir(here) if not is_hidden(name))
        inner = [name for name in entries if os.path.isdir(os.path.join(here, name))]
        files = [name for name in entries if name not in set(inner)]
        has_images = any(map(is_image, files))
        chosen = _evaluated_folder(inner, has_images, known, alone=False)
        archives = [name for name in files if _kind_by_name(name)]
        classes_here = any(known.parse(name) is not None for name in inner)
        if chosen is None and archives and not has_images and not classes_here:
            names, others = _evaluated_archives(archives)
            if others:
                notes.append(f"{listing('file', names)} read, not {listing('file', others)}")
            paths = [os.path.join(here, name) for name in names]
            kinds = {_kind(one) for one in paths}
            if len(kinds) > 1 or (len(paths) > 1 and kinds == {"zip"}):
                raise DataError(
                    f"{printable(here)}: {listing('archive', names)}, expected a single one, or "
                    "only tars or only parquet files"
                )
            return _Place(paths, kinds.pop(), folders, notes)
        chosen = chosen or _evaluated_folder(inner, has_images, known, alone=True)
        if chosen is None:
            # Beside the images' folder only where it was given itself.
            around = folders if len(folders) > 1 else [here, _parent(here)]
            return _Place([here], "folder", around, notes)
        notes += _other_splits(chosen, inner)
        folders.insert(0, os.path.join(here, chosen))


def _evaluated_folder(
    folders: Sequence[str], has_images: bool, known: LabelClasses, *, alone: bool
) -> str | None:
    """The folder to go into; None where the images or their class folders are here.

    alone: also where its name says nothing but it is the only one.
    """
    if has_images or any(known.parse(name) is not None or is_wnid(name) for name in folders):
        return None
    for name in EVALUATED:
        if name in folders:
            return name
    return folders[0] if alone and len(folders) == 1 else None


def _other_splits(chosen: str, folders: Sequence[str]) -> list[str]:
    if chosen.startswith(("train", "test")):
        return [f"{chosen} is read, there is no val"]
    others = [name for name in folders if name != chosen and name.startswith(("train", "test"))]
    return [f"{chosen} is read, not {', '.join(others)}"] if others else []


def _evaluated_archives(names: list[str]) -> tuple[list[str], list[str]]:
    """The archives to read, and those left out: of the training images, or of the devkit."""
    ours = [name for name in names if re.search(r"(^|[-_.])val(idation)?([-_.\d]|$)", name)]
    if not ours:
        ours = [name for name in names if "devkit" not in name]
    chosen = ours or names
    return chosen, [name for name in names if name not in chosen]


def _kind_by_name(name: str) -> bool:
    return name.lower().endswith((".tar", ".zip", ".parquet"))


def _kind(path: str) -> str:
    """What a file is, by its content."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start[:4] == b"PK\x03\x04" or start[:4] == b"PK\x05\x06":
        return "zip"
    if start[:4] == b"PAR1":
        return "parquet"
    if start[257:262] == b"ustar":
        return "tar"
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start[:6] == b"\xfd7zXZ\x00":
        raise DataError(
            f"{printable(path)}: compressed, so images cannot be read one by one; decompress it "
            "to a .tar (its images need no unpacking)"
        )
    if path.lower().endswith(".tar"):
        return "tar"  # an old one, or a damaged one
    raise DataError(
        f"{printable(path)}: not a data set, expected a folder or a tar, zip or parquet file"
    )


def _open(place: _Place, known: LabelClasses) -> Source:
    match place.kind:
        case "folder":
            return FolderSource(place.paths[0])
        case "zip":
            return ZipSource(place.paths[0])
        case "tar":
            return TarSource(place.paths)
        case _:
            return ParquetSource(place.paths, own_classes=known.names is not None)


def _without_splits(source: Source, known: LabelClasses) -> tuple[list[int], list[str], list[str]]:
    """Positions and names of the evaluated images, without the folders that all of them are in.

    An archive may hold several splits, or one folder around all others, as a folder may.
    """
    positions, names = list(range(len(source.paths))), list(source.paths)
    notes: list[str] = []
    if source.kind in ("parquet", "WebDataset"):
        return positions, names, notes
    while names:
        folders = sorted({name.split("/")[0] for name in names if "/" in name})
        has_images = any("/" not in name for name in names)
        chosen = _evaluated_folder(folders, has_images, known, alone=True)
        if chosen is None:
            break
        notes += _other_splits(chosen, folders)
        kept = [i for i, name in enumerate(names) if name.startswith(chosen + "/")]
        positions = [positions[i] for i in kept]
        names = [names[i][len(chosen) + 1 :] for i in kept]
    return positions, names, notes


def _kind_of(source: Source, folders: set[str], known: LabelClasses) -> str:
    """What the data set is, in words; `folders` are those of the images, "" for none."""
    if source.labels is not None:
        return source.kind
    if folders == {""}:
        return f"flat {source.kind}"
    are_classes = all(known.parse(folder) is not None for folder in folders)
    kind = "class folders" if are_classes else "folders"
    return kind if source.kind == "folder" else f"{kind} in a {source.kind}"


def _mapped(
    texts: list[str], names: list[str], source: str, noun: str, known: LabelClasses
) -> list[tuple[int, ...]]:
    """The class of each image, from its folder's name or its label; `noun` says which."""
    classes = {text: (known.parse(text),) for text in set(texts)}
    unknown = [text for text, (index,) in classes.items() if index is None]
    if noun == "folder" and "" in unknown:
        stray = [name for name, text in zip(names, texts, strict=True) if not text]
        raise DataError(f"{source}: outside the class folders there is {listing('image', stray)}")
    if unknown:
        whose = "of ImageNet-1K" if known.names is None else "of the model"
        raise DataError(
            f"{source}: no class {whose} for {listing(noun, unknown)}; expected {known.expected}"
        )
    return [classes[text] for text in texts]  # type: ignore[misc] - None was sorted out


def _check_one_level(names: list[str], source: str, known: LabelClasses) -> None:
    """Raises where folders of classes are in folders such as "train" or "0", classes or not."""
    for name in names:
        outer, *inner = name.split("/")
        if inner[1:] and known.named(inner[0]) not in (None, known.parse(outer)):
            raise DataError(
                f"{source}: {printable(outer)} has folders of classes in it, such as "
                f"{printable(inner[0])}; give the folder that is to be read"
            )


def _found_beside(place: _Place, source: str, known: LabelClasses) -> Labels:
    stem = os.path.splitext(os.path.basename(os.path.abspath(place.paths[0])))[0]
    path = find_labels(place.folders, stem)
    if path is None and known.parse(stem) is not None:
        raise DataError(f"{source}: is the folder of one class; give the folder that it is in")
    if path is None:
        looked = ", ".join(dict.fromkeys(name.format(stem) for name in USUAL_NAMES))
        where = " and ".join(map(printable, place.folders))
        raise DataError(
            f"{source}: images without labels; looked in {where} for {looked} (and folders are no "
            f"classes by their names; expected {known.expected})"
        )
    return read_labels(path, known)


def _subset(classes: Sequence[tuple[int, ...]]) -> str | None:
    """The data set that has exactly these classes, if one is known."""
    found = {index for one in classes for index in one}
    return next((name for name, own in class_subsets().items() if found == set(own)), None)


def _parent(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))

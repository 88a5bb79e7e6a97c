"""Where images lie: in a folder, tars, a zip or parquet files. Each is listed once, then read
image by image. Nothing is written, and no name in an archive is ever used as a path."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import posixpath
import tarfile
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from internimage_jax.image_files import IMAGE_SUFFIXES
from internimage_jax.labels import wnid_to_index
from internimage_jax.messages import listing, one_line, printable

# A file larger than this is no image of these data sets; a zip may claim any size.
MAX_IMAGE_BYTES = 2**28
# Decompressed row groups of parquet files that are kept, besides the two that are needed.
MAX_CACHED_BYTES = 2**27
MAX_ROW_GROUP_BYTES = 2**31


class DataError(ValueError):
    """What is wrong with a data set, in one line that names it."""


class Source(abc.ABC):
    """Images in a container.

    Args:
        kind: The container: "folder", "tar", "zip", "parquet" or "WebDataset".
        paths: Of each image, "/" between folders; none twice.
        labels: The label that the container holds for each image, as text; None where labels are
            elsewhere.
    """

    kind: str
    paths: list[str]
    labels: list[str] | None = None

    @abc.abstractmethod
    def read(self, position: int) -> bytes:
        """Returns the encoded image. Safe to call from several threads."""


class FolderSource(Source):
    """Image files below a folder, links followed."""

    kind = "folder"

    def __init__(self, folder: str):
        self._folder = folder
        self.paths = sorted(_walk(folder, "", (os.path.realpath(folder),)))

    def read(self, position: int) -> bytes:
        path = os.path.join(self._folder, self.paths[position])
        with open(path, "rb") as file:
            check_size(os.fstat(file.fileno()).st_size)
            return file.read()


class ZipSource(Source):
    """Images in a zip file."""

    kind = "zip"

    def __init__(self, path: str):
        with one_line_errors(path, "zip"):
            self._zip = zipfile.ZipFile(path)
        members: dict[str, zipfile.ZipInfo] = {}
        for member in self._zip.infolist():
            if is_image(name := tidy(member.filename)) and not member.is_dir():
                if name in members:
                    raise DataError(f"{printable(path)}: holds {printable(name)} twice")
                if member.flag_bits & 1:
                    raise DataError(f"{printable(path)}: {printable(name)} is encrypted")
                members[name] = member
        self.paths = sorted(members)
        self._members = [members[name] for name in self.paths]

    def read(self, position: int) -> bytes:
        member = self._members[position]
        check_size(member.file_size)  # zipfile decompresses no more than that
        return self._zip.read(member)


class Member(NamedTuple):
    """A file in a tar: its bytes are those from `offset` on."""

    tar: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        check_size(self.size)
        with open(self.tar, "rb", buffering=0) as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ValueError(f"{printable(self.tar)} ends early")
        return data


class TarSource(Source):
    """Images in a tar, or in several: WebDataset shards, whose `.cls` files are the labels."""

    kind = "tar"

    def __init__(self, paths: Sequence[str]):
        images: dict[str, Member] = {}
        classes: dict[str, Member] = {}
        for path in paths:
            # Shards may each count their samples from 0.
            shard = f"{os.path.basename(path)}/" if len(paths) > 1 else ""
            for member in _tar_members(path):
                is_class = _is_class_file(member.name)
                found = classes if is_class else images
                name = shard + (_stem(member.name) if is_class else member.name)
                if name in found:
                    raise DataError(f"{printable(path)}: holds {printable(member.name)} twice")
                found[name] = member
        if classes:
            self.kind = "WebDataset"
            self.paths = list(images)
            self.labels = _classes_of(images, classes, printable(paths[0]))
        else:
            self.paths = sorted(images)
        self._members = [images[name] for name in self.paths]

    def read(self, position: int) -> bytes:
        return self._members[position].read()


class ParquetSource(Source):
    """Images in parquet files as Hugging Face writes them: `image.bytes`, `image.path`, `label`.

    The row group of an image is read when the image is; the last ones are kept.

    Args:
        paths: Of the files.
        own_classes: Labels are not ImageNet-1K's: whatever their names are, they count.
    """

    kind = "parquet"

    def __init__(self, paths: Sequence[str], own_classes: bool = False):
        try:
            from pyarrow import parquet
        except ImportError:
            raise DataError(
                f"{printable(paths[0])}: parquet files need pyarrow: pip install pyarrow"
            ) from None
        self._parquet = parquet
        self._own_classes = own_classes
        self._groups: list[tuple[str, int]] = []  # file and number of each row group
        self._rows: list[tuple[int, int]] = []  # row group and row of each image
        self._cached: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self.paths, self.labels = [], []
        for path in paths:
            with one_line_errors(path, "parquet"):
                self._list(path, self.labels)
        if len(set(self.paths)) < len(self.paths):
            digits = len(str(len(self.paths) - 1))
            self.paths = [f"{i:0{digits}}" for i in range(len(self.paths))]

    def _list(self, path: str, labels: list[str]) -> None:
        with self._parquet.ParquetFile(path) as file:
            columns = {file.schema.column(i).path for i in range(len(file.schema))}
            if missing := {"image.bytes", "label"} - columns:
                missing = " and ".join(sorted(missing))
                raise DataError(f"{printable(path)}: has no column {missing}")
            names = _label_names(file.schema_arrow.metadata, path, self._own_classes)
            wanted = ["label", *({"image.path"} & columns)]
            stem = os.path.basename(path).removesuffix(".parquet")
            for number in range(file.num_row_groups):
                size = file.metadata.row_group(number).total_byte_size
                if size > MAX_ROW_GROUP_BYTES:
                    raise DataError(
                        f"{printable(path)}: a row group of {size} bytes, expected at most "
                        f"{MAX_ROW_GROUP_BYTES}: it has to be in memory at once"
                    )
                for row, values in enumerate(file.read_row_group(number, wanted).to_pylist()):
                    label, image = values["label"], values.get("image") or {}
                    if type(label) is int and 0 <= label < len(names):
                        labels.append(names[label])
                    else:  # of own classes with names it is none, and no index of another's
                        labels.append(f"{label} of {len(names)}" if names else str(label))
                    self.paths.append(image.get("path") or f"{stem}/{number}/{row:06}")
                    self._rows.append((len(self._groups), row))
                self._groups.append((path, number))

    def read(self, position: int) -> bytes:
        group, row = self._rows[position]
        with self._lock:
            table = self._cached.pop(group, None)
            if table is None:
                path, number = self._groups[group]
                with one_line_errors(path, "parquet"), self._parquet.ParquetFile(path) as file:
                    table = file.read_row_group(number, ["image.bytes"])["image"]
            self._cached[group] = table
            # Threads that read in order are in two neighbouring groups, or in several small ones.
            while len(self._cached) > 2 and self._cached_bytes() > MAX_CACHED_BYTES:
                self._cached.popitem(last=False)
        image = table[row].as_py()
        if not image or image["bytes"] is None:
            raise ValueError("has no bytes")
        return image["bytes"]

    def _cached_bytes(self) -> int:
        return sum(table.nbytes for table in self._cached.values())


def tidy(name: str) -> str:
    """An archive member's name without "./" and leading "/"."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a system's own, such as `._x.jpg` and `__MACOSX` of macOS."""
    return (name.startswith(".") and name != "..") or name == "__MACOSX"


def is_image(path: str) -> bool:
    """Whether the path looks like an image's, and no part of it is hidden."""
    return path.lower().endswith(IMAGE_SUFFIXES) and not any(map(is_hidden, path.split("/")))


def check_size(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"{size} bytes, expected at most {MAX_IMAGE_BYTES} for an image file")


@contextlib.contextmanager
def one_line_errors(path: str, kind: str) -> Iterator[None]:
    """Turns whatever a reader raises on a damaged file into one line that names the file."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"{printable(path)}: no such file") from None
    except PermissionError:
        raise DataError(f"{printable(path)}: no permission to read it") from None
    except Exception as error:
        reason = one_line(error)
        raise DataError(f"{printable(path)}: not a whole {kind} file ({reason})") from error


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yields the images below `folder`; `above` are the real paths of the folders it lies in."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else None
                if not is_hidden(entry.name) and real not in above:  # else a link to itself
                    inner = (*above, real or os.path.join(above[-1], entry.name))
                    yield from _walk(entry.path, path + "/", inner)
            # A link to nothing counts: to leave it out would change the number of images.
            elif is_image(entry.name) and (entry.is_file() or entry.is_symlink()):
                yield path


def _tar_members(path: str) -> Iterator[Member]:
    """Yields the images and `.cls` files of a tar."""
    with one_line_errors(path, "tar"), tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            name = tidy(member.name)
            if member.isdir() or not (is_image(name) or _is_class_file(name)):
                continue
            if not member.isreg() or member.issparse():
                raise DataError(
                    f"{printable(path)}: {printable(name)} is a link, a device or sparse, "
                    "expected a plain file"
                )
            yield Member(path, name, member.offset_data, member.size)
        # tarfile takes a damaged header for the end. Of a tar that ends between two files, only
        # the missing end mark tells.
        with open(path, "rb") as file:
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise ValueError(f"neither a file nor the end mark at byte {tar.offset}")


def _is_class_file(name: str) -> bool:
    return name.lower().endswith(".cls") and not any(map(is_hidden, name.split("/")))


def _stem(name: str) -> str:
    """The name of a WebDataset's sample: that of its files without their suffix."""
    return posixpath.splitext(name)[0]


def _classes_of(images: dict[str, Member], classes: dict[str, Member], source: str) -> list[str]:
    """The content of the `.cls` file of each image."""
    stems = [_stem(name) for name in images]
    if unlabelled := set(stems) - set(classes):
        raise DataError(f"{source}: no .cls file for {listing('sample', unlabelled)}")
    if missing := set(classes) - set(stems):
        raise DataError(f"{source}: no image for {listing('sample', missing)}")
    if len(set(stems)) < len(stems):
        twice = {stem for stem, count in Counter(stems).items() if count > 1}
        raise DataError(f"{source}: several images for {listing('sample', twice)}")
    return [classes[stem].read()[:1000].decode("utf-8", "replace").strip() for stem in stems]


def _label_names(metadata: dict[bytes, bytes] | None, path: str, own_classes: bool) -> list[str]:
    """The names that Hugging Face's metadata give the labels.

    Of ImageNet-1K's classes only where they are WordNet ids, else none.
    """
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = [str(name) for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        return []
    if own_classes or set(names) <= set(wnid_to_index()):
        return names
    if len(names) != 1000:  # labels 0 to 199 of ImageNet-R would be taken for other classes
        raise DataError(
            f"{printable(path)}: labels are numbers of {len(names)} classes without WordNet ids, "
            "expected the 1000 of ImageNet-1K"
        )
    return []

"""Small data sets in the forms that users have."""

from __future__ import annotations

import functools
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TENCH, SNAKE, TISSUE = "n01440764", "n01751748", "n15075141"  # classes 0, 65 and 999


@functools.cache
def encoded(seed: int, size: tuple[int, int] = (12, 10), form: str = "JPEG") -> bytes:
    """An image file of noise, (height, width)."""
    pixels = np.random.RandomState(seed).randint(0, 256, (*size, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def val(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w:") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_zip(
    path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_parquet(path: Path, rows: range, *, metadata: object = None, group: int = 2) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    images = [{"bytes": encoded(i), "path": val(i)} for i in rows]
    table = pyarrow.table({"image": images, "label": [i % 3 for i in rows]})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=group)
    return path

"""Data sets that are damaged, incomplete or hostile: one line that names what is wrong."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from internimage_jax import data_sources
from internimage_jax.data import open_dataset
from tests.dataset_files import (
    SNAKE,
    TENCH,
    encoded,
    val,
    write_folder,
    write_parquet,
    write_tar,
    write_zip,
)

IMAGES = {f"{SNAKE}/{i}.jpg": encoded(i) for i in range(3)}
FLAT = {val(i): encoded(i) for i in (1, 2)}


def error(path: Path, labels: Path | None = None) -> str:
    """The message of the error that opening gives, which is one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_dataset(path, labels=labels)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert error(tmp_path / "none") == f"{tmp_path}/none: no such file or folder"
    write_folder(tmp_path, IMAGES)
    assert error(tmp_path, tmp_path / "none.txt") == f"{tmp_path}/none.txt: no such file or folder"


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    assert error(tmp_path).startswith(f"{tmp_path}: no images; looked for .jpg")
    write_folder(tmp_path, {f"{TENCH}/readme.txt": b"", ".x.jpg": b""})
    assert error(tmp_path).startswith(f"{tmp_path}: no images")
    assert error(write_zip(tmp_path / "x.zip", {"a.txt": b""})).startswith(f"{tmp_path}/x.zip: no")


def test_folders_that_are_no_classes_are_listed(tmp_path: Path) -> None:
    write_folder(tmp_path, IMAGES | {"cat/a.jpg": b"", "n99999999/b.jpg": b"", "1000/c.jpg": b""})
    assert error(tmp_path) == (
        f"{tmp_path}: no class of ImageNet-1K for 3 folders (1000, cat, n99999999); expected "
        "WordNet ids such as n01440764, or numbers from 0 to 999"
    )


def test_a_folder_of_another_wordnet_id_is_no_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"n99999999/b.jpg": b""})
    assert f"{tmp_path}: no class of ImageNet-1K for folder n99999999;" in error(tmp_path)


def test_images_beside_class_folders_are_listed(tmp_path: Path) -> None:
    write_folder(tmp_path, IMAGES | {"a.jpg": b""})
    assert error(tmp_path) == f"{tmp_path}: outside the class folders there is image a.jpg"


def test_images_without_a_label_file_say_what_was_looked_for(tmp_path: Path) -> None:
    message = error(write_folder(tmp_path / "val", FLAT))
    assert message.startswith(f"{tmp_path}/val: images without labels; looked in {tmp_path}/val")
    assert f"and {tmp_path} for val_map.txt, val.txt" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{val(1)} 65\n", f"FILE: no label for image {val(2)} of DATA"),
        (f"{val(1)} 1\n{val(2)} 2\n{val(3)} 3\n", f"DATA does not have image {val(3)[:-5]}"),
        (f"{val(1)} 65\n{val(2)} 1000\n", "FILE: no class: line 2: 1000; expected an image's name"),
        (f"{val(1)} 65\n{val(2)} -1\n", "FILE: no class: line 2: -1; expected"),
        (f"{val(1)} 65\n{val(2)} n00000001\n", "FILE: no class: line 2: n00000001; expected"),
        (f"{val(1)} 1\n{val(1)} 1\n{val(2)} 1\n", f"FILE: several labels for image {val(1)}"),
        (f'{val(1)},1\n"{val(2)},1\n{val(3)},1\n', f"FILE: no class: line 2: {val(2)},1; expected"),
        (f'{val(1)},1\n"{"9" * 200_000}', 'FILE: no class: line 2: "9999'),
        ("1\n0\n", "FILE: no class: line 2: 0; expected an ILSVRC2012 id from 1 to 1000"),
        ("1\n1001\n", "FILE: no class: line 2: 1001; expected an ILSVRC2012 id"),
        ("1\n2\n3\n", "DATA does not have image ILSVRC2012_val_00000003"),
        ("", "FILE: empty, expected labels"),
        ("\xff", "FILE: not a text file"),
        ("[[1], [1000]]", r"FILE: no class: image 2: [1000]; expected lists of classes"),
        ("[[1], [true]]", "FILE: no class: image 2: [True]; expected lists of classes"),
        ("[[1], 3]", "FILE: no class: image 2: 3; expected lists of classes"),
        ("[[1]]", f"FILE: no label for image {val(2)}"),
        ("[[], []]", "FILE: no image of DATA has a label"),
        ("[[1], [2", "FILE: damaged JSON"),
        ("\x1f\x8b not gzip", "FILE: not a whole tar file"),
    ],
)
def test_label_files_that_do_not_fit_are_named(tmp_path: Path, content: str, message: str) -> None:
    folder, file = write_folder(tmp_path / "val", FLAT), tmp_path / "labels"
    file.write_bytes(content.encode("latin-1"))
    message = message.replace("FILE", str(file)).replace("DATA", str(folder))
    assert message in error(folder, file)


def test_many_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, {val(i): b"" for i in range(1, 1001)} | {"val.txt": b"a 1\n"})
    shown = ", ".join(val(i) for i in range(1, 6))
    assert f"no label for 1000 images ({shown}, ...) of" in error(tmp_path)


def test_a_devkit_without_ground_truth_is_named(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "val", FLAT)
    (tmp_path / "kit").mkdir()
    assert "kit/data/ILSVRC2012_validation_ground_truth.txt: no such file" in error(
        data, tmp_path / "kit"
    )
    tar = write_tar(tmp_path / "kit.tar.gz", {"readme.txt": b""}, "w:gz")
    assert "kit.tar.gz: holds no ILSVRC2012_validation_ground_truth.txt" in error(data, tar)


# Archives


def test_a_tar_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", IMAGES)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    # Within a file, within a header, and between two files
    for length in (end - 100, end - len(encoded(2)) // 512 * 512 - 700, 512, 100):
        path.write_bytes(whole[:length])
        assert error(path).startswith(f"{path}: not a whole tar file (")
    second = whole.index(f"{SNAKE}/1.jpg".encode())
    path.write_bytes(whole[:second])
    assert error(path) == (
        f"{path}: not a whole tar file (neither a file nor the end mark at byte {second})"
    )


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_a_link_or_device_in_a_tar_is_refused(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", IMAGES)
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(f"{TENCH}/x.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    assert error(path).startswith(f"{path}: {TENCH}/x.jpg is a link, a device or sparse")


def test_a_sparse_file_in_a_tar_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo(f"{TENCH}/x.jpg")
    member.type = tarfile.GNUTYPE_SPARSE
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(member)
    assert "x.jpg is a link, a device or sparse" in error(tmp_path / "x.tar")


def test_a_tar_that_is_cut_off_later_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", IMAGES)
    dataset = open_dataset(path)
    path.write_bytes(path.read_bytes()[:600])  # within the first image
    with pytest.raises(ValueError, match=rf"0\.jpg: cannot be read \({path} ends early\)"):
        dataset.read(0)


def test_an_encrypted_image_in_a_zip_is_named_and_a_folder_is_none(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", IMAGES | {f"{TENCH}/folder.jpg/": b""})
    assert len(open_dataset(path)) == 3
    content = bytearray(path.read_bytes())
    content[6] |= 1  # in its header, and where all are listed
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    assert error(path) == f"{path}: {SNAKE}/0.jpg is encrypted"


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_names_in_an_archive_are_never_paths(tmp_path: Path, write: Callable[..., Path]) -> None:
    files = {f"/{TENCH}/a.jpg": encoded(1), f"{TENCH}/../../b.jpg": encoded(2)}
    dataset = open_dataset(write(tmp_path / "sub" / "x", files))
    assert list(dataset.names) == [f"{TENCH}/../../b.jpg", f"{TENCH}/a.jpg"]
    assert [dataset.read(i) for i in (0, 1)] == [encoded(2), encoded(1)]
    assert [path.name for path in tmp_path.rglob("*")] == ["sub", "x"]
    assert "folder .." in error(write(tmp_path / "y", {"../x.jpg": b"", f"{TENCH}/y.jpg": b""}))


def test_an_image_twice_in_an_archive_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", IMAGES)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo(f"./{SNAKE}/1.jpg"), io.BytesIO())
    assert error(path) == f"{path}: holds {SNAKE}/1.jpg twice"


def test_a_damaged_zip_is_named_and_so_is_a_damaged_image_in_it(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", IMAGES)
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    assert error(path).startswith(f"{path}: not a whole zip file")
    whole[whole.index(encoded(1)) + 50] ^= 1
    path.write_bytes(whole)
    dataset = open_dataset(path)
    with pytest.raises(ValueError, match=rf"^{SNAKE}/1\.jpg: cannot be read \(Bad CRC-32"):
        dataset.read(1)
    assert dataset.read(2) == encoded(2)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_sources, "MAX_IMAGE_BYTES", 1000)
    files = {f"{SNAKE}/a.jpg": bytes(1001)}
    path = write_zip(tmp_path / "x.zip", files, zipfile.ZIP_DEFLATED)
    message = "a.jpg: cannot be read (1001 bytes, expected at most 1000 for an image file)"
    for dataset in (path, write_tar(tmp_path / "x.tar", files), write_folder(tmp_path, files)):
        with pytest.raises(ValueError, match=re.escape(message)):
            open_dataset(dataset).read(0)


def test_a_compressed_tar_says_what_to_do(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar.gz", IMAGES, "w:gz")
    assert error(path).startswith(f"{path}: compressed, so images cannot be read one by one")
    for mode in ("w:bz2", "w:xz"):
        assert ": compressed, so" in error(write_tar(path, IMAGES, mode))


def test_other_files_and_mixed_archives_are_no_data_set(tmp_path: Path) -> None:
    path = write_folder(tmp_path, {"x.jpg": encoded(0)}) / "x.jpg"
    assert error(path).startswith(f"{path}: not a data set, expected a folder or a tar")
    folder = tmp_path / "both"
    write_tar(folder / "x.tar", IMAGES)
    write_zip(folder / "x.zip", IMAGES)
    assert "2 archives (x.tar, x.zip), expected a single one" in error(folder)
    write_zip(tmp_path / "zips" / "a.zip", IMAGES)
    write_zip(tmp_path / "zips" / "b.zip", IMAGES)
    assert "2 archives (a.zip, b.zip), expected a single one" in error(tmp_path / "zips")
    assert "empty.zip: no images" in error(write_zip(tmp_path / "empty.zip", {}))
    (tmp_path / "old.TAR").write_bytes(b"no tar")
    assert error(tmp_path / "old.TAR").startswith(f"{tmp_path}/old.TAR: not a whole tar file")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.cls": b"1", "0.jpg": b"", "1.jpg": b""}, "no .cls file for sample 1"),
        ({"0.cls": b"1", "0.jpg": b"", "1.cls": b""}, "no image for sample 1"),
        ({"0.cls": b"1", "0.jpg": b"", "0.png": b""}, "several images for sample 0"),
        ({"0.cls": b"1000", "0.jpg": b""}, "no class of ImageNet-1K for label 1000"),
        ({"0.cls": b"\xff\0", "0.jpg": b""}, "no class of ImageNet-1K for label"),
        ({"0.cls": b"", "0.jpg": b""}, "no class of ImageNet-1K for label ''; expected"),
    ],
)
def test_webdataset_samples_are_whole(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    path = write_tar(tmp_path / "x.tar", files)
    assert f"{path}: {message}" in error(path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", range(5))
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 1, 8):
        path.write_bytes(whole[:length])
        assert error(path).startswith(f"{path}: not a whole parquet file (")


def test_a_row_group_that_fits_no_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_sources, "MAX_ROW_GROUP_BYTES", 100)
    message = error(write_parquet(tmp_path / "x.parquet", range(5)))
    assert re.fullmatch(rf"{tmp_path}/x\.parquet: a row group of \d+ bytes, .* 100: .*", message)


def test_parquet_without_the_columns_or_with_other_labels_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    assert error(path) == f"{path}: has no column image.bytes and label"
    images = [{"bytes": None, "path": None}]
    parquet.write_table(pyarrow.table({"image": images, "label": [-1]}), path)
    assert "no class of ImageNet-1K for label -1" in error(path)
    images = [{"bytes": b"x", "path": None}, {"bytes": None, "path": None}]
    images_type = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    column = pyarrow.array(images, images_type)
    parquet.write_table(pyarrow.table({"image": column, "label": [1, 2]}), path)
    dataset = open_dataset(path)
    assert dataset.read(0) == b"x"
    with pytest.raises(ValueError, match=r"^x/0/000001: cannot be read \(has no bytes\)$"):
        dataset.read(1)


def test_the_folder_of_one_class_is_no_data_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "n01440764", {"a.jpg": b"x"})
    message = error(tmp_path / "n01440764")
    assert message.endswith("n01440764: is the folder of one class; give the folder that it is in")


def test_parquet_without_pyarrow_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert error(tmp_path / "x.parquet").endswith("need pyarrow: pip install pyarrow")

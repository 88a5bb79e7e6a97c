"""Data sets: every form is recognised, and each image has the class that its name says."""

from __future__ import annotations

import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from internimage_jax.data import Dataset, open_dataset
from internimage_jax.labels import (
    class_subsets,
    ilsvrc2012_wnids,
    imagenet1k_classes,
    wnid_to_index,
)
from tests.dataset_files import (
    SNAKE,
    TENCH,
    TISSUE,
    encoded,
    val,
    write_folder,
    write_parquet,
    write_tar,
    write_zip,
)

# Three classes of the 1000, so that an index by order would be another.
CLASS_FOLDERS = {
    f"{TISSUE}/a.JPEG": encoded(0),
    f"{SNAKE}/b.JPG": encoded(1),
    f"{SNAKE}/c.png": encoded(2),
    f"{TENCH}/d.jpeg": encoded(3),
}
CLASS_NAMES = sorted(CLASS_FOLDERS)
CLASS_LABELS = [(0,), (65,), (65,), (999,)]
FLAT = {val(i): encoded(i) for i in range(1, 4)}
FLAT_LABELS = [(65,), (970,), (230,)]  # of the real images of these names


def check(dataset: Dataset, files: dict[str, bytes], labels: list[tuple[int, ...]]) -> None:
    """The data set has the images of `files`, sorted, with these labels, and reads them."""
    assert list(dataset.names) == sorted(files)
    assert list(dataset.labels) == labels
    assert [dataset.read(i) for i in range(len(dataset))] == [files[n] for n in sorted(files)]


# Class folders


def test_classes_are_those_of_the_folders_names(tmp_path: Path) -> None:
    dataset = open_dataset(write_folder(tmp_path / "val", CLASS_FOLDERS))
    check(dataset, CLASS_FOLDERS, CLASS_LABELS)
    assert dataset.kind == "class folders"
    assert dataset.classes is None and dataset.notes == ()
    assert dataset.source == str(tmp_path / "val")


@pytest.mark.parametrize("form", ["tar", "zip", "deflated zip"])
@pytest.mark.parametrize("prefix", ["", "./", "imagenet/val/"])
def test_class_folders_in_an_archive_are_the_same_data_set(
    tmp_path: Path, form: str, prefix: str
) -> None:
    files = {prefix + name: content for name, content in CLASS_FOLDERS.items()}
    files |= {"imagenet/train/n01440764/z.jpg": b"", "readme.txt": b""} if len(prefix) > 2 else {}
    if form == "tar":
        path = write_tar(tmp_path / "data", files)  # the content tells, not the name
    else:
        method = zipfile.ZIP_DEFLATED if form == "deflated zip" else zipfile.ZIP_STORED
        path = write_zip(tmp_path / "data", files, method)
    dataset = open_dataset(path)
    check(dataset, CLASS_FOLDERS, CLASS_LABELS)
    assert dataset.kind == f"class folders in a {form.split()[-1]}"
    assert list(tmp_path.iterdir()) == [path]  # nothing is unpacked


def test_of_several_splits_the_validation_images_are_read_and_the_report_says_so(
    tmp_path: Path,
) -> None:
    write_folder(tmp_path / "val", CLASS_FOLDERS)
    write_folder(tmp_path / "train", {f"{TENCH}/x.JPEG": encoded(9)})
    dataset = open_dataset(tmp_path)
    check(dataset, CLASS_FOLDERS, CLASS_LABELS)
    assert dataset.notes == ("val is read, not train",)


def test_training_images_alone_are_read_and_the_report_says_so(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", CLASS_FOLDERS)
    dataset = open_dataset(tmp_path)
    check(dataset, CLASS_FOLDERS, CLASS_LABELS)
    assert dataset.notes == ("train is read, there is no val",)


def test_what_lies_beside_the_images_is_not_read_nor_called_a_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", CLASS_FOLDERS)
    write_folder(tmp_path / "docs", {"readme.txt": b""})
    dataset = open_dataset(tmp_path)
    check(dataset, CLASS_FOLDERS, CLASS_LABELS)
    assert dataset.notes == ()
    flat = write_folder(tmp_path / "flat", {"a.png": encoded(0), "val.txt": b"a.png 3\n"})
    write_tar(flat / "more.tar", CLASS_FOLDERS)
    check(open_dataset(flat), {"a.png": encoded(0)}, [(3,)])


def test_of_archives_the_validation_images_are_read_by_their_names(tmp_path: Path) -> None:
    def opened(folder: str, ours: str, *others: str) -> Dataset:
        write_tar(tmp_path / folder / ours, CLASS_FOLDERS)
        for other in others:
            write_tar(tmp_path / folder / other, {f"{TENCH}/x.JPEG": b""})
        dataset = open_dataset(tmp_path / folder)
        check(dataset, CLASS_FOLDERS, CLASS_LABELS)
        return dataset

    opened("case", "IMAGES.TAR")
    opened("hidden", "val.tar", "._val.tar")  # as macOS leaves them
    opened("values", "my_val.tar", "train-values.tar", "evaluation.tar")
    note = "file images.tar read, not file ILSVRC2012_devkit_t12.tar"
    assert opened("devkit", "images.tar", "ILSVRC2012_devkit_t12.tar").notes == (note,)
    kit = write_tar(tmp_path / "kit" / "ILSVRC2012_devkit_t12.tar", {"readme.txt": b""})
    with pytest.raises(ValueError, match=r"devkit_t12\.tar: no images"):
        open_dataset(kit.parent)


def test_a_split_in_an_archive_is_told_by_its_whole_name(tmp_path: Path) -> None:
    files = {f"{folder}/{TENCH}/x.png": encoded(1) for folder in ("val", "val2", "val_blurred")}
    dataset = open_dataset(write_zip(tmp_path / "x.zip", files))
    check(dataset, {f"{TENCH}/x.png": encoded(1)}, [(0,)])


def test_links_are_followed_and_hidden_files_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "store", CLASS_FOLDERS)
    root = write_folder(
        tmp_path / "linked", {f"{TENCH}/._d.jpeg": b"x", ".git/x.png": b"x", "__MACOSX/a.jpg": b"x"}
    )
    (root / SNAKE).symlink_to(tmp_path / "store" / SNAKE)
    (root / TISSUE).symlink_to(tmp_path / "store" / TISSUE)
    (root / TENCH / "d.jpeg").symlink_to(tmp_path / "store" / TENCH / "d.jpeg")
    (root / TENCH / "loop").symlink_to(root)
    check(open_dataset(root), CLASS_FOLDERS, CLASS_LABELS)


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    write_folder(tmp_path, CLASS_FOLDERS)
    (tmp_path / TENCH / "z.jpg").symlink_to("nowhere")
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 5
    with pytest.raises(FileNotFoundError, match=f"^{TENCH}/z.jpg: no such file$"):
        dataset.read(1)


def test_numbered_folders_are_class_indices(tmp_path: Path) -> None:
    files = {f"{i}/x.jpeg": encoded(i) for i in (0, 2, 10, 999)}  # sorted as text: 0 10 2 999
    check(open_dataset(write_folder(tmp_path, files)), files, [(0,), (10,), (2,), (999,)])


@pytest.mark.parametrize("name", ["ImageNet-A", "ImageNet-R"])
def test_exactly_the_200_classes_restrict_the_logits(tmp_path: Path, name: str) -> None:
    subset = class_subsets()[name]
    wnids = [str(imagenet1k_classes()[i].wnid) for i in subset]
    path = write_zip(tmp_path / "x.zip", {f"imagenet/{wnid}/1.jpg": b"" for wnid in wnids})
    dataset = open_dataset(path)
    assert dataset.classes == subset and len(set(subset)) == 200
    assert dataset.notes == (f"the 200 classes of {name}: logits are restricted to them",)
    path = write_zip(tmp_path / "y.zip", {f"imagenet/{wnid}/1.jpg": b"" for wnid in wnids[1:]})
    assert open_dataset(path).classes is None


# Flat folders and label files

LABEL_FILES = {
    "val.txt": "".join(f"{val(i)} {c}\n" for i, c in ((1, 65), (2, 970), (3, 230))),
    "val_map.txt": "".join(f"val.zip@/{val(i)}\t{c}\n" for i, c in ((1, 65), (2, 970), (3, 230))),
    "meta/val.txt": "".join(f"val/{val(i)} {c}\n" for i, c in ((3, 230), (1, 65), (2, 970))),
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    "ILSVRC2012_val_00000003,n02105855 1 2 3 4 \n"
    "ILSVRC2012_val_00000001,n01751748 1 2 3 4 n01751748 5 6 7 8 \n"
    "ILSVRC2012_val_00000002,n09193705 1 2 3 4 \n",
    "val.csv": f"{val(1)},65\r\n{val(2)},970\r\n{val(3)},230\r\n",
    "labels.csv": f"\ufefffile,wnid\n{val(1)},n01751748\n{val(2)},n09193705\n{val(3)},n02105855\n",
    "ILSVRC2012_validation_ground_truth.txt": "490\n361\n171\n",
    "synset_labels.txt": "n01751748\nn09193705\nn02105855\n",
}


@pytest.mark.parametrize("name", LABEL_FILES)
def test_every_label_file_gives_the_same_classes(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "imagenet" / "val", FLAT)
    file = write_folder(tmp_path / "imagenet", {name: LABEL_FILES[name].encode()}) / name
    given = file if name == "synset_labels.txt" else None  # no usual name
    dataset = open_dataset(tmp_path / "imagenet" / "val", labels=given)
    check(dataset, FLAT, FLAT_LABELS)
    assert dataset.kind == "flat folder"
    assert dataset.notes == (f"labels from {file}",)
    check(open_dataset(tmp_path / "imagenet", labels=given), FLAT, FLAT_LABELS)


def test_ilsvrc2012_ids_are_those_of_the_devkit() -> None:
    # The first ten images: ground truth of the devkit, and class indices as Caffe lists them.
    ids = [490, 361, 171, 822, 297, 482, 13, 704, 599, 164]
    indices = [65, 970, 230, 809, 516, 57, 334, 415, 674, 332]
    assert [wnid_to_index()[ilsvrc2012_wnids()[i - 1]] for i in ids] == indices


DEVKIT = {
    "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"490\n361\n171\n",
    "ILSVRC2012_devkit_t12/readme.txt": b"",
}


@pytest.mark.parametrize("form", ["folder", "tar.gz"])
def test_the_original_tar_is_read_with_the_devkit_as_it_was_downloaded(
    tmp_path: Path, form: str
) -> None:
    tar = write_tar(tmp_path / "ILSVRC2012_img_val.tar", FLAT)
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", {f"{TENCH}.tar": b""})
    if form == "folder":
        write_folder(tmp_path, DEVKIT)
    else:
        write_tar(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", DEVKIT, "w:gz")
    dataset = open_dataset(tar)
    check(dataset, FLAT, FLAT_LABELS)
    assert dataset.kind == "flat tar"
    check(open_dataset(tmp_path), FLAT, FLAT_LABELS)


def test_a_zip_is_read_with_its_map_file(tmp_path: Path) -> None:
    write_zip(tmp_path / "val.zip", FLAT)
    write_zip(tmp_path / "train.zip", {"x.JPEG": b""})
    write_folder(tmp_path, {"val_map.txt": LABEL_FILES["val_map.txt"].encode()})
    dataset = open_dataset(tmp_path)
    check(dataset, FLAT, FLAT_LABELS)
    assert dataset.kind == "flat zip"
    assert dataset.notes[0] == "file val.zip read, not file train.zip"


def test_kaggles_folders_are_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "ILSVRC/Data/CLS-LOC/val", FLAT)
    write_folder(tmp_path / "ILSVRC/Data/CLS-LOC/test", {"t.JPEG": b""})
    write_folder(tmp_path / "ILSVRC/Annotations/CLS-LOC", {"x.xml": b""})
    name = "LOC_val_solution.csv"
    write_folder(tmp_path, {name: LABEL_FILES[name].encode()})
    check(open_dataset(tmp_path), FLAT, FLAT_LABELS)


def test_names_need_not_be_imagenets_nor_without_folders(tmp_path: Path) -> None:
    files = {"cats/my photo.jpg": encoded(1), "b.png": encoded(2)}
    write_folder(tmp_path / "images", files)
    write_folder(tmp_path, {"my.txt": b"cats/my photo.jpg 281\nb 3\n"})
    dataset = open_dataset(tmp_path / "images", labels=tmp_path / "my.txt")
    check(dataset, files, [(3,), (281,)])
    assert dataset.kind == "folders"


@pytest.mark.parametrize("folders", [False, True])
def test_real_labels_are_several_and_images_without_any_are_left_out(
    tmp_path: Path, folders: bool
) -> None:
    names = [f"{TENCH}/{val(i)}" if folders else val(i) for i in (1, 2, 3)]
    write_folder(tmp_path / "val", dict(zip(names, FLAT.values(), strict=True)))
    real = write_folder(tmp_path, {"real.json": b"[[65, 60], [], [230], [1]]"}) / "real.json"
    dataset = open_dataset(tmp_path / "val", labels=real)
    assert list(dataset.names) == [names[0], names[2]]
    assert list(dataset.labels) == [(65, 60), (230,)]
    assert dataset.kind == ("class folders" if folders else "flat folder")
    assert dataset.read(1) == FLAT[val(3)]
    assert dataset.notes == (
        f"labels from {real}",
        "ReaL labels: 1 of 3 images have none",
        "ReaL labels: 1 of 4 images are not here",
    )


# WebDataset and parquet


def test_webdataset_shards_have_their_labels_beside_the_images(tmp_path: Path) -> None:
    for shard in range(2):  # both count from 0
        files = {"0.cls": b"65\n", "0.jpg": encoded(shard), "1.JPG": encoded(9), "1.cls": b"0"}
        write_tar(tmp_path / f"imagenet1k-validation-{shard:02}.tar", files | {"1.json": b"{}"})
    write_tar(tmp_path / "imagenet1k-train-0000.tar", {"0.cls": b"1", "0.jpg": b""})
    dataset = open_dataset(tmp_path)
    assert dataset.kind == "WebDataset"
    shards = [f"imagenet1k-validation-{i:02}.tar" for i in range(2)]
    assert list(dataset.names) == [f"{shard}/{n}" for shard in shards for n in ("0.jpg", "1.JPG")]
    assert list(dataset.labels) == [(65,), (0,)] * 2
    assert [dataset.read(i) for i in (0, 2, 3)] == [encoded(0), encoded(1), encoded(9)]
    one = open_dataset(tmp_path / shards[1])
    assert list(one.names) == ["0.jpg", "1.JPG"] and one.read(0) == encoded(1)


def test_webdataset_samples_stay_in_their_order_and_folders(tmp_path: Path) -> None:
    names = "val/b.png", "val/b.CLS", "train/a.png", "train/a.cls"
    contents = encoded(1), b"1", encoded(2), b"2"
    path = write_tar(tmp_path / "x.tar", dict(zip(names, contents, strict=True)))
    dataset = open_dataset(path)
    assert list(dataset.names) == ["val/b.png", "train/a.png"] and dataset.labels == [(1,), (2,)]
    assert [dataset.read(i) for i in (0, 1)] == [encoded(1), encoded(2)]


def test_parquet_shards_are_read_row_group_by_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    for i in range(2):
        write_parquet(data / f"validation-{i:05}-of-00002.parquet", range(5 * i, 5 * i + 5))
    write_parquet(data / "train-00000-of-00001.parquet", range(3))
    dataset = open_dataset(tmp_path)
    assert dataset.kind == "parquet"
    assert list(dataset.names) == [val(i) for i in range(10)]
    assert list(dataset.labels) == [(i % 3,) for i in range(10)]
    monkeypatch.setattr("internimage_jax.data_sources.MAX_CACHED_BYTES", 0)
    order = [3, 9, 0, 1, 2, 4, 8, 7, 6, 5] * 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(dataset.read, order)) == [encoded(i) for i in order]
    cached = dataset.container._cached  # type: ignore[attr-defined]
    assert len(cached) == 2
    for i in (0, 2, 4):  # row groups of two images
        dataset.read(i)
    assert list(cached) == [1, 2]  # the last ones


def test_images_of_one_path_in_parquet_files_get_numbers(tmp_path: Path) -> None:
    for i in range(2):
        write_parquet(tmp_path / f"validation-{i}.parquet", range(5))
    dataset = open_dataset(tmp_path)
    assert list(dataset.names) == [str(i) for i in range(10)]
    assert dataset.read(7) == encoded(2)


def test_parquet_labels_are_mapped_by_the_names_that_are_wordnet_ids(tmp_path: Path) -> None:
    feature = {"names": [TISSUE, SNAKE, TENCH], "_type": "ClassLabel"}
    metadata = {"info": {"features": {"label": feature}}}
    path = write_parquet(tmp_path / "x.parquet", range(3), metadata=metadata)
    assert list(open_dataset(path).labels) == [(999,), (65,), (0,)]
    feature["names"] = ["goldfish", "great white shark"]
    path = write_parquet(tmp_path / "x.parquet", range(3), metadata=metadata)
    with pytest.raises(ValueError, match=r"x\.parquet: labels are numbers of 2 classes without"):
        open_dataset(path)


@pytest.mark.parametrize("form", ["folder", "tar", "zip"])
def test_many_threads_read_the_same_as_one(tmp_path: Path, form: str) -> None:
    files = {f"{TENCH}/{i}.jpg": encoded(i) for i in range(20)}
    write = {"folder": write_folder, "tar": write_tar, "zip": write_zip}[form]
    dataset = open_dataset(write(tmp_path / "x", files))
    order = list(range(20)) * 10
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(dataset.read, order))
    assert read == [files[dataset.names[i]] for i in order]


def test_names_are_printable(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff\n.jpg")
    write_folder(tmp_path, {f"{TENCH}/{name}": encoded(0)})
    dataset = open_dataset(tmp_path)
    assert dataset.names[0].isprintable()
    assert dataset.read(0) == encoded(0)

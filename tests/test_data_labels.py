"""Label files in detail: which image a line names, which files count, what their text may be."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from internimage_jax import data_labels
from internimage_jax.data import open_dataset
from internimage_jax.labels import LabelClasses, checked_names, class_subsets
from tests.dataset_files import SNAKE, TENCH, encoded, val, write_folder, write_tar

TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def labelled(
    folder: Path, content: str, *images: str, classes: list[str] | None = None
) -> dict[str, int]:
    """Opens images with a label file of this content; gives the class of each."""
    write_folder(folder / "images", {image: encoded(0) for image in images})
    file = write_folder(folder, {"some labels": content.encode()}) / "some labels"
    dataset = open_dataset(folder / "images", labels=file, class_names=classes)
    return dict(zip(dataset.names, [label for (label,) in dataset.labels], strict=True))


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        ("p/a.png 1\na.png 2\n", ["p/a.png", "q/a.png"], "no label for image q/a.png"),
        ("p/a.png 1\nq/a.png 2\n", ["p/a.png"], "does not have image q/a"),
        ("a.png 1\nb.png 2\n", ["a.png"], "does not have image b"),
        ("1 a.png\n", ["a.png"], "no class: line 1: a.png"),
        ("a.png,cat\nb.png,2\n", ["a.png", "b.png"], "no class: line 1: cat"),  # no header
        ("file,class\n", ["a.png"], "no class: line 1: class"),  # nothing but one
        ("[" * 100_000, ["a.png"], "damaged JSON"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, content: str, images: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        labelled(tmp_path, content, *images)


def test_names_without_folders_count_where_they_are_of_one_image(tmp_path: Path) -> None:
    found = labelled(tmp_path, "p/a.png 1\nb.png 2\n", "p/a.png", "q/b.png")
    assert found == {"p/a.png": 1, "q/b.png": 2}


def test_the_suffix_does_not_count_nor_a_leading_slash(tmp_path: Path) -> None:
    content = "a 1\n/p/b.JPG 2\n./q/b 3\nv1.5 4\n"
    found = labelled(tmp_path, content, "a.PNG", "p/b.jpg", "q/b.gif", "v1.5.png")
    assert found == {"a.PNG": 1, "p/b.jpg": 2, "q/b.gif": 3, "v1.5.png": 4}


def test_numbers_of_the_validation_set_are_the_files_not_their_folders(tmp_path: Path) -> None:
    one, other = (f"{val(1)[:-5]}_parts/{name}.png" for name in "ab")
    found = labelled(tmp_path, f"{one} 1\n{other} 2\nb.png 3\n", one, other, "b.png")
    assert found == {one: 1, other: 2, "b.png": 3}
    assert labelled(tmp_path / "x", f"{val(1)} 3\n", f"{val(1)[:-5]}_{TENCH}.png") == {
        f"{val(1)[:-5]}_{TENCH}.png": 3
    }


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert labelled(tmp_path, "\ufeffa.png,3\n", "a.png") == {"a.png": 3}


def test_a_class_may_have_tabs_and_commas_in_its_name(tmp_path: Path) -> None:
    names = ["cat, tame", "big\tdog"]
    found = labelled(
        tmp_path, "a.png\tcat, tame\nb.png\tbig\tdog\n", "a.png", "b.png", classes=names
    )
    assert found == {"a.png": 0, "b.png": 1}
    assert labelled(tmp_path / "x", "a.png,cat, tame\n", "a.png", classes=names) == {"a.png": 0}


def test_labels_lie_with_or_beside_what_was_given(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "up" / "set" / "images", {"a.png": encoded(0)})
    write_folder(tmp_path / "up", {"val.txt": b"a.png 3\n"})
    with pytest.raises(ValueError, match="images without labels"):
        open_dataset(tmp_path / "up" / "set")  # those of up/ may be another set's
    assert open_dataset(tmp_path / "up").labels == [(3,)]
    (images.parent / "val.txt").write_text("a.png 4\n")
    (images / "val.txt").mkdir()  # a folder of that name is no label file
    assert open_dataset(images).labels == [(4,)]


def test_folders_like_wordnet_ids_are_none(tmp_path: Path) -> None:
    write_folder(tmp_path / "n014407640", {"a.png": encoded(0)})
    write_folder(tmp_path / "n014407640", {"val.txt": b"a.png 1\n"})
    assert open_dataset(tmp_path).labels == [(1,)]  # it is a folder to go into


def test_the_folder_of_a_class_by_its_number_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "7", {"a.jpg": encoded(0)})
    with pytest.raises(ValueError, match="7: is the folder of one class"):
        open_dataset(tmp_path / "7")


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_the_devkit_may_be_decompressed(tmp_path: Path, mode: str) -> None:
    images = write_folder(tmp_path / "val", {val(i): encoded(i) for i in (1, 2)})
    kit = write_tar(tmp_path / "kit", {f"kit/data/{TRUTH}": b"490\n361\n"}, mode)
    assert open_dataset(images, labels=kit).labels == [(65,), (970,)]
    with pytest.raises(ValueError, match="kit: not a text file, expected labels"):
        open_dataset(images, labels=kit, class_names=["cat", "dog"])  # it is of other classes


def test_a_devkits_files_are_plain_and_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_folder(tmp_path / "val", {val(1): encoded(1)})
    kit = write_tar(tmp_path / "kit", {f"kit/data/{TRUTH}": b"490\n"})
    with tarfile.open(kit, "a") as tar:
        folder = tarfile.TarInfo(f"kit/{TRUTH}")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert open_dataset(images, labels=kit).labels == [(65,)]
    monkeypatch.setattr(data_labels, "MAX_DEVKIT_FILE", 3)
    with pytest.raises(ValueError, match=f"kit: {TRUTH} has 4 bytes"):
        open_dataset(images, labels=kit)


def test_what_is_no_class_for_a_reason() -> None:
    assert LabelClasses().parse("9" * 5000) is None  # Python's int refuses it
    assert LabelClasses(("cafe\u0301", "tea")).parse("caf\u00e9") == 0
    assert LabelClasses(("cat", "7")).parse("1") is None  # "7" is a name, so no number is an index
    assert LabelClasses(("cat", "dog")).parse("1") == 1
    with pytest.raises(ValueError, match="expected a list of names, got '  '"):
        checked_names(["cat", "  "])
    assert all(list(subset) == sorted(subset) for subset in class_subsets().values())
    assert data_labels.is_wnid(SNAKE) and not data_labels.is_wnid(f"{SNAKE}0")

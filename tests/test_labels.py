"""Class names, and the map from ImageNet-1K to ImageNet-22K."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from internimage_jax import labels


def shipped(name: str) -> str:
    return (resources.files("internimage_jax") / "data_files" / name).read_text("utf-8")


def test_classes_stand_in_the_order_of_their_wordnet_ids() -> None:
    classes = labels.imagenet1k_classes()
    assert [one.index for one in classes] == list(range(1000))
    wnids = [one.wnid for one in classes]
    assert wnids == sorted(set(wnids), key=str)
    assert classes[0] == labels.ImageClass(0, "n01440764", "tench")
    assert classes[999].wnid == "n15075141"


def test_wordnet_ids_give_the_index_back() -> None:
    index = labels.wnid_to_index()
    assert len(index) == 1000
    assert all(index[str(one.wnid)] == one.index for one in labels.imagenet1k_classes())
    with pytest.raises(TypeError):
        index["n00000000"] = 1  # type: ignore[index]


def test_map_repeats_one_class_only() -> None:
    indices = labels.map_22k_to_1k()
    assert indices.shape == (1000,) and indices.dtype == np.int32
    assert indices[0] == 359 and indices[999] == 21815
    repeated = {i for i in range(1, 1000) if indices[i] <= indices[i - 1]}
    assert repeated == labels.CLASSES_WITHOUT_22K == {850}
    assert indices[850] == indices[849]
    with pytest.raises(ValueError, match="read-only"):
        indices[0] = 1


def test_shipped_tables_are_the_reference_ones() -> None:
    reference = os.environ.get("INTERNIMAGE_REFERENCE")
    if not reference:
        pytest.skip("needs INTERNIMAGE_REFERENCE")
    for name in ("imagenet1k_classes.tsv", "map22kto1k.txt"):
        assert shipped(name) == (Path(reference) / name).read_text("utf-8")


def test_1000_outputs_have_imagenet_names() -> None:
    assert labels.class_names(1000) == labels.imagenet1k_classes()


def test_21841_outputs_have_names_where_the_map_tells() -> None:
    classes = labels.class_names(21841)
    assert [one.index for one in classes] == list(range(21841))
    assert sum(one.wnid is not None for one in classes) == 999
    assert classes[359] == labels.ImageClass(359, "n01440764", "tench")
    assert classes[12345] == labels.ImageClass(12345, None, "class 12345")
    shared = int(labels.map_22k_to_1k()[850])
    assert classes[shared].name == "teapot"  # 849's, not 850's, "teddy"


@pytest.mark.parametrize("count", [0, 1, 10, 1001])
def test_other_counts_have_numbers(count: int) -> None:
    expected = tuple(labels.ImageClass(i, None, f"class {i}") for i in range(count))
    assert labels.class_names(count) == expected


def test_negative_count_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^num_classes: got -1, expected 0 or more$"):
        labels.class_names(-1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("index\twnid", "index wnid", "t.tsv, line 1: got"),
        ("\n5\t", "\n6\t", "t.tsv, line 7: got"),
        ("n01440764", "n0144076", "t.tsv, line 2: got"),
        ("\tgoldfish\n", "\t\n", "t.tsv, line 3: got"),
        ("\tgoldfish\n", "\tgoldfish\textra\n", "t.tsv, line 3: got"),
        ("n01443537", "n01440764", "t.tsv, line 3: n01440764 is also the id of 0"),
        ("1\tn01443537\tgoldfish\n", "", "t.tsv: 999 classes, expected 1000"),
    ],
)
def test_damaged_class_table_is_an_error(old: str, new: str, message: str) -> None:
    text = shipped("imagenet1k_classes.tsv")
    assert old in text
    with pytest.raises(ValueError) as caught:
        labels._parse_classes(text.replace(old, new, 1), "t.tsv")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("line", "value", "message"),
    [
        (1, "tench", "m.txt, line 1: got 'tench', expected an index from 0 to 21840"),
        (1, "-1", "m.txt, line 1: got '-1'"),
        (2, "359", "m.txt, line 2: got '359', expected an index from 360 to 21840"),
        (1000, "21841", "m.txt, line 1000: got '21841'"),
        (3, "", "m.txt: 999 indices, expected 1000"),
    ],
)
def test_damaged_map_is_an_error(line: int, value: str, message: str) -> None:
    lines = shipped("map22kto1k.txt").splitlines()
    lines[line - 1] = value
    with pytest.raises(ValueError) as caught:
        labels._parse_map("\n".join(lines), "m.txt")
    assert str(caught.value).startswith(message)

"""Evaluation of a model with classes of its own: labels by their names, figures under them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from internimage_jax import Predictor, create_model, from_pretrained, save_pretrained
from internimage_jax.__main__ import main
from internimage_jax.config import InternImageConfig
from internimage_jax.data import open_dataset
from internimage_jax.evaluate import evaluate
from internimage_jax.labels import class_names, own_classes
from internimage_jax.model import InternImage
from tests.dataset_files import encoded, write_folder, write_parquet, write_tar

FRUIT = ["apple pie", "fig", "quince"]
CONFIG = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), num_classes=3)
FOLDERS = {f"{name}/{i}.jpg": encoded(3 * j + i) for j, name in enumerate(FRUIT) for i in range(3)}


NESTED = r"has folders of classes in it, such as (fig|quince); give the folder that is to be read"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = create_model(CONFIG, classes=FRUIT, seed=3)
    return save_pretrained(model, tmp_path_factory.mktemp("model") / "fruit")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "val", FOLDERS)


def test_a_checkpoint_and_class_folders(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = evaluate(checkpoint, data.parent, batch_size=2, output=out)
    said = list(Predictor(from_pretrained(checkpoint))([data / name for name in FOLDERS]))
    assert all(len(one.classes) == 3 for one in said)  # all there are, not five
    right = {
        name: one.classes[0].name == name.split("/")[0]
        for name, one in zip(FOLDERS, said, strict=True)
    }
    assert report["correct_top1"] == sum(right.values())
    assert report["correct_top5"] == report["num_images"] == 9  # there are but three classes
    assert (report["classes"], report["num_classes"]) == (FRUIT, 3)
    rows = {one["name"]: one for one in report["per_class"]}
    assert list(rows) == FRUIT and all(one["wnid"] is None for one in rows.values())
    for name, one in rows.items():
        ours = [is_right for file, is_right in right.items() if file.split("/")[0] == name]
        assert (one["images"], one["correct_top1"]) == (3, sum(ours))
    assert report["notes"] == ["The model has 3 classes: top-5 is right for every image."]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert all(sorted(line["top5"]) == [0, 1, 2] for line in lines)
    page = (out / "report.html").read_text()
    assert "apple pie" in page and "model card" not in page and "tench" not in page
    assert "WordNet" not in page
    again = evaluate(checkpoint, data.parent, batch_size=2, output=out, resume=True)
    assert again["per_class"] == report["per_class"]


def test_the_command(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--model", str(checkpoint), "--batch-size", "2", "--no-compilation-cache"]
    assert main(["evaluate", str(data), "--model", f"{checkpoint}x"]) == 1
    assert "fruitx: no such file or folder" in capsys.readouterr().err
    assert main(["evaluate", str(data), *options, "--image-size", "48", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["classes"], report["image_size"]) == (FRUIT, 48)
    for name in "ab":
        assert main(["evaluate", str(data), *options, "--output", str(tmp_path / name)]) == 0
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0


@pytest.mark.parametrize("form", ["underscores", "indices", "tar", "csv", "tabs", "webdataset"])
def test_every_form_of_labels(form: str, tmp_path: Path) -> None:
    folder = {name: name for name in FRUIT}
    if form == "underscores":
        folder["apple pie"] = "apple_pie"
    elif form == "indices":
        folder |= {"apple pie": "0", "quince": "2"}
    between = "/" if form in ("underscores", "indices", "tar") else "-"
    names = {f"{folder[fruit]}{between}{i}.jpg": fruit for fruit in FRUIT for i in range(3)}
    files, labels = {name: encoded(0) for name in names}, None
    if form in ("csv", "tabs"):
        labels = tmp_path / "labels.txt"
        comma = "," if form == "csv" else "\t"
        labels.write_text("".join(f"{name}{comma}{fruit}\n" for name, fruit in names.items()))
    if form == "webdataset":
        files |= {name.replace(".jpg", ".cls"): fruit.encode() for name, fruit in names.items()}
    if form in ("tar", "webdataset"):
        path = write_tar(tmp_path / "x.tar", files)
    else:
        path = write_folder(tmp_path / "images", files)
    dataset = open_dataset(path, labels=labels, class_names=FRUIT)
    found = dict(zip(dataset.names, dataset.labels, strict=True))
    assert found == {name: (FRUIT.index(fruit),) for name, fruit in names.items()}
    assert dataset.class_names == tuple(FRUIT) and dataset.classes is None


def test_names_in_parquet_count_and_not_their_order(tmp_path: Path) -> None:
    feature = {"names": ["quince", "apple pie", "fig"], "_type": "ClassLabel"}
    metadata = {"info": {"features": {"label": feature}}}
    path = write_parquet(tmp_path / "x.parquet", range(6), metadata=metadata)
    assert list(open_dataset(path, class_names=FRUIT).labels) == [(2,), (0,), (1,)] * 2
    path = write_parquet(tmp_path / "x.parquet", range(3))  # without names
    assert list(open_dataset(path, class_names=FRUIT).labels) == [(0,), (1,), (2,)]
    feature["names"].pop()  # so that a label has none, and is no index of another's
    path = write_parquet(tmp_path / "x.parquet", range(3), metadata=metadata)
    with pytest.raises(ValueError, match="no class of the model for label 2 of 2"):
        open_dataset(path, class_names=FRUIT)


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        (
            {"pear/0.jpg": b"", "quince/0.jpg": b""},
            None,
            r"of the model for folder pear; .*'apple pie'",
        ),
        ({"3/0.jpg": encoded(0), "2/0.jpg": b""}, None, "numbers from 0 to 2"),
        ({"a.jpg": encoded(0)}, "n01440764\n", r"line 1: n01440764; expected an image's name"),
        ({"a.jpg": encoded(0)}, "a.jpg\tpear\nb.jpg\tpear\n", r"line 2: pear"),
        ({"a.jpg": encoded(0)}, "[[0]]", "expected an image's name and its class"),
        ({"a.jpg": encoded(0)}, "a.jpg pear\nb.jpg fig\n", "line 1: pear"),
        ({"train/fig/0.jpg": b"", "train/quince/0.jpg": b"", "x/fig/0.jpg": b""}, None, NESTED),
        ({"0/fig/0.jpg": b"", "1/quince/0.jpg": b""}, None, NESTED),
        ({"fig/0.jpg": b"", "0.jpg": b""}, None, r"outside .* there is image 0\.jpg"),
    ],
)
def test_what_is_no_class_of_the_model_is_named(
    files: Mapping[str, bytes], labels: str | None, message: str, tmp_path: Path
) -> None:
    path, file = write_folder(tmp_path / "data", files), None
    if labels is not None:
        file = tmp_path / "labels.txt"
        file.write_text(labels)
    with pytest.raises(ValueError, match=message):
        open_dataset(path, labels=file, class_names=FRUIT)


def test_a_class_may_be_called_as_a_split_is(tmp_path: Path) -> None:
    names = ["car", "train", "val"]
    files = {f"{split}/{name}/0.jpg": b"" for split in ("train", "val") for name in names}
    write_folder(tmp_path, files)
    with pytest.raises(ValueError, match="train has folders of classes in it, such as car"):
        open_dataset(tmp_path, class_names=names)
    labels = open_dataset(tmp_path / "val", class_names=names).labels
    assert list(labels) == [(0,), (1,), (2,)]


def test_names_that_are_numbers_are_no_indices(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{name}/0.jpg": b"" for name in ("1", "2", "3")})
    dataset = open_dataset(tmp_path, class_names=["1", "2", "3"])
    assert list(dataset.labels) == [(0,), (1,), (2,)]
    write_folder(tmp_path, {"0/0.jpg": b""})
    with pytest.raises(ValueError, match=r"for folder 0; expected the model's, such as '1'$"):
        open_dataset(tmp_path, class_names=["1", "2", "3"])


def test_the_name_of_several_classes_is_none_but_its_index_serves(tmp_path: Path) -> None:
    names = ["crane", "crane", "owl"]
    write_folder(tmp_path, {"0/0.jpg": b"", "1/0.jpg": b"", "owl/0.jpg": b""})
    assert list(open_dataset(tmp_path, class_names=names).labels) == [(0,), (1,), (2,)]
    write_folder(tmp_path, {"crane/0.jpg": b""})
    with pytest.raises(ValueError, match=r"for folder crane; .*'crane' is several classes"):
        open_dataset(tmp_path, class_names=names)


def test_names_beyond_ascii_and_with_commas(tmp_path: Path) -> None:
    names = ["cr\u00e8me", "pear", "pear, common"]
    write_folder(tmp_path / "folders", {"cre\u0300me/0.jpg": b"", "pear/0.jpg": b""})
    assert list(open_dataset(tmp_path / "folders", class_names=names).labels) == [(0,), (1,)]
    cls = {"0.jpg": b"", "0.cls": names[0].encode(), "1.jpg": b"", "1.cls": b"pear, common"}
    tar = write_tar(tmp_path / "x.tar", cls)
    assert list(open_dataset(tar, class_names=names).labels) == [(0,), (2,)]
    flat = write_folder(tmp_path / "flat", {f"{i}.jpg": b"" for i in range(3)})
    file = tmp_path / "labels.txt"
    file.write_text('0.jpg,pear, common\n1.jpg,pear\n2.jpg,"pear, common",x\n')
    assert list(open_dataset(flat, labels=file, class_names=names).labels) == [(2,), (1,), (2,)]


def test_imagenets_names_are_no_others(tmp_path: Path) -> None:
    write_folder(tmp_path, {"n01440764/0.jpg": b""})
    names = [one.name for one in class_names(1000)]
    dataset = open_dataset(tmp_path, class_names=names)
    assert list(dataset.labels) == [(0,)] and dataset.class_names is None


def test_data_with_other_classes_than_the_model_is_an_error(data: Path) -> None:
    model = create_model(CONFIG, classes=FRUIT[::-1])
    with pytest.raises(
        ValueError, match=r"of 3 classes such as 'apple pie', and .* such as 'quince'"
    ):
        evaluate(model, open_dataset(data, class_names=FRUIT))


def test_a_model_whose_classes_are_unknown_is_an_error(data: Path) -> None:
    model = InternImage(CONFIG.replace(num_classes=10), name="flowers")
    with pytest.raises(ValueError, match=r"flowers: has 10 classes without names, expected 1000 "):
        evaluate(model, data)


def test_whose_classes_they_are() -> None:
    assert own_classes("m", 3, FRUIT) == tuple(FRUIT)
    for count in (1000, 21841):
        assert own_classes("m", count, None) is None
        names = [one.name if one.wnid else f"synset {one.index}" for one in class_names(count)]
        assert own_classes("m", count, names) is None
        flowers = [f"flower {i}" for i in range(count)]
        assert own_classes("m", count, flowers) == tuple(flowers)

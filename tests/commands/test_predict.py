"""`predict`: results on stdout as they come, one line on stderr for an error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from PIL import Image

from internimage_jax.__main__ import main
from internimage_jax.commands.predict import print_table
from internimage_jax.labels import imagenet1k_classes
from internimage_jax.predict import PredictedClass, Prediction
from tests.commands.running import CAT, Capture, buffered, error_of, run_python, write_images


@pytest.fixture(scope="module")
def lines(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `predict --json` prints for a folder of three images and the cat."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 3)
    arguments = ["predict", str(folder), CAT, "--model", checkpoint, "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*arguments, "--topk", "3", "--batch-size", "2"]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_json_is_one_object_an_image_in_order(lines: list[dict[str, Any]]) -> None:
    names = [Path(line["file"]).name for line in lines]
    assert names == ["0.png", "1.png", "2.png", "cat.jpg"]
    for line in lines:
        assert set(line) == {"file", "model", "predictions"}
        probabilities = [one["probability"] for one in line["predictions"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
        for one in line["predictions"]:
            assert set(one) == {"index", "wnid", "name", "probability"}
            assert one["wnid"] == imagenet1k_classes()[one["index"]].wnid


def test_half_precision_gives_nearly_the_same_answer(
    lines: list[dict[str, Any]], checkpoint: str, capsys: Capture
) -> None:
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm promotes bfloat16
        assert main(["predict", CAT, "--model", checkpoint, "--dtype", "bfloat16", "--json"]) == 0
    half = json.loads(capsys.readouterr().out)["predictions"][0]
    full = lines[-1]["predictions"][0]
    assert half["index"] == full["index"]
    assert half["probability"] != full["probability"]
    assert half["probability"] == pytest.approx(full["probability"], rel=0.2)


def test_a_bad_image_is_one_line_after_the_results_of_the_batches_before_it(
    checkpoint: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_images(tmp_path, 4)
    Image.new("RGB", (50, 50)).save(paths[3])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # PIL itself would warn, up to 4000
    arguments = ["predict", *paths, "--model", checkpoint, "--batch-size", "2", "--json"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["file"] for line in out.splitlines()] == paths[:2]
    assert err.startswith(f"error: {paths[3]}: ")
    assert "2500 pixels" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_of_an_image_that_is_too_large_pil_has_nothing_to_add(
    command: str, checkpoint: str, tmp_path: Path
) -> None:
    folder = tmp_path / str(imagenet1k_classes()[0].wnid)
    folder.mkdir()
    Image.new("1", (10_000, 10_000)).save(folder / "large.png")
    options = (str(tmp_path), "--model", checkpoint, "--batch-size", "1", "--json")
    process = run_python("-m", "internimage_jax", command, *options)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: ") and "100000000 pixels" in err and err.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_bad_image_can_be_skipped_and_is_one_line(
    checkpoint: str, tmp_path: Path, capsys: Capture, options: list[str]
) -> None:
    paths = write_images(tmp_path, 3)
    Path(paths[1]).write_bytes(b"no image")
    arguments = ["predict", *paths, "--model", checkpoint, "--on-error", "skip"]
    assert main([*arguments, *options]) == 0
    out, err = capsys.readouterr()
    if options:
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["file"] for line in lines] == paths
        assert [len(line["predictions"]) for line in lines] == [5, 0, 5]
        assert [line.get("error", "")[: len(paths[1])] for line in lines] == ["", paths[1], ""]
        assert err == ""
    else:
        assert [path for path in paths if path in out] == [paths[0], paths[2]]
        assert err.startswith(f"skipped: {paths[1]}: ")
        assert err.count("\n") == 1


def test_that_no_image_could_be_read_is_an_error(
    checkpoint: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    arguments = ["predict", str(tmp_path), "--model", checkpoint, "--on-error", "skip"]
    assert main([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] and err == "error: none of the 1 images could be read\n"


def test_a_table_shows_path_class_wordnet_id_probability_and_name(capsys: Capture) -> None:
    # A path is text, however much it looks like markup, and on one line, however long.
    file = "folder/" * 30 + "[bold]:cat:.jpg"
    classes = (
        PredictedClass(281, "n02123045", "tabby cat", 0.75),
        PredictedClass(7, None, "class 7", 0.00125),
    )
    print_table(Prediction(file, classes))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    title, headings, _, *rows = lines
    assert title == file
    assert headings.split() == ["class", "WordNet", "id", "probability", "name"]
    assert [row.split() for row in rows] == [
        ["281", "n02123045", "75.00%", "tabby", "cat"],
        ["7", "0.12%", "class", "7"],
    ]


def test_a_path_that_no_terminal_can_show_is_quoted(capsys: Capture) -> None:
    print_table(Prediction("a\udcff\n.jpg", ()))
    assert capsys.readouterr().out.startswith("'a\\udcff\\n.jpg'\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "none.png: no such file or folder"),
        ([CAT, "--model", "internimage_t_1k_244"], "internimage_t_1k_224"),
        ([CAT, "--topk", "1001"], "topk: got 1001, expected 1 to 1000"),
        ([CAT, "--topk", "0"], "topk: got 0, expected 1 to 1000"),
        ([CAT, "--image-size", "0"], "image_size: got 0, expected an integer from 1"),
        ([CAT, "--batch-size", "0"], "batch_size: got 0, expected at least 1"),
    ],
)
def test_what_does_not_fit_is_one_line(
    checkpoint: str, capsys: Capture, arguments: list[str], message: str
) -> None:
    if "--model" not in arguments:
        arguments = [*arguments, "--model", checkpoint]
    assert message in error_of(capsys, "predict", *arguments)


def test_a_damaged_checkpoint_is_one_line(checkpoint: str, tmp_path: Path, capsys: Capture) -> None:
    for name in os.listdir(checkpoint):
        content = (Path(checkpoint) / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-10] if name.endswith("safetensors") else content)
    assert str(tmp_path) in error_of(capsys, "predict", CAT, "--model", str(tmp_path))


def test_options_reach_the_model_and_the_predictor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Built(Exception):
        pass

    def load(name: str, **options: Any) -> Any:
        return name, options

    def build(model: Any, **options: Any) -> None:
        raise Built(model, options)

    monkeypatch.setattr("internimage_jax.pretrained.from_pretrained", load)
    monkeypatch.setattr("internimage_jax.predict.Predictor", build)

    def built(*options: str) -> tuple[Any, ...]:
        with pytest.raises(Built) as caught:
            main(["predict", str(tmp_path), *options])
        return caught.value.args

    write_images(tmp_path, 9)
    wanted = {"dtype": "float32", "implementation": None, "image_size": None}
    by_default = ("internimage_t_1k_224", wanted), {"batch_size": 8, "topk": None}
    assert built() == by_default
    options = "--model mine --dtype float16 --implementation gather --image-size 96"
    options += " --batch-size 50 --topk 2"
    wanted = {"dtype": "float16", "implementation": "gather", "image_size": 96}
    given = ("mine", wanted), {"batch_size": 9, "topk": 2}  # no more than there are images
    assert built(*options.split()) == given


def test_a_result_is_there_before_the_next_images_are(checkpoint: str, tmp_path: Path) -> None:
    late = tmp_path / "late.png"
    os.mkfifo(late)
    options = ["--model", checkpoint, "--batch-size", "1", "--json"]
    command = ("-m", "internimage_jax", "predict", CAT, str(late), CAT, *options)
    process = run_python(*command, env=buffered())
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0]
    assert json.loads(process.stdout.readline())["file"] == CAT
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    late.write_bytes((tmp_path / "image.png").read_bytes())
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert [json.loads(line)["file"] for line in out.splitlines()] == [str(late), CAT]


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_what_a_terminal_shows_of_the_progress_is_not_in_the_results(
    command: str, checkpoint: str, tmp_path: Path
) -> None:
    folder = tmp_path / str(imagenet1k_classes()[0].wnid)
    write_images(folder, 3)
    ours, theirs = os.openpty()
    arguments = [command, str(tmp_path), "--model", checkpoint, "--batch-size", "1", "--json"]
    process = subprocess.run(
        [sys.executable, "-m", "internimage_jax", *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
        timeout=60,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:
        while part := terminal.read(4096):
            shown += part
    assert process.returncode == 0
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(lines) == (3 if command == "predict" else 1)
    assert b"Loading" in shown and b"Images" in shown
    if command == "evaluate":
        assert f"top-1 {lines[0]['top1']:.2f} %".encode() in shown and b"3/3" in shown

"""Where a conversion writes: what it replaces and what not, and the command that runs it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import convert
from convert.__main__ import main
from tests.recipe_checkpoints import CONFIG, weights, write, write_settings

ROOT = Path(__file__).parent.parent
Capture = pytest.CaptureFixture[str]


# ---- where to write


def test_a_folder_with_other_files_is_not_replaced(tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    for name, files in {
        "other": {"notes.txt": ""},
        "converted with more": {"config.json": '{"format": "internimage_jax"}', "notes.txt": ""},
        # The same two names as ours, and another's work.
        "huggingface": {"config.json": '{"channels": 8}', "model.safetensors": "x"},
        "half": {"model.safetensors": "x"},
        "no JSON": {"config.json": "{"},
    }.items():
        out = tmp_path / name
        out.mkdir()
        for file, text in files.items():
            (out / file).write_text(text)
        with pytest.raises(FileExistsError, match=f"{name}: is a folder with other files"):
            convert(source, out, model=CONFIG)
        assert {path.name: path.read_text() for path in out.iterdir()} == files


def test_an_empty_folder_and_a_converted_one_are_replaced(tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    out = tmp_path / "out"
    out.mkdir()
    for dtype in ("float32", "float16"):
        convert(source, out, model=CONFIG, dtype=dtype)
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert sorted(tmp_path.iterdir()) == [out, source]


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for out in (".", tmp_path / "out"):
        with pytest.raises(FileExistsError, match="is the current folder"):
            convert(source, out, model=CONFIG)
    assert not list((tmp_path / "out").iterdir())


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file: is a file; the converted model is a folder"):
        convert(source, tmp_path / "file", model=CONFIG)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match=r"folder: is no file; a \.pth is one"):
        convert(source, tmp_path / "folder", model=CONFIG, to_torch=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe: is no file"):
        convert(source, tmp_path / "pipe", model=CONFIG, to_torch=True)
    with pytest.raises(FileExistsError, match="file: is there, and was not written here"):
        convert(source, tmp_path / "file", model=CONFIG, to_torch=True)
    assert (tmp_path / "file").read_text() == "mine"
    other = tmp_path / "other.pth"
    before = source.read_bytes().replace(b"internimage_jax", b"released_models")
    other.write_bytes(before)
    with pytest.raises(FileExistsError, match=r"other\.pth: is there, and was not written here"):
        convert(source, other, model=CONFIG, to_torch=True)
    assert other.read_bytes() == before


@pytest.mark.parametrize("layout", ["pth", "hf", "converted"])
def test_nothing_is_converted_in_place(layout, tmp_path, monkeypatch) -> None:
    source = write(tmp_path / "source", "hf" if layout == "converted" else layout)
    if layout == "converted":
        source = convert(source, tmp_path / "converted")
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    link = tmp_path / "link"
    link.symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for out in (source, link, Path(source.name)):
        for to_torch in (False, True):
            with pytest.raises(FileExistsError):
                convert(source, out, model=CONFIG, to_torch=to_torch)
    if source.is_dir():
        weights_file = source / "model.safetensors"
        with pytest.raises(FileExistsError, match="source or holds it"):
            convert(weights_file, source, model=CONFIG)
        with pytest.raises(FileExistsError, match="source or holds it"):
            convert(source, weights_file, model=CONFIG, to_torch=True)
    link.unlink()
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before


def test_a_folder_within_the_source_is_no_part_of_it(tmp_path) -> None:
    source = write(tmp_path / "hf", "hf-shards")
    out = convert(source, source / "converted")
    again = convert(source, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_of_a_link_what_it_points_to_is_replaced(tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    (tmp_path / "disk").mkdir()
    for name, to_torch in (("folder", False), ("file.pth", True)):
        link = tmp_path / name
        link.symlink_to(tmp_path / "disk" / name)
        for _ in range(2):  # the first makes what the link points to
            convert(source, link, model=CONFIG, to_torch=to_torch)
            assert link.is_symlink()
            assert sorted(p.name for p in (tmp_path / "disk").iterdir() if "." in p.name[:1]) == []
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["file.pth", "folder"]


def test_folders_above_are_made_and_after_an_error_removed(tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    convert(source, tmp_path / "a" / "b" / "out", model=CONFIG)
    arrays = weights(CONFIG) | {"head.bias": np.full(10, np.nan, np.float32)}
    bad = write(tmp_path / "bad" / "weights.pth", "pth", arrays=arrays)
    with pytest.raises(ValueError, match="not finite"):
        convert(bad, tmp_path / "c" / "d" / "out", model=CONFIG)
    with pytest.raises(ValueError, match="not finite"):
        convert(bad, tmp_path / "a" / "e" / "out", model=CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "bad", "weights.pth"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("to_torch", [False, True])
def test_a_place_that_cannot_be_written_is_an_error_that_names_it(
    to_torch, tmp_path, capsys: Capture
) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    settings = tmp_path / "m"
    settings.mkdir()
    write_settings(settings, CONFIG)
    options = ["--model", str(settings / "config.json"), *["--to-torch"][: int(to_torch)]]
    places = [tmp_path / "weights.pth" / "out", tmp_path / "weights.pth" / "a" / "out"]
    places.append(tmp_path / ("x" * 250))  # the name beside it is too long
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        places.append(tmp_path / "locked" / "out")
    for out in places:
        assert main([str(source), str(out), *options]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert str(out.parent if out.name == "out" else out) in captured.err


# ---- the command line


def run_convert(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_the_command_prints_the_path_and_its_errors_are_one_line(tmp_path) -> None:
    source = write(tmp_path / "hf", "hf-bin")
    done = run_convert(source, tmp_path / "out", "--num-classes", "3", "--dtype", "bfloat16")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n")
    note = "left out the head of 10 classes; made a new one of 3 classes, not trained"
    assert done.stderr == f"{source}: {note}\n"
    failed = run_convert(tmp_path / "none", tmp_path / "out2")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == f"error: {tmp_path / 'none'}: no such file or folder\n"


def test_the_command_has_every_option_of_the_function(tmp_path, capsys: Capture) -> None:
    source = write(tmp_path / "run.pth", "trainer")
    folder = write(tmp_path / "hf", "hf")
    model = ["--model", str(folder)]
    assert main([str(source), str(tmp_path / "a"), *model, "--weights", "ema"]) == 0
    assert main([str(tmp_path / "a"), str(tmp_path / "b.pth"), "--to-torch"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}\n{tmp_path / 'b.pth'}\n"
    assert main([str(source), str(tmp_path / "c"), *model, "--to-1k"]) == 1
    assert "to_1k needs a head of 21841 classes" in capsys.readouterr().err
    for wrong in (["--dtype", "int8"], ["--weights", "best"], ["--num-classes", "x"], []):
        with pytest.raises(SystemExit) as caught:
            main([str(source), *([str(tmp_path / "d")] if wrong else []), *wrong])
        assert caught.value.code == 2
    assert not (tmp_path / "d").exists()


def test_without_options_the_command_is_the_function_without_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []
    monkeypatch.setattr("convert.__main__.convert", lambda **options: given.append(options))
    assert main(["a.pth", "out"]) == 0
    wanted = inspect.signature(convert).bind("a.pth", "out")
    wanted.apply_defaults()
    assert given == [wanted.arguments]


def test_an_error_is_one_line_even_if_a_name_has_two(tmp_path, capsys: Capture) -> None:
    assert main([str(tmp_path / "two\nlines"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_converting_imports_neither_torch_nor_jax(tmp_path) -> None:
    source = write(tmp_path / "hf", "hf-bin")
    code = (
        "import sys; from convert.__main__ import main; status = main(sys.argv[1:]);"
        "unwanted = {'torch', 'jax', 'flax', 'huggingface_hub', 'safetensors'};"
        "print(unwanted & set(sys.modules), status)"
    )
    for out, more in (("out", []), ("out.pth", ["--to-torch"])):
        arguments = [sys.executable, "-c", code, str(source), str(tmp_path / out), *more]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "set() 0", done.stderr

"""The command line: results on stdout, one line on stderr for an error, exit statuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from internimage_jax.__main__ import main
from internimage_jax.cache import cache_folder, keep_compiled_programs
from internimage_jax.commands import demo, info, models
from internimage_jax.commands.predict import print_table
from internimage_jax.config import InternImageConfig, list_models
from internimage_jax.labels import imagenet1k_classes
from internimage_jax.predict import PredictedClass, Prediction

CAT = str(resources.files("internimage_jax") / "data_files" / "cat.jpg")
CONFIG = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "released"
    demo.write_checkpoint(folder, CONFIG, image_size=32)
    return str(folder)


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{i}.png") for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((40, 40, 3), 20 * i, np.uint8)).save(path)
    return paths


def error_of(capsys: Capture, *arguments: str) -> str:
    """Returns the one line that the failing command prints, checked to be all that it prints."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def run_python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def buffered() -> dict[str, str]:
    """The environment, with output buffered as it is unless somebody asks for other things."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


# predict


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


def test_traceback_shows_where_an_error_came_from() -> None:
    for arguments in (["--traceback", "predict"], ["predict", "--traceback"]):
        with pytest.raises(FileNotFoundError):
            main([*arguments, "none.png"])


def test_the_version_is_that_of_the_package(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"internimage-jax {metadata.version('internimage-jax')}\n"


def test_a_wrong_command_line_exits_with_2(capsys: Capture) -> None:
    for arguments in ([], ["predict"], ["predict", CAT, "--topk", "x"], ["train"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    capsys.readouterr()


def test_ctrl_c_exits_with_130_and_without_a_traceback(checkpoint: str, tmp_path: Path) -> None:
    paths = write_images(tmp_path, 1) * 3000
    program = (
        "import signal, sys; from internimage_jax.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
        "sys.exit(main(sys.argv[1:]))"
    )
    options = ["--model", checkpoint, "--batch-size", "1", "--json"]
    process = run_python("-c", program, "predict", *paths, *options)
    assert process.stdout is not None
    process.stdout.readline()  # it is at work
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""


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


# list


def card(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


def test_list_agrees_with_the_model_cards(capsys: Capture) -> None:
    assert main(["list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == list_models()
    for name, size, parameters, multiply_adds, top1 in (
        ("internimage_t_1k_224", 224, 30, 5, 83.5),
        ("internimage_s_1k_224", 224, 50, 8, 84.2),
        ("internimage_b_1k_224", 224, 97, 16, 84.9),
        ("internimage_l_22kto1k_384", 384, 223, 108, 87.7),
        ("internimage_xl_22kto1k_384", 384, 335, 163, 88.0),
    ):
        row = card(rows, name)
        assert (row["image_size"], row["top1"], row["license"]) == (size, top1, "MIT")
        assert row["parameters"] / 1e6 == pytest.approx(parameters, abs=0.55)
        assert round(row["multiply_adds"] / 1e9) == multiply_adds
    for name, parameters, multiply_adds in (
        ("internimage_h_22kto1k_640", 1.08e9, 1478e9),
        ("internimage_g_22kto1k_512", 3.00e9, 2700e9),
    ):
        row = card(rows, name)
        assert row["parameters"] == pytest.approx(parameters, rel=0.03)
        assert row["multiply_adds"] == pytest.approx(multiply_adds, rel=0.011)
    assert card(rows, "internimage_l_22k_384")["num_classes"] == 21841
    assert card(rows, "internimage_l_22k_384")["top1"] is None


def test_list_shows_a_row_a_model(capsys: Capture) -> None:
    assert main(["list", "internimage_?_1k*"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("internimage")]
    assert " ".join(rows[0]) == "internimage_t_1k_224 224 1,000 29.9 M 5 G 83.5 MIT"
    assert [row[0] for row in rows] == list_models("internimage_?_1k*")


def test_a_pattern_that_nothing_matches_is_an_error(capsys: Capture) -> None:
    assert "'resnet*'" in error_of(capsys, "list", "resnet*")


def test_list_does_without_jax_and_numpy() -> None:
    program = (
        "import sys; from internimage_jax.__main__ import main; status = main(['list'])\n"
        "assert not {'jax', 'flax', 'numpy', 'PIL'} & set(sys.modules), sorted(sys.modules)\n"
        "sys.exit(status)"
    )
    process = run_python("-c", program)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_reader_that_closes_the_pipe_gets_no_traceback(option: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "internimage_jax", "list", *option],
        env=buffered(),
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (1, b"")


def test_an_error_that_spans_lines_is_printed_on_one(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: Any) -> None:
        raise ValueError("first\n  second")

    monkeypatch.setattr(models, "run", fail)
    assert error_of(capsys, "list") == "error: first second\n"


# info


def test_info_tells_versions_devices_and_what_serves(capsys: Capture) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["python"] == sys.version.split()[0]
    assert len(found["devices"]) == len(jax.devices())
    assert found["platform"] == jax.default_backend()
    assert found["kernels"]
    for row in found["kernels"]:
        assert row["implementation"] in ("kernel", "gather")
        assert row["reason"] or row["implementation"] == "kernel"
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert jax.__version__ in out
    assert found["kernels"][0]["implementation"] in out


def test_the_table_of_info_has_a_row_for_all_that_was_found(capsys: Capture) -> None:
    found = {
        "versions": {"jax": "0.10.2", "flax": None},
        "machine": "Linux x86_64",
        "devices": [{"id": i, "platform": "gpu", "kind": "H100"} for i in range(2)],
        "devices_error": None,
        "kernels": [
            {"platform": "cpu", "implementation": "kernel", "reason": ""},
            {"platform": "cuda", "implementation": "gather", "reason": "not built"},
        ],
    }
    info._print_table(found)
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines if line.strip()] == [
        "jax 0.10.2",
        "flax not installed",
        "machine Linux x86_64",
        "device 0 gpu, H100",
        "device 1 gpu, H100",
        "operators on cpu kernel",
        "operators on cuda gather (not built)",
    ]
    info._print_table({**found, "devices": [], "devices_error": "no such platform"})
    assert re.search(r"devices +none: no such platform", capsys.readouterr().out)


def test_info_says_why_there_is_no_device() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "nothing"}
    process = run_python("-m", "internimage_jax", "info", "--json", env=environment)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    found = json.loads(out)
    assert found["devices"] == []
    assert "nothing" in found["devices_error"]


@pytest.mark.parametrize("platforms", ["nothing", "cuda"])
def test_without_a_device_a_command_says_so_in_a_line(platforms: str, checkpoint: str) -> None:
    if platforms == "cuda" and jax.default_backend() == "gpu":
        pytest.skip("there is such a device")
    command = ("-m", "internimage_jax", "predict", CAT, "--model", checkpoint)
    process = run_python(*command, env=os.environ | {"JAX_PLATFORMS": platforms})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: no device: ") and err.count("\n") == 1
    assert f"JAX_PLATFORMS is {platforms}" in err


def test_only_where_there_is_no_device_is_an_error_put_down_to_it(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(models, "run", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["list"])
    monkeypatch.setattr("internimage_jax.__main__.no_devices", lambda: "none is free")
    assert error_of(capsys, "list") == "error: no device: none is free\n"
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["list", "--traceback"])


# what is kept between runs


def test_compiled_programs_are_kept_unless_told_otherwise(checkpoint: str, tmp_path: Path) -> None:
    def predict(*options: str) -> list[Path]:
        environment = os.environ | {"INTERNIMAGE_CACHE": str(tmp_path)}
        del environment["JAX_COMPILATION_CACHE_DIR"]  # a user's own setting would be kept
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # the model is small
        command = ("-m", "internimage_jax", *options, "predict", CAT, "--model", checkpoint)
        process = run_python(*command, env=environment)
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        return sorted(tmp_path.rglob("*-cache"))

    assert not predict("--no-compilation-cache")
    assert predict()


def test_where_programs_are_kept_is_for_the_user_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seconds = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

    def kept(cache: Path, **settings: str) -> tuple[str | None, str | None]:
        for name in (folder, seconds):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"INTERNIMAGE_CACHE": str(cache), **settings}.items():
            monkeypatch.setenv(name, value)
        keep_compiled_programs()
        return os.environ.get(folder), os.environ.get(seconds)

    assert kept(tmp_path) == (None, None)  # JAX is there, and has read its settings
    monkeypatch.delitem(sys.modules, "jax")
    assert kept(tmp_path) == (str(tmp_path / "compiled"), "0.05")
    assert kept(tmp_path, **{folder: "mine", seconds: "3"}) == ("mine", "3")
    (tmp_path / "file").touch()
    assert kept(tmp_path / "file") == (None, None)  # where it cannot be: JAX would warn


def test_without_a_home_folder_nothing_is_kept_and_commands_run(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "INTERNIMAGE_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)  # as of a user that a container makes up
    monkeypatch.delitem(sys.modules, "jax")  # with JAX there, nothing is looked for
    assert main(["list", "internimage_t*"]) == 0
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert "internimage_t_1k_224" in capsys.readouterr().out
    with pytest.raises(OSError, match="no home folder; set INTERNIMAGE_CACHE"):
        cache_folder()


# demo


def test_demo_matches_the_recorded_answer_and_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = run_python("-m", "internimage_jax", "demo", env=environment)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "not trained" in out
    assert "matches the recorded" in out
    assert not list(tmp_path.iterdir())


def test_demo_fails_where_a_weight_differs(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = demo.seeded_values

    def altered(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return values(name, shape) * (1.2 if name == "levels.2.blocks.1.dcn.offset.bias" else 1)

    monkeypatch.setattr(demo, "seeded_values", altered)
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert "matches" not in out
    assert err.startswith("error: demo: rank ")
    assert err.count("\n") == 1

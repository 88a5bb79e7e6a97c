"""The command line: one line on stderr for an error, exit statuses, interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import pytest

from internimage_jax.__main__ import main
from internimage_jax.commands import models
from tests.commands.running import CAT, Capture, buffered, error_of, run_python, write_images


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


def test_traceback_shows_where_an_error_came_from() -> None:
    for arguments in (["--traceback", "predict"], ["predict", "--traceback"]):
        with pytest.raises(FileNotFoundError):
            main([*arguments, "none.png"])


def test_an_error_that_spans_lines_is_printed_on_one(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: Any) -> None:
        raise ValueError("first\n  second")

    monkeypatch.setattr(models, "run", fail)
    assert error_of(capsys, "list") == "error: first second\n"


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

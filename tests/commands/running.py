"""What the tests of commands share: images, running a command, what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internimage_jax.__main__ import main

CAT = str(resources.files("internimage_jax") / "data_files" / "cat.jpg")
Capture = pytest.CaptureFixture[str]


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

"""Builds C++ programs that run kernels without JAX or a GPU, under sanitizers if there are any."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "xla_ops" / "csrc"
COMPILER = os.environ.get("CXX", "c++")

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"no compiler {COMPILER}"
)


def build(folder: Path, name: str, kernels: Sequence[str] = (), portable: bool = True) -> Path:
    """Compiles tests/`name` and sources of xla_ops/csrc; .cu files in it are built for the host.

    Unless `portable` the CPU kernels are those of each instruction set, which takes a minute.
    """
    program = folder / Path(name).stem
    options = ["-std=c++17", "-w", "-fno-strict-aliasing", f"-I{CSRC}"]
    options += ["-DCPU_BASELINE"] * portable
    options += [f"-I{TESTS / 'cuda_on_host'}", "-fno-sanitize-recover=all"]
    sources = [str(TESTS / name), *(str(CSRC / kernel) for kernel in kernels)]
    for kind in (["-O0", "-fsanitize=address,undefined"], ["-O1"]):
        command = [COMPILER, *options, *kind, *sources, "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not ("sanitize" in done.stderr or "lasan" in done.stderr):
            break
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, *arguments: str, **environment: str) -> str:
    """Runs it to its end, which has to be a good one; returns what it printed."""
    environment = os.environ | environment
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

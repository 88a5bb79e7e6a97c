"""The build of the CUDA kernels, by a compiler that compiles nothing: what is asked of it, when."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
NVCC = """#!/bin/sh
case "$1" in
--list-gpu-arch) printf 'compute_80\\ncompute_90\\n'; exit ;;
--version) echo "release 13.0"; exit ;;
esac
echo "$@" >> "$(dirname "$0")/log"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""

Build = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builds in place; gives the status, what was said last, and the compiler's calls."""
    shutil.copytree(ROOT / "xla_ops" / "csrc", tmp_path / "xla_ops" / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("xla_ops", "convert", "internimage_jax/commands", "internimage_jax"):
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
        (tmp_path / package / "__init__.py").touch()
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)

    def run(**settings: str) -> tuple[int, str, list[str]]:
        log = nvcc.with_name("log")
        log.write_text("")
        others = {k: v for k, v in os.environ.items() if not k.startswith("INTERNIMAGE_")}
        home = {"CUDA_HOME": str(tmp_path / "cuda"), "INTERNIMAGE_CPU": "0"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=tmp_path, env=others | home | settings, capture_output=True, text=True
        )
        said = (done.stdout + done.stderr).strip().splitlines()[-1]
        return done.returncode, said, log.read_text().splitlines()

    return run


def built(tmp_path: Path) -> tuple[bool, str]:
    """Whether the extension is there, and why not."""
    reason = tmp_path / "xla_ops" / "_cuda.reason"
    text = reason.read_text().strip() if reason.exists() else ""
    return bool(list((tmp_path / "xla_ops").glob("_cuda.*.so"))), text


def test_what_has_not_changed_is_not_built_again(build: Build, tmp_path: Path) -> None:
    status, _, calls = build()
    assert (status, built(tmp_path)) == (0, (True, "")) and len(calls) > 5
    codes = ("sm_80", "sm_90a", "code=compute_80", "code=compute_90")
    assert all(code in call for call in calls if ".cu " in call for code in codes)
    assert build()[2] == []
    (tmp_path / "xla_ops" / "csrc" / "types.h").touch()
    assert len(build()[2]) == len(calls)


def test_other_settings_are_built_anew(build: Build) -> None:
    build()
    calls = build(INTERNIMAGE_CUDA_ARCHS="90")[2]
    assert calls and not any("sm_80" in call or "code=compute" in call for call in calls)
    assert build(INTERNIMAGE_CUDA_ARCHS="90")[2] == []
    calls = build(INTERNIMAGE_CUDA_ARCHS="90a 80+PTX")[2]
    assert all("sm_80" in call and "code=compute_80" in call for call in calls if ".cu " in call)
    assert not any("code=compute_90" in call for call in calls)
    status, said, calls = build(INTERNIMAGE_CUDA_ARCHS="nonsense")
    assert (status, calls) == (1, [])
    assert said == "INTERNIMAGE_CUDA_ARCHS: expected some of 80 90, got nonsense"


def test_what_is_not_wanted_or_cannot_be_built_is_not_there(build: Build, tmp_path: Path) -> None:
    build()
    assert build(INTERNIMAGE_CUDA="0")[0] == 0
    assert built(tmp_path) == (False, "not built: INTERNIMAGE_CUDA=0")
    build()
    assert build(CUDA_HOME="/nowhere")[0] == 0
    assert built(tmp_path) == (False, "not built: RuntimeError: no nvcc in CUDA_HOME=/nowhere")
    status, said, _ = build(CUDA_HOME="/nowhere", INTERNIMAGE_CUDA="1")
    assert (status, said) == (1, "RuntimeError: no nvcc in CUDA_HOME=/nowhere")

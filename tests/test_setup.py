"""The build of the kernels, by compilers that compile nothing: what is asked of them, when."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import ANY

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
NVCC = """#!/bin/sh
case "$1" in
--list-gpu-arch) printf 'compute_80\\ncompute_90\\n'; exit ;;
--version) echo "release 13.0"; exit ;;
esac
echo "$@" >> "${0%/*}/log"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
# As if packages were installed in another folder.
PACKAGES = """
import sysconfig
get_path = sysconfig.get_path
lib = ("platlib", "purelib")
sysconfig.get_path = lambda name, *more: PATH if name in lib else get_path(name, *more)
"""

Build = Callable[..., tuple[int, str, list[str]]]


def test_kernels_are_built_with_the_oldest_jax_that_they_may_run_on() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (oldest,) = [one for one in settings["project"]["dependencies"] if one.startswith("jax>=")]
    wanted = oldest.replace(">=", "==") + "; python_version < "
    assert any(one.startswith(wanted) for one in settings["build-system"]["requires"])


def write_compiler(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NVCC)
    path.chmod(0o755)


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
    write_compiler(nvcc)

    def run(**settings: str) -> tuple[int, str, list[str]]:
        log = nvcc.with_name("log")
        log.write_text("")
        ours = ("INTERNIMAGE_", "CC", "CXX")
        others = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        home = {"CUDA_HOME": str(tmp_path / "cuda"), "INTERNIMAGE_CPU": "0"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=tmp_path, env=others | home | settings, capture_output=True, text=True
        )
        said = (done.stdout + done.stderr).strip().splitlines()[-1]
        return done.returncode, said, log.read_text().splitlines()

    return run


def built(tmp_path: Path, name: str = "_cuda") -> tuple[bool, str]:
    """Whether the extension is there, and why not."""
    reason = tmp_path / "xla_ops" / f"{name}.reason"
    text = reason.read_text().strip() if reason.exists() else ""
    return bool(list((tmp_path / "xla_ops").glob(f"{name}.*.so"))), text


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


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the packages that a build finds."""
    folder = tmp_path / "packages"
    (tmp_path / "custom").mkdir()
    text = PACKAGES.replace("PATH", repr(str(folder)))
    (tmp_path / "custom" / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "custom"))
    return folder


def test_the_compiler_that_is_there_serves(build: Build, tmp_path: Path, packages: Path) -> None:
    """Pythons are built by compilers that need not be on the machine they run on."""
    path = tmp_path / "bin"
    settings = {"PATH": str(path), "INTERNIMAGE_CPU": "auto", "INTERNIMAGE_CUDA": "0"}
    assert build(**settings)[0] == 0
    words = "no C++ compiler (c++, g++, clang++); `pip install ziglang` brings one"
    assert built(tmp_path, "_cpu") == (False, f"not built: RuntimeError: {words}")

    zig = packages / "ziglang" / "zig"
    for compiler, begin in ((zig, "c++ -mcpu=baseline "), (path / "clang++", "")):
        write_compiler(compiler)
        assert build(**settings)[0] == 0
        assert built(tmp_path, "_cpu") == (True, "")
        calls = compiler.with_name("log").read_text().splitlines()
        assert all(call.startswith(begin) for call in calls)
        assert sum(" -c " in call and "-fPIC" in call for call in calls) > 5
        assert sum("-shared" in call for call in calls) == 1
        (tmp_path / "xla_ops" / "csrc" / "types.h").touch()

    assert build(**settings | {"CXX": "no-compiler"})[0] == 0
    words = "no compiler no-compiler, which CXX names"
    assert built(tmp_path, "_cpu") == (False, f"not built: RuntimeError: {words}")


def test_nvcc_may_be_a_package(build: Build, tmp_path: Path, packages: Path) -> None:
    nvcc, named = packages / "nvidia" / "cu13" / "bin" / "nvcc", tmp_path / "cuda" / "bin" / "nvcc"
    write_compiler(nvcc)
    assert build()[0] == 0 and not nvcc.with_name("log").exists()  # CUDA_HOME goes before it
    headers = packages / "nvidia" / "cu13" / "include" / "cccl" / "nv" / "target"
    headers.parent.mkdir(parents=True)
    headers.touch()
    assert build(CUDA_HOME="") == (0, ANY, []) and built(tmp_path) == (True, "")
    calls = nvcc.with_name("log").read_text().splitlines()
    assert sum(" -c " in call for call in calls) > 5 and "-shared" in calls[-1]

    # Not without headers that come by themselves.
    headers.unlink()
    assert build(CUDA_HOME="", PATH=f"{named.parent}:{os.environ['PATH']}")[2] != []
    assert nvcc.with_name("log").read_text().splitlines() == calls


def test_nvcc_wants_a_compiler(build: Build, tmp_path: Path) -> None:
    assert build(PATH="")[0] == 0
    words = "nvcc wants gcc, or another compiler that NVCC_CCBIN names"
    assert built(tmp_path) == (False, f"not built: RuntimeError: {words}")
    assert build(PATH="", NVCC_CCBIN="clang++")[0] == 0
    assert built(tmp_path) == (True, "")

"""The CUDA kernels as JAX calls them, without a GPU: a CPU runs their code (cuda_on_host)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from tests.native import COMPILER, OPTIONS, TESTS, once_a_run
from xla_ops import _ffi, custom_call
from xla_ops.custom_call import Target
from xla_ops.dcnv3_kernel import DCNv3
from xla_ops.dwconv import DwconvNormGelu

PREFIX = "host_"  # before the names of the targets, which the CPU's kernels have already


def cannot_build() -> str:
    """What is missing to build the kernels for the host; nothing where all is there."""
    if shutil.which(COMPILER) is None:
        return f"no compiler {COMPILER}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no headers of Python"
    return "" if importlib.util.find_spec("pybind11") else "no pybind11"


@contextlib.contextmanager
def cuda_kernels_on_host() -> Iterator[None]:
    """Within, the operators on a CPU are the CUDA kernels, on the host."""
    register()
    there = extension().targets()
    custom_call_of = custom_call._custom_call

    def host_call(target: Target, *leading: int) -> Any:
        if not target.name.startswith(PREFIX):
            target = target._replace(name=PREFIX + target.name)
        return custom_call_of(target, *leading)

    with contextlib.ExitStack() as stack:
        patch = lambda *arguments: stack.enter_context(mock.patch.object(*arguments))  # noqa: E731
        patch(_ffi, "serving", lambda target: ("cpu",) if target in there else ())
        patch(custom_call, "_custom_call", host_call)
        for operator in (DCNv3, DwconvNormGelu):
            patch(operator, "backward", lambda self, _, of=operator.backward: of(self, "cuda"))
        jax.clear_caches()  # of what was traced for the CPU's kernels, and then of this
        try:
            yield
        finally:
            jax.clear_caches()


@functools.cache
def register() -> None:
    for name, handler in extension().targets().items():
        jax.ffi.register_ffi_target(PREFIX + name, handler, platform="cpu")


@functools.cache
def extension() -> Any:
    """The extension `_cuda`, built for the host in a minute."""
    path = str(once_a_run("_cuda.so", _build))
    loader = importlib.machinery.ExtensionFileLoader("_cuda", path)
    spec = importlib.util.spec_from_loader("_cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def take_launches() -> list[bool]:
    """Whether each launch since the last call of this was made before the one before had ended."""
    early = ctypes.create_string_buffer(100)
    library = ctypes.CDLL(extension().__spec__.origin)
    count = library.take_launches(early, len(early))
    return [bool(byte) for byte in early.raw[:count]]


def _build(path: Path) -> None:
    import pybind11

    includes = pybind11.get_include(), jax.ffi.include_dir(), sysconfig.get_path("include")
    options = [*OPTIONS, "-Og", "-DCPU_BASELINE", "-fPIC", "-shared", "-fvisibility=hidden"]
    options += [f"-isystem{path}" for path in includes]
    command = [COMPILER, *options, str(TESTS / "cuda_on_host" / "module.cc"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

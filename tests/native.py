"""C++ that tests build: programs that run kernels without JAX or a GPU, sanitized if possible."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "xla_ops" / "csrc"
COMPILER = os.environ.get("CXX", "c++")
# For kernels that run on the host: .cu files there are, as C++.
OPTIONS = ["-std=c++17", "-w", "-fno-strict-aliasing", f"-I{CSRC}", f"-I{TESTS / 'cuda_on_host'}"]
# Which of the CPU's instruction sets: those of no processor in particular, up to AVX2, or all, of
# which AMX may be emulated.
PORTABLE, AVX2, EVERY = "-DCPU_BASELINE", "-DCPU_NO_AVX512", "-DCPU_EVERY"
EMULATED_AMX = f"-I{TESTS / 'amx_on_host'}"

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"no compiler {COMPILER}"
)


# Not all that "undefined" stands for: the others take a third more of the compiler's time.
UNDEFINED = "alignment,bounds,integer-divide-by-zero,null,shift,signed-integer-overflow"


def program(
    name: str, kernels: Sequence[str] = (), form: str = PORTABLE, checks: str = UNDEFINED
) -> Path:
    """Compiles tests/`name` and sources of xla_ops/csrc, once a run of the tests.

    The CPU kernels are those of the instruction sets that `form` leaves. `checks` are made beside
    those of addresses.
    """
    sanitized = ["-Og", f"-fsanitize=address,{checks}", "-fno-sanitize-recover=all"]
    sources = [str(TESTS / name), *(str(CSRC / kernel) for kernel in kernels)]

    def build(path: Path) -> None:
        for kind in (sanitized, ["-O1"]):
            command = [COMPILER, *OPTIONS, form, *kind, *sources, "-o", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if not ("sanitize" in done.stderr or "lasan" in done.stderr):
                break
        assert done.returncode == 0, done.stderr

    return once_a_run(f"{Path(name).stem}{Path(form).name}", build)


def cuda_program(name: str) -> Path:
    """Kernels for CUDA: what no GPU forgives, a word at no multiple of its size, is an error."""
    return program(name, checks="alignment")


def once_a_run(name: str, build: Callable[[Path], None]) -> Path:
    """What `build` makes at the path it is given: the first of pytest's processes, for all."""
    folder = Path(os.environ["INTERNIMAGE_TESTS_FOLDER"])  # conftest.py makes and removes it
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        path = folder / name
        if not path.exists():
            unfinished = folder / f"{name}.unfinished"
            build(unfinished)
            unfinished.rename(path)
        return path


def run(program: Path, *arguments: str, **environment: str) -> str:
    """Runs it to its end, which has to be a good one; returns what it printed."""
    environment = os.environ | environment
    done = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

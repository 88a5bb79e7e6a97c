"""The CPU kernels alone, built with sanitizers and run over random geometries."""

from __future__ import annotations

import platform
import subprocess

import pytest

import xla_ops
from tests import native
from tests.native import CSRC, TESTS, needs_compiler, program, run

LAYERS = ["dwconv_cpu.cc", "gelu_cpu.cc", "norm_cpu.cc", "linear_cpu.cc"]
BEST = xla_ops.status()["cpu"].detail


def in_layers(count: int, instructions: str) -> None:
    # What this processor does not run is left out: it takes the compiler half of its time. AMX is
    # emulated where nothing else is missing.
    form = {"avx2": native.AVX2, "avx512bf16": native.EMULATED_AMX}.get(BEST, native.EVERY)
    fuzzer = program("fuzz_layers_cpu.cc", LAYERS, form)
    printed = run(fuzzer, str(count), INTERNIMAGE_CPU_ISA=instructions)
    assert f"{count} shapes" in printed
    names = {"amx": "avx512 and amx", "baseline": "baseline, without products"}
    assert f"by {names.get(instructions, instructions)}\n" in printed


@needs_compiler
def test_no_access_out_of_bounds_and_no_undefined_behaviour() -> None:
    fuzzer = program("fuzz_dcnv3_cpu.cc", ["dcnv3_cpu.cc"])
    assert "500 geometries" in run(fuzzer, "500")


@needs_compiler
def test_nor_in_the_layers() -> None:
    in_layers(150, "baseline")


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="an x86 processor's instruction sets")
def test_nor_in_the_layers_by_any_instruction_set_of_this_machine() -> None:
    all_sets = ("amx", "avx512bf16", "avx512", "avx2")
    served = {"avx512": all_sets[2:], "avx2": all_sets[3:], "baseline, without products": ()}
    for instructions in served.get(BEST, all_sets):
        in_layers(60, instructions)


@needs_compiler
def test_the_layers_compile_for_processors_of_other_kinds() -> None:
    sources = [TESTS / "fuzz_layers_cpu.cc", *(CSRC / name for name in LAYERS)]
    command = [native.COMPILER, *native.OPTIONS, native.PORTABLE, "-fsyntax-only", *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

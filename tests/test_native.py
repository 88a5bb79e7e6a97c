"""The CPU kernels alone, built with sanitizers and run over random geometries."""

from __future__ import annotations

import platform

import pytest

import xla_ops
from tests.native import needs_compiler, program, run

PROGRAMS = {
    "fuzz_dcnv3_cpu.cc": (["dcnv3_cpu.cc"], "500 geometries"),
    "fuzz_layers_cpu.cc": (
        ["dwconv_cpu.cc", "gelu_cpu.cc", "norm_cpu.cc", "linear_cpu.cc"],
        "250 shapes",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_access_out_of_bounds_and_no_undefined_behaviour(name: str) -> None:
    kernels, printed = PROGRAMS[name]
    assert printed in run(program(name, kernels), printed.split()[0])


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="an x86 processor's instruction sets")
def test_nor_in_the_layers_by_any_instruction_set_of_this_machine() -> None:
    name = "fuzz_layers_cpu.cc"
    fuzzer = program(name, PROGRAMS[name][0], portable=False)
    best = xla_ops.status()["cpu"].detail
    all_sets = ("amx", "avx512", "avx2")
    served = {"avx512": all_sets[1:], "avx2": all_sets[2:]}
    for instructions in served.get(best, all_sets):
        printed = run(fuzzer, "60", INTERNIMAGE_CPU_ISA=instructions)
        assert "60 shapes" in printed

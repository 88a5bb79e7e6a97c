"""The CPU kernels alone, built with sanitizers and run over random geometries."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "xla_ops" / "csrc"
COMPILER = os.environ.get("CXX", "c++")


PROGRAMS = {
    "fuzz_dcnv3_cpu.cc": (["dcnv3_cpu.cc"], "500 geometries"),
    "fuzz_layers_cpu.cc": (["dwconv_cpu.cc", "gelu_cpu.cc"], "500 shapes"),
}


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no compiler {COMPILER}")
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_access_out_of_bounds_and_no_undefined_behaviour(name: str, tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    sources, printed = PROGRAMS[name]
    options = ["-std=c++17", "-O0", "-DCPU_BASELINE", "-w", f"-I{CSRC}"]
    options += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    files = [str(TESTS / name), *(str(CSRC / source) for source in sources)]
    command = [COMPILER, *options, *files, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "sanitize" in built.stderr or "lasan" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program), "500"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed in done.stdout

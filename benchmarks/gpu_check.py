"""Checks and measures the CUDA kernels on a GPU, in one call of less than nine minutes.

    python -m benchmarks.gpu_check --output gpu.json
    python -m benchmarks.gpu_check --official --dcnv4 --peer deformops=my_adapters:deformops

In this order: builds the extensions for the GPU at hand, runs the tests on it (nothing is timed
where they fail, unless --keep-going), times whole models and looks at what their programs consist
of, times the operator beside its peers, times T with the choices that no GPU has confirmed made the
other way, and runs compute-sanitizer where it is. The failure of a section is written down in the
place of its result, and the file is written anew after each. `--platform cpu` tries all of it
without a GPU, at sizes that say nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import gpu_op

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 530.0  # seconds, all in all


# ---- whole models ----


def time_model(name: str, batch: int, side: int | None, calls: int) -> dict[str, Any]:
    """How fast it is in bfloat16, and the steps of its program."""
    from benchmarks.gpu_target import compiled_with_steps
    from benchmarks.model import random_forward
    from internimage_jax.config import released_model

    released = released_model(name)
    start = time.perf_counter()
    lowered, leaves, images = random_forward(
        released.config, batch, side or released.image_size, "bfloat16"
    )
    compiled, steps = compiled_with_steps(lowered)
    compiled(leaves, images).block_until_ready()
    ready = time.perf_counter() - start
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        compiled(leaves, images).block_until_ready()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    row = {"model": name, "batch": batch, "milliseconds": 1e3 * median}
    row |= {"images_per_second": batch / median, "seconds_to_first_result": ready}
    return row | steps


def time_models(check: Check) -> Iterator[dict[str, Any]]:
    """The models as they are."""
    cpu = check.options.platform == "cpu"
    for name in ("internimage_t_1k_224", "internimage_b_1k_224"):
        for batch in (1, 2) if cpu else (1, 64):
            if check.seconds_left() < 45:
                yield {"stopped": f"no time left at {name}, batch {batch}"}
                return
            yield time_model(name, batch, 64 if cpu else None, 5 if cpu else 30)


def time_choices(check: Check) -> Iterator[dict[str, Any]]:
    """T with what was chosen without a GPU chosen the other way."""
    import jax

    from internimage_jax import common

    cpu = check.options.platform == "cpu"
    linear_gelu = importlib.import_module("xla_ops.linear_gelu")
    choices = {
        "every convolution a product": (common, "LARGEST_PATCHES", 1 << 60),
        "no convolution a product": (common, "LARGEST_PATCHES", 0),
        "GELU in every product": (linear_gelu, "MOST_CHANNELS", 1 << 30),
        "GELU in no product": (linear_gelu, "MOST_CHANNELS", 0),
    }
    for batch in (1, 2) if cpu else (1, 64):
        for choice, (module, name, value) in choices.items():
            if check.seconds_left() < 75:
                yield {"stopped": f"no time left at {choice}, batch {batch}"}
                return
            jax.clear_caches()  # of layers traced with another choice
            with mock.patch.object(module, name, value):
                row = time_model(
                    "internimage_t_1k_224", batch, 64 if cpu else None, 5 if cpu else 30
                )
            yield {"choice": choice, **row}


# ---- build and tests ----


def build(check: Check) -> Iterator[dict[str, Any]]:
    """Builds in place for the GPU's architecture; the figures of a full build are in the docs."""
    if check.options.no_build:
        yield {"skipped": "--no-build"}
        return
    cuda = "0" if check.options.platform == "cpu" else "1"
    environment = {**os.environ, "INTERNIMAGE_CUDA": cuda, "INTERNIMAGE_CPU": "1"}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        capability = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        environment["INTERNIMAGE_CUDA_ARCHS"] = capability.split()[0].replace(".", "")
    start = time.perf_counter()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    check.run(command, timeout=240, environment=environment)
    sizes = {path.name: path.stat().st_size for path in (ROOT / "xla_ops").glob("_*.so")}
    yield {"seconds": time.perf_counter() - start, "bytes": sizes}


def test(check: Check) -> Iterator[dict[str, Any]]:
    """The operators' tests on the GPU."""
    environment = check.environment() | {"INTERNIMAGE_GPU_TESTS_ON": check.options.platform}
    files = ["tests/test_dcnv3_gpu.py", "tests/test_layers_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *files]
    try:
        output = check.run(command, timeout=200, environment=environment)
    except RuntimeError:
        check.correct = False
        raise
    summary = output.strip().splitlines()[-1]
    check.correct = "passed" in summary and "skipped" not in summary
    yield {"summary": summary}


SANITIZED = """
import jax, jax.numpy as jnp, xla_ops
for dtype, depth, size in (("bfloat16", 16, 9), ("float32", 5, 9), ("float32", 4, 130)):
    x = jnp.ones((2, size, size, 2 * depth), dtype)
    rows = jnp.ones((2, size, size, xla_ops.Record(2, 9).width), dtype) * 3
    f = lambda *a: xla_ops.dcnv3_fused(*a, group=2, implementation="kernel").astype("float32").sum()
    jax.block_until_ready(jax.jit(jax.value_and_grad(f, (0, 1)))(x, rows))
    kernel, vector = jnp.ones((3, 3, 2 * depth), dtype), jnp.ones(2 * depth, dtype)
    def layers(x, kernel, v):
        y = xla_ops.dwconv_norm_gelu(x, kernel, v, v, v, implementation="kernel")
        return xla_ops.bias_gelu(y, v, implementation="kernel").astype("float32").sum()
    jax.block_until_ready(jax.jit(jax.value_and_grad(layers, (0, 1, 2)))(x, kernel, vector))
    if dtype == "bfloat16":
        w, b = jnp.ones((2 * depth, 136), dtype), jnp.ones(136, dtype)
        product = lambda *a: xla_ops.linear_bias_gelu(*a, implementation="kernel")
        jax.block_until_ready(jax.jit(product)(x, w, b))
"""


def sanitize(check: Check) -> Iterator[dict[str, Any]]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield {"skipped": "no compute-sanitizer"}
        return
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind]
        command += [
            f"--kernel-name=kernel_substring={name}" for name in ("dcnv3", "dwconv", "gelu")
        ]
        command += ["--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        output = check.run(command, timeout=60, environment=check.environment())
        yield {"tool": kind, "summary": output.strip().splitlines()[-1]}


class Check:
    """The run: its clock, its results, and how to do something that may fail."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.start = time.perf_counter()
        self.results: dict[str, Any] = {}
        self.correct = False
        self.peers: dict[str, Callable] = {}
        if options.official:
            self.peers["official"] = gpu_op.official
        if options.dcnv4:
            self.peers["dcnv4"] = gpu_op.dcnv4
        for peer in options.peer:
            name, _, place = peer.partition("=")
            module, _, function = place.partition(":")
            self.peers[name] = getattr(importlib.import_module(module), function)

    def seconds_left(self) -> float:
        return BUDGET - (time.perf_counter() - self.start)

    def environment(self) -> dict[str, str]:
        platforms = "cpu" if self.options.platform == "cpu" else "cuda,cpu"
        # The tests and this process share the GPU's memory.
        return {**os.environ, "JAX_PLATFORMS": platforms, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def run(self, command: list[str], timeout: float, environment: dict[str, str]) -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={
                **environment,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(5, min(timeout, self.seconds_left())),
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} exits with {done.returncode}: {done.stdout[-3000:]}")
        return done.stdout

    def attempt(self, function: Callable, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:500]}

    def section(self, function: Callable[[Check], Iterator[dict[str, Any]]]) -> None:
        """Collects what a section yields; what it raises takes the place of the rest."""
        rows: list[dict[str, Any]] = []
        start = time.perf_counter()
        try:
            for row in function(self):
                rows.append(row)
                print(f"{function.__name__}: {json.dumps(row)}", flush=True)
        except Exception as error:
            rows.append({"error": f"{type(error).__name__}: {error}"[:3000]})
            traceback.print_exc()
        took = round(time.perf_counter() - start, 1)
        self.results[function.__name__] = {"seconds": took, "rows": rows}
        self.options.output.write_text(json.dumps(self.results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-build", action="store_true", help="take the extensions as they are")
    parser.add_argument("--keep-going", action="store_true", help="times even what fails its tests")
    parser.add_argument("--official", action="store_true", help="ops_dcnv3 is built and importable")
    parser.add_argument("--dcnv4", action="store_true", help="DCNv4 is importable")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=MODULE:FUNCTION",
        help="a function of torch tensors (x, offset, mask, group) to time as well",
    )  # fmt: skip
    options = parser.parse_args()
    check = Check(options)
    os.environ.update(check.environment())
    check.section(build)
    check.section(test)
    if not check.correct and not options.keep_going:
        sys.exit(f"the tests did not pass, so nothing is timed: see {options.output}")
    import jax

    import xla_ops

    check.results["machine"] = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "kernels": {name: list(status) for name, status in xla_ops.status().items()},
    }
    check.section(time_models)
    check.section(gpu_op.time_operator)
    check.section(time_choices)
    check.section(sanitize)


if __name__ == "__main__":
    main()

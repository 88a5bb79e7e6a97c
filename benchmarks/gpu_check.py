"""Checks and measures the CUDA kernels on a GPU, in one call of less than nine minutes.

    python -m benchmarks.gpu_check --output gpu.json
    python -m benchmarks.gpu_check --output more.json --no-build --no-test --only models training
    python -m benchmarks.gpu_check --official --dcnv4 --peer deformops=my_adapters:deformops

In this order: builds the extensions for the GPU at hand, runs the tests on it (nothing is timed
where they fail, unless --keep-going), times whole models, with a look at what their programs
consist of (gpu_model), training steps (gpu_training), the operator beside its peers (gpu_op), each
kernel of a model (gpu_profile), the other layers (gpu_layers), choices that no GPU has confirmed
made the other way, and runs compute-sanitizer where it is. What finds no time left says so; a
second call, as above, has it.

Each section is a process of its own with a limit of its own, which grows where few are chosen, and
each row is written down as it comes: what fails, hangs or brings down the GPU's context costs its
section's remaining rows and no others. `--platform cpu` tries all of it without a GPU, at sizes
that say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gpu_op

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 530.0  # seconds, all in all

Row = dict[str, Any]
Rows = Iterator[tuple[Row, Callable[[], Row]]]  # what a row is of, and what measures it


class Section(NamedTuple):
    """Rows that one process measures: where they are made, and seconds that it may take; more where
    the sections chosen leave some.
    """

    name: str
    place: str
    seconds: float


SECTIONS = (
    Section("models", "benchmarks.gpu_model:models", 170),
    Section("training", "benchmarks.gpu_training:rows", 120),
    Section("operator", "benchmarks.gpu_op:rows", 120),
    Section("profile", "benchmarks.gpu_profile:rows", 60),
    Section("layers", "benchmarks.gpu_layers:rows", 50),
    Section("choices", "benchmarks.gpu_model:choices", 120),
    Section("sanitize", "benchmarks.gpu_check:sanitize", 130),
)


# ---- in a section's process ----


def serve(section: Section, options: argparse.Namespace) -> None:
    """Measures the rows and prints them, a line each; one that fails does not end the others."""
    module, _, function = section.place.partition(":")
    for row, measure in getattr(importlib.import_module(module), function)(options):
        start = time.perf_counter()
        try:
            row = row | measure()
        except Exception as error:
            row = row | {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(row | {"took": round(time.perf_counter() - start, 1)}), flush=True)


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
norm = jax.jit(lambda *a: xla_ops.layer_norm(*a, implementation="kernel"))
before = jax.jit(lambda *a: xla_ops.add_norm(*a, implementation="kernel"))
after = jax.jit(lambda *a: xla_ops.norm_add(*a, implementation="kernel"))
# Few rows and many, of one piece a thread to four, and those that are a block's.
for rows, channels in ((5, 64), (99999, 64), (3, 33), (5, 320), (9999, 512), (5, 1024), (5, 2560)):
    x, v = jnp.ones((1, 1, rows, channels), "bfloat16"), jnp.ones(channels, "bfloat16")
    jax.block_until_ready((norm(x, v, v), before(x, x, v, v), after(x, x, v, v)))
# The planes in shared memory, and each size of tile with its buffers in use more than once.
# On 132 multiprocessors each of the last maps is shared by two blocks.
for shape, group in (((64, 28, 28, 128), 8), ((66, 36, 36, 16), 1)):
    x = jnp.ones(shape, "bfloat16")
    rows = jnp.ones((*shape[:3], xla_ops.Record(group, 9).width), "bfloat16") * 3
    options = {"group": group, "implementation": "kernel"}
    f = lambda *a: xla_ops.dcnv3_fused(*a, **options).astype("float32").sum()
    jax.block_until_ready(jax.jit(jax.value_and_grad(f, (0, 1)))(x, rows))
product = jax.jit(lambda *a: xla_ops.linear(*a, gelu=True, implementation="kernel"))
for rows, outputs in ((81, 136), (1600, 264), (6500, 264)):
    x, w, b = (jnp.ones(s, "bfloat16") for s in ((1, 1, rows, 136), (136, outputs), outputs))
    jax.block_until_ready(product(x, w, b))
if "cuda" in xla_ops._ffi.serving("internimage_layers_forward"):  # from 9.0 on
    # Tiles that are not full, of one part and of several.
    for side, c, group in ((7, 512, 32), (9, 80, 5), (40, 64, 4)):
        r, h = xla_ops.Record(group, 9).width, 4 * c
        attend = [(3, 3, c), c, c, c, (c, c), c, (c, r), r, (c, c), c]
        shapes = [c, c, *attend, c, c, (c, h), h, (h, c), c]
        arrays = [jnp.ones(shape, "bfloat16") for shape in shapes]
        x = jnp.ones((1, side, side, c), "bfloat16")
        run = jax.jit(xla_ops.layers, static_argnames=("group", "implementation"))
        parameters = [xla_ops.LayerParameters(*arrays)] * 2
        jax.block_until_ready(run(x, parameters, group=group, implementation="kernel"))
if "cuda" in xla_ops._ffi.serving("internimage_mlp_forward"):  # compute capability 9.0
    both = jax.jit(lambda *a: xla_ops.mlp(*a, implementation="kernel"))
    for c in (64, 80):
        shapes = ((1, 1, 9999, c), (c, 4 * c), 4 * c, (4 * c, c), c)
        jax.block_until_ready(both(*(jnp.ones(s, "bfloat16") for s in shapes)))
"""


def sanitize(options: argparse.Namespace) -> Rows:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

    def measure(kind: str) -> Row:
        if not os.access(tool, os.X_OK):
            return {"skipped": "no compute-sanitizer"}
        command = [tool, "--tool", kind]
        names = ("dcnv3", "dwconv", "gelu", "norm", "linear", "mlp", "product")
        command += [f"--kernel-name=kernel_substring={name}" for name in names]
        command += ["--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        # One that was stopped may leave its program and what memory that has.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            status: int | str
            try:
                status = subprocess.run(
                    command, stdout=output, stderr=output, timeout=60, env=environment
                ).returncode
            except subprocess.TimeoutExpired:
                status = "no time left"
            output.seek(0)
            return {"exit_status": status, "output": output.read().strip()[-500:]}

    for kind in ("memcheck", "racecheck"):
        yield {"tool": kind}, lambda kind=kind: measure(kind)


# ---- in the process that was started ----


class Check:
    """The run: its clock, and its results, which are in the file at any time."""

    least_seconds = 5.0  # that a command may take, whatever is left

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.start = time.perf_counter()
        self.results: dict[str, Any] = {}

    def seconds_left(self) -> float:
        return BUDGET - (time.perf_counter() - self.start)

    def note(self, section: str, row: Row) -> None:
        self.results.setdefault(section, []).append(row)
        partial = self.options.output.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self.options.output)
        print(f"{section}: {json.dumps(row)}", flush=True)

    def environment(self) -> dict[str, str]:
        cpu = self.options.platform == "cpu"
        path = os.environ.get("PYTHONPATH", "")
        return {
            **os.environ,
            "JAX_PLATFORMS": "cpu" if cpu else "cuda,cpu",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT),
        }

    def run(
        self, section: str, command: list[str], seconds: float, **environment: str
    ) -> tuple[int | None, list[str]]:
        """Runs a command in at most `seconds`; its exit status, None if it was stopped, and what
        it printed.

        Lines that are JSON objects become rows of the section. So does a failure, with the end of
        what was printed.
        """
        seconds = max(self.least_seconds, min(seconds, self.seconds_left()))
        lines: list[str] = []
        with tempfile.TemporaryFile("w+", errors="replace") as other:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment() | environment,
                stdout=subprocess.PIPE,
                stderr=other,
                text=True,
                errors="replace",
                start_new_session=True,  # so that what it starts can be ended with it
            )
            stopped = threading.Event()

            def end() -> None:
                with contextlib.suppress(ProcessLookupError):  # that none is left
                    os.killpg(process.pid, signal.SIGKILL)

            def stop() -> None:
                stopped.set()
                end()

            timer = threading.Timer(seconds, stop)
            timer.start()
            try:
                assert process.stdout is not None
                with process.stdout:
                    for line in process.stdout:
                        lines.append(line)
                        if row := row_of(line):
                            self.note(section, row)
                status = process.wait()
            finally:
                timer.cancel()
                end()  # also of what it has left behind
            other.seek(0)
            errors = other.read()
        if status:
            why = f"stopped after {seconds:.0f} s" if stopped.is_set() else f"exits with {status}"
            printed = "".join(line for line in lines if not row_of(line)) + errors
            self.note(section, {"error": f"{command[1:4]} {why}", "printed": printed[-3000:]})
        return None if stopped.is_set() else status, lines + errors.splitlines(keepends=True)


def row_of(line: str) -> Row | None:
    """What a section's process printed as a row."""
    try:
        row = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def build(check: Check) -> None:
    """Builds in place for the GPU's architecture; the figures of a full build are in the docs."""
    environment = {"INTERNIMAGE_CUDA": "0" if check.options.platform == "cpu" else "1"}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        capability = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        environment["INTERNIMAGE_CUDA_ARCHS"] = capability.split()[0].replace(".", "")
    start = time.perf_counter()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, _ = check.run("build", command, 240, INTERNIMAGE_CPU="1", **environment)
    if status == 0:
        sizes = {path.name: path.stat().st_size for path in (ROOT / "xla_ops").glob("_*.so")}
        check.note("build", {"seconds": time.perf_counter() - start, "bytes": sizes})


def test(check: Check) -> bool:
    """Runs the operators' tests there; whether none failed, and what is skipped may be."""
    cpu = check.options.platform == "cpu"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    command += ["-p", "no:benchmark"]  # it warns beside xdist, and warnings are errors here
    command += sorted(str(path) for path in ROOT.glob("tests/test_*_gpu.py"))
    if importlib.util.find_spec("xdist"):  # compiling is most of the time
        command += ["-n", str(min(12, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]
    environment = {"INTERNIMAGE_GPU_TESTS_ON": "host" if cpu else "cuda"}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the workers share the GPU's memory
    status, lines = check.run("test", command, 300 if cpu else 200, **environment)
    summary = summary_of(lines)
    skipped = [line.strip() for line in lines if line.startswith("SKIPPED")]
    check.note("test", {"summary": summary, "skipped": skipped})
    if status is None:  # out of time: no reason to have no times, if nothing failed before
        return not any(re.match(r"[.sxX]*[FE]", line) for line in lines)
    wanted = cpu or all("no such instructions" in line for line in skipped)
    return status == 0 and "passed" in summary and wanted


def summary_of(lines: list[str]) -> str:
    """pytest's last word, wherever it is in what was printed."""
    found = [
        line.strip() for line in lines if re.search(r"\d+ (passed|failed|skipped|error)", line)
    ]
    return found[-1] if found else "no summary"


DESCRIBE = """
import json, flax, jax, jaxlib, xla_ops
kernels = {name: list(status) for name, status in xla_ops.status().items()}
print(json.dumps({"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__,
                  "device": jax.devices()[0].device_kind, "kernels": kernels}))
"""


def main() -> None:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="sections to run")
    parser.add_argument("--no-build", action="store_true", help="take the extensions as they are")
    parser.add_argument("--no-test", action="store_true", help="they have passed")
    parser.add_argument("--keep-going", action="store_true", help="times even what fails its tests")
    parser.add_argument("--official", action="store_true", help="ops_dcnv3 is built and importable")
    parser.add_argument("--dcnv4", action="store_true", help="DCNv4 is importable")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=MODULE:FUNCTION",
        help="a function of torch tensors (x, offset, mask, group) to time as well",
    )  # fmt: skip
    parser.add_argument("--section", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sections = {section.name: section for section in SECTIONS}
    if options.section:
        serve(sections[options.section], options)
        return
    check = Check(options)
    gpu_op.peers_of(options)  # one that cannot be imported is an error now
    if not options.no_build:
        build(check)
    check.run("machine", [sys.executable, "-c", DESCRIBE], 60)
    if not options.no_test and not test(check) and not options.keep_going:
        sys.exit(f"the tests did not pass, so nothing is timed: see {options.output}")
    wanted = sum(sections[name].seconds for name in options.only)
    for name in options.only:
        command = [sys.executable, "-m", "benchmarks.gpu_check", *sys.argv[1:], "--section", name]
        seconds, left = sections[name].seconds, check.seconds_left()
        if left < 20:
            check.note(name, {"skipped": "no time left"})
        else:
            check.run(name, command, seconds * max(1, left / wanted))
        wanted -= seconds


if __name__ == "__main__":
    main()

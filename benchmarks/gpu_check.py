"""Checks and measures the CUDA kernels on a GPU, in one call of less than nine minutes.

    python -m benchmarks.gpu_check --output gpu.json
    python -m benchmarks.gpu_check --official --dcnv4 --peer deformops=my_adapters:deformops

In this order: builds the extensions for the GPU at hand, runs the tests on it (nothing is timed
where they fail, unless --keep-going), times whole models and looks at what their programs consist
of, times the operator beside its peers, and runs compute-sanitizer where it is. The failure of a
section is written down in the place of its result, and the file is written anew after each.
`--platform cpu` tries all of it without a GPU, at sizes that say nothing.

Operator times have no launch in them: a program applies the operator many times in a row, each time
to the result of the last, and the difference between long and short programs is what counts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
POINTS = 9
BUDGET = 530.0  # seconds, all in all


class Stage(NamedTuple):
    """Shape of a layer's operator: batch 64 of the model, or less where that is large."""

    name: str
    batch: int
    side: int
    channels: int
    group: int


def stages(model: str, batch: int, side: int, channels: int, group: int) -> Iterator[Stage]:
    for i in range(4):
        yield Stage(f"{model}{i + 1}", batch, side >> i, channels << i, group << i)


STAGES = [
    Stage("published", 64, 56, 128, 4),
    *stages("T", 64, 56, 64, 4),
    *stages("B", 64, 56, 112, 7),
    *stages("L", 16, 96, 160, 10),
    *stages("H", 4, 160, 320, 10),
]
TINY = [Stage("tiny", 2, 8, 32, 2)]


class Peak(NamedTuple):
    """What a GPU can do: bytes a second from DRAM; multiprocessors and their clock."""

    dram: float
    processors: int
    clock: float


PEAKS = {"H200": Peak(4.3e12, 132, 1.98e9), "H100": Peak(3.35e12, 132, 1.98e9)}
PEAKS["A100"] = Peak(2.0e12, 108, 1.41e9)


def floors(stage: Stage, dtype: str, device: str) -> dict[str, float]:
    """Microseconds that a forward call cannot go below, for what it moves and for what it reads."""
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    if peak is None:
        return {}
    size = 4 if dtype == "float32" else 2
    pairs = stage.batch * stage.side**2 * stage.group
    depth = stage.channels // stage.group
    moved = pairs * (2 * depth * size + 28 * size)  # x once, y once, the record
    taps = pairs * POINTS * 4 * depth * size  # through shared memory or L1, 128 bytes a clock
    on_chip = taps / (peak.processors * 128 * peak.clock)
    return {"dram_us": 1e6 * moved / peak.dram, "taps_us": 1e6 * on_chip}


# ---- operator ----


def operands(stage: Stage, spread: float) -> list[Any]:
    """x, offset, logits and dy; offsets of `spread` pixels."""
    import numpy as np

    random = np.random.default_rng(0)
    shape = (stage.batch, stage.side, stage.side)
    normal = lambda width: random.standard_normal((*shape, width), np.float32)  # noqa: E731
    widths = stage.channels, stage.group * POINTS * 2, stage.group * POINTS, stage.channels
    x, offset, logits, dy = map(normal, widths)
    return [x, spread * offset, logits, dy]


def slope(run: Callable[[int], Callable[[], Any]], few: int, many: int, repeats: int) -> float:
    """Microseconds of one application, from programs of `few` and of `many`; run(n)() waits."""
    times: dict[int, list[float]] = {few: [], many: []}
    programs = {n: run(n) for n in times}
    for program in programs.values():
        program()
    for _ in range(repeats):
        for n, program in programs.items():
            start = time.perf_counter()
            program()
            times[n].append(time.perf_counter() - start)
    short, long = (statistics.median(times[n]) for n in (few, many))
    return 1e6 * (long - short) / (many - few)


def time_ours(stage: Stage, dtype: str, spread: float, form: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import xla_ops

    x, offset, logits, dy = operands(stage, spread)
    if form == "fused":
        record = xla_ops.Record(stage.group, POINTS)
        rows = np.zeros((*x.shape[:3], record.width), np.float32)
        rows[..., record.offset], rows[..., record.mask] = offset, logits
        points = [jnp.asarray(rows, dtype)]
        function = functools.partial(xla_ops.dcnv3_fused, group=stage.group)
    else:
        mask = jax.nn.softmax(logits.reshape(*x.shape[:3], stage.group, POINTS))
        points = [jnp.asarray(offset, dtype), jnp.asarray(mask.reshape(logits.shape), dtype)]
        function = functools.partial(xla_ops.dcnv3, group=stage.group)
    function = functools.partial(function, implementation="kernel")
    x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)

    def forward(n: int) -> Callable[[], Any]:
        @jax.jit
        def program(x: jax.Array, *points: jax.Array) -> jax.Array:
            for _ in range(n):
                x = function(x, *points)
            return x

        return lambda: program(x, *points).block_until_ready()

    def backward(n: int) -> Callable[[], Any]:
        @jax.jit
        def program(dy: jax.Array, x: jax.Array, *points: jax.Array) -> jax.Array:
            for _ in range(n):
                dy = jax.vjp(function, x, *points)[1](dy)[0]
            return dy

        return lambda: program(dy, x, *points).block_until_ready()

    return {"forward_us": slope(forward, 2, 12, 7), "backward_us": slope(backward, 2, 12, 5)}


@contextlib.contextmanager
def only_global() -> Iterator[None]:
    os.environ["INTERNIMAGE_CUDA_FORM"] = "global"
    try:
        yield
    finally:
        del os.environ["INTERNIMAGE_CUDA_FORM"]


# Peers take torch tensors (x, offset, mask, group) and return y, which autograd goes back through.


def official(x: Any, offset: Any, mask: Any, group: int) -> Any:
    from functions.dcnv3_func import DCNv3Function  # pyright: ignore[reportMissingImports]

    depth = x.shape[-1] // group
    fixed = (3, 3, 1, 1, 1, 1, 1, 1, group, depth, 1.0, min(64, x.shape[0]), False)
    return DCNv3Function.apply(x, offset, mask, *fixed)


def dcnv4(x: Any, offset: Any, mask: Any, group: int) -> Any:
    import torch
    from DCNv4.functions import DCNv4Function  # pyright: ignore[reportMissingImports]

    n, h, w, _ = x.shape
    each = torch.cat([offset.view(n, h, w, group, -1), mask.view(n, h, w, group, -1)], -1)
    flat = each.flatten(3)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).contiguous()
    fixed = (3, 3, 1, 1, 1, 1, 1, 1, group, x.shape[-1] // group, 1.0, min(64, n), False)
    return DCNv4Function.apply(x, flat, *fixed)


def time_peer(
    peer: Callable, stage: Stage, dtype: str, spread: float, device: str
) -> dict[str, float]:
    import jax.numpy as jnp
    import numpy as np
    import torch

    import xla_ops

    arrays = operands(stage, spread)
    logits = arrays[2].reshape(*arrays[2].shape[:3], stage.group, POINTS)
    arrays[2] = np.asarray(torch.from_numpy(logits).softmax(-1).reshape(arrays[2].shape))
    x, offset, mask, dy = [torch.from_numpy(a).to(getattr(torch, dtype)).to(device) for a in arrays]
    x.requires_grad_()
    y = peer(x, offset, mask, stage.group)
    ours = xla_ops.dcnv3(*(jnp.asarray(a, dtype) for a in arrays[:3]), group=stage.group)
    wanted = np.asarray(ours, np.float32)
    difference = np.abs(y.detach().float().cpu().numpy() - wanted).max() / np.abs(wanted).max()
    if not difference < (1e-3 if dtype == "float32" else 5e-2):
        raise RuntimeError(f"its output differs from ours by {difference:.1e} of the largest value")

    def timed(run: Callable[[], Any]) -> float:
        for _ in range(3):
            run()
        if device == "cpu":
            start = time.perf_counter()
            run()
            return 1e6 * (time.perf_counter() - start)
        times = []
        for _ in range(7):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(10):
                run()
            last.record()
            torch.cuda.synchronize()
            times.append(100 * first.elapsed_time(last))
        return statistics.median(times)

    with torch.no_grad():
        forward = timed(lambda: peer(x, offset, mask, stage.group))
    backward = timed(lambda: torch.autograd.grad(y, x, dy, retain_graph=True))
    return {"difference": float(difference), "forward_us": forward, "backward_us": backward}


def time_operator(check: Check) -> Iterator[dict[str, Any]]:
    import jax

    device = jax.devices()[0].device_kind
    cpu = check.options.platform == "cpu"
    for stage in TINY if cpu else STAGES:
        for dtype in ("bfloat16", "float32"):
            wide = dtype == "bfloat16" or stage.name in ("published", "tiny")
            for spread in (1.0, 20.0) if wide else (1.0,):
                if check.seconds_left() < 60:
                    yield {"stopped": f"no time left at {stage.name}"}
                    return
                row: dict[str, Any] = {**stage._asdict(), "dtype": dtype, "spread": spread}
                forms = ("fused", "separate") if stage.name in ("published", "tiny") else ("fused",)
                for form in forms:
                    row[form] = check.attempt(time_ours, stage, dtype, spread, form)
                # Without planes in shared memory where there is a choice, to see if it is right.
                with only_global():
                    row["fused_global"] = check.attempt(time_ours, stage, dtype, spread, "fused")
                row |= floors(stage, dtype, device)
                for name, peer in check.peers.items():
                    kind = (
                        "float16" if name in ("official", "dcnv4") and dtype != "float32" else dtype
                    )
                    where = "cpu" if cpu else "cuda"
                    row[name] = check.attempt(time_peer, peer, stage, kind, spread, where)
                yield row


# ---- whole models ----


def compiled_model(name: str, batch: int, dtype: str, side: int | None) -> tuple[Any, Callable]:
    """A compiled model, and a call of it that waits."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from benchmarks.model import random_values
    from internimage_jax.config import released_model
    from internimage_jax.initial import fill
    from internimage_jax.model import InternImage

    released = released_model(name)
    side = side or released.image_size
    model = InternImage(released.config, dtype=dtype, param_dtype=dtype)
    fill(model, {k: v.astype(dtype) for k, v in random_values(released.config).items()})
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    images = np.random.RandomState(1).standard_normal((batch, side, side, 3))
    images = jnp.asarray(images, dtype)

    def forward(leaves: list[jax.Array], images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(images)

    compiled = jax.jit(forward).lower(leaves, images).compile()
    return compiled, lambda: compiled(leaves, images).block_until_ready()


def time_models(check: Check) -> Iterator[dict[str, Any]]:
    """How fast they are, and what of their programs splits a CUDA graph or moves data."""
    cpu = check.options.platform == "cpu"
    for name in ("internimage_t_1k_224", "internimage_b_1k_224"):
        for batch in (1, 2) if cpu else (1, 64):
            if check.seconds_left() < 45:
                yield {"stopped": f"no time left at {name}, batch {batch}"}
                return
            start = time.perf_counter()
            compiled, run = compiled_model(name, batch, "bfloat16", 64 if cpu else None)
            run()
            ready = time.perf_counter() - start
            times = []
            for _ in range(5 if cpu else 30):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            median = statistics.median(times)
            row = {"model": name, "batch": batch, "milliseconds": 1e3 * median}
            row |= {"images_per_second": batch / median, "seconds_to_first_result": ready}
            yield row | count_instructions(compiled.as_text())


def count_instructions(text: str) -> dict[str, int]:
    """Of a compiled program: what splits a CUDA graph or moves data without need."""
    lines = [line.strip() for line in text.splitlines()]
    entry = text[text.index("ENTRY") :]
    return {
        "command_buffers": sum(line.startswith("%command_buffer") for line in lines),
        "transposes": sum(" transpose(" in line for line in lines),
        "copies": sum(" copy(" in line or " copy-start(" in line for line in lines),
        "convolutions": sum("__cudnn$conv" in line or " convolution(" in line for line in lines),
        "dcnv3_calls": text.count('custom_call_target="internimage_dcnv3'),
        "instructions_of_entry": entry.count(" = "),
    }


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
            self.peers["official"] = official
        if options.dcnv4:
            self.peers["dcnv4"] = dcnv4
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
    check.section(time_operator)
    check.section(sanitize)


if __name__ == "__main__":
    main()

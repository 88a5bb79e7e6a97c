"""Times DCNv3 on a GPU, at the shapes of the models' layers, beside its peers and its floors.

A section of `benchmarks.gpu_check`. A program applies the operator many times in a row, each time
to the result of the last, and the difference between long and short programs is what counts; both
are long enough for XLA to launch them as CUDA graphs, so the gap from one node to the next is in
the times and the cost of a launch is not. A small map stays in the second-level cache from one
application to the next, as it would within a model; floors of what DRAM moves are for others.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from benchmarks.gpu_check import Rows

POINTS = 9


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
    *stages("H", 4, 160, 320, 10),
    *stages("T at batch 1, ", 1, 56, 64, 4),
    *stages("B", 64, 56, 112, 7),
    *stages("L", 16, 96, 160, 10),
]
TINY = [Stage("tiny", 2, 8, 32, 2)]


def copy_rate() -> dict[str, float]:
    """Bytes a second, read and written, of adding one to a gigabyte: what DRAM gives here."""
    import jax
    import jax.numpy as jnp

    count = 1 << (28 if jax.default_backend() == "gpu" else 20)
    x = jnp.zeros(count, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    add(x).block_until_ready()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        add(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return {"bytes_a_second": 8 * count / statistics.median(times)}


def floors(stage: Stage, dtype: str) -> dict[str, float]:
    """Microseconds that a forward call cannot go below: for what it moves, by the data sheet's rate
    of DRAM, unless that stays in the second-level cache; and for what it reads on the chip.
    """
    import jax

    from benchmarks.gpu_target import GPUS

    device = jax.devices()[0].device_kind
    gpu = next((gpu for name, gpu in GPUS.items() if name in device), None)
    if gpu is None:
        return {}
    size = 4 if dtype == "float32" else 2
    pairs = stage.batch * stage.side**2 * stage.group
    depth = stage.channels // stage.group
    moved = pairs * (2 * depth * size + 28 * size)  # x once, y once, the record
    taps = pairs * POINTS * 4 * depth * size  # through shared memory or L1, 128 bytes a clock
    found = {"moved": moved, "taps_us": 1e-3 * taps / (gpu.processors * 128 * gpu.clock)}
    return found | ({"dram_us": 1e6 * moved / gpu.bandwidth} if moved > gpu.level2 else {})


@functools.lru_cache(maxsize=1)  # making them takes longer than anything that is timed
def operands(stage: Stage, spread: float) -> tuple[Any, ...]:
    """x, offset, logits and dy; offsets of `spread` pixels."""
    import numpy as np

    drawn = np.random.default_rng(0).standard_normal(1_000_003, np.float32)  # of a prime count
    shape = (stage.batch, stage.side, stage.side)
    normal = lambda width: np.resize(drawn, (*shape, width))  # noqa: E731
    widths = stage.channels, stage.group * POINTS * 2, stage.group * POINTS, stage.channels
    x, offset, logits, dy = map(normal, widths)
    # Not those of x and offset in the same order.
    return x, spread * offset, logits[:, ::-1].copy(), dy[:, :, ::-1].copy()


FEW, MANY = 8, 32  # applications in a program; of fewer than five launches XLA makes no graph


def slope(run: Callable[[int], Callable[[], Any]], repeats: int = 7) -> float:
    """Microseconds of one application, from programs of few and of many; run(n)() waits."""
    times: dict[int, list[float]] = {FEW: [], MANY: []}
    programs = {n: run(n) for n in times}
    for program in programs.values():
        program()
    for _ in range(repeats):
        for n, program in programs.items():
            start = time.perf_counter()
            program()
            times[n].append(time.perf_counter() - start)
    short, long = (statistics.median(times[n]) for n in (FEW, MANY))
    return 1e6 * (long - short) / (MANY - FEW)


def attempt(function: Callable, *arguments: Any) -> Any:
    """What it returns, or its error: others stand without it."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


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

    return {"forward_us": slope(forward), "backward_us": slope(backward)}


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
) -> dict[str, Any]:
    import jax.numpy as jnp
    import numpy as np
    import torch

    import xla_ops

    arrays = list(operands(stage, spread))
    logits = arrays[2].reshape(*arrays[2].shape[:3], stage.group, POINTS)
    arrays[2] = np.asarray(torch.from_numpy(logits).softmax(-1).reshape(arrays[2].shape))
    x, offset, mask, dy = [torch.from_numpy(a).to(getattr(torch, dtype)).to(device) for a in arrays]
    for tensor in (x, offset, mask):
        tensor.requires_grad_()
    # Autograd goes back on the stream of the forward, which has to be the one that is captured.
    stream = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(stream):
        y = peer(x, offset, mask, stage.group)
    if stream:
        stream.synchronize()
    ours = xla_ops.dcnv3(*(jnp.asarray(a, dtype) for a in arrays[:3]), group=stage.group)
    wanted = np.asarray(ours, np.float32)
    difference = np.abs(y.detach().float().cpu().numpy() - wanted).max() / np.abs(wanted).max()
    if not difference < (1e-3 if dtype == "float32" else 5e-2):
        raise RuntimeError(f"its output differs from ours by {difference:.1e} of the largest value")
    found: dict[str, Any] = {"difference": float(difference)}

    def forward() -> None:
        with torch.no_grad():
            peer(x, offset, mask, stage.group)

    def backward() -> None:
        torch.autograd.grad(y, (x, offset, mask), dy, retain_graph=True)

    for name, run in (("forward", forward), ("backward", backward)):
        us, replayed = microseconds(run, stream)
        found |= {f"{name}_us": us, f"{name}_as_graph": replayed}
    return found


def microseconds(run: Callable[[], None], stream: Any) -> tuple[float, bool]:
    """Of one call among ten, as a CUDA graph where the code can be captured in one: launched from
    Python, a short kernel's time would be Python's. Whether it was.
    """
    import torch

    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    if stream is None:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start), False

    def ten() -> None:
        for _ in range(10):
            run()

    replay, captured = ten, False
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            ten()
        replay, captured = graph.replay, True
    except RuntimeError:
        torch.cuda.synchronize()
    times = []
    for _ in range(7):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        replay()
        last.record()
        torch.cuda.synchronize()
        times.append(100 * first.elapsed_time(last))
    return statistics.median(times), captured


def rows(options: argparse.Namespace) -> Rows:
    """The published shape and T's layers first: the others may find no time left."""
    cpu = options.platform == "cpu"
    yield {"what": "copy"}, copy_rate
    peers = peers_of(options)
    first = TINY[0] if cpu else STAGES[0]
    plan = [(first, "bfloat16", 1.0)]
    if not cpu:
        plan += [(stage, "bfloat16", 1.0) for stage in STAGES[1:5]]
        plan += [(first, "bfloat16", 20.0), (first, "float32", 1.0)]
        plan += [(stage, "bfloat16", 1.0) for stage in STAGES[5:]]
        plan += [(STAGES[1], "float32", 1.0)]
    plan += [(stage, "bfloat16", 20.0) for stage in (TINY if cpu else STAGES[1:])]
    for stage, dtype, spread in plan:
        row = {**stage._asdict(), "dtype": dtype, "spread": spread}
        yield row, functools.partial(measure, stage, dtype, spread, peers, cpu)
    for dtype in ("bfloat16", "float32"):
        row = {**first._asdict(), "dtype": dtype, "spread": 1.0, "what": "other forms"}
        yield row, functools.partial(other_forms, first, dtype)


def peers_of(options: argparse.Namespace) -> dict[str, Callable]:
    peers: dict[str, Callable] = {"official": official} if options.official else {}
    peers |= {"dcnv4": dcnv4} if options.dcnv4 else {}
    modules = {"official": "functions.dcnv3_func", "dcnv4": "DCNv4.functions"}
    for name in peers:
        importlib.import_module(modules[name])  # so that one which is missing is an error at once
    for peer in options.peer:
        name, _, place = peer.partition("=")
        module, _, function = place.partition(":")
        peers[name] = getattr(importlib.import_module(module), function)
    return peers


def measure(
    stage: Stage, dtype: str, spread: float, peers: dict[str, Callable], cpu: bool
) -> dict[str, Any]:
    found: dict[str, Any] = floors(stage, dtype)
    found["fused"] = attempt(time_ours, stage, dtype, spread, "fused")
    for name, peer in peers.items():
        # Those two have no bfloat16.
        half = name.startswith(("official", "dcnv4")) and dtype != "float32"
        kind = "float16" if half else dtype
        where = "cpu" if cpu else "cuda"
        found[name] = attempt(time_peer, peer, stage, kind, spread, where)
    return found


def other_forms(stage: Stage, dtype: str) -> dict[str, Any]:
    """The separate form, and the fused one without shared memory: is it right to use it?"""
    found = {"separate": attempt(time_ours, stage, dtype, 1.0, "separate")}
    with only_global():
        found["fused_global"] = attempt(time_ours, stage, dtype, 1.0, "fused")
    return found

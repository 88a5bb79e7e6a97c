"""Times DCNv3: the kernel beside its jnp form, and beside the official PyTorch fallback.

    python -m benchmarks.op                       kernel and jnp form
    python -m benchmarks.op --official CHECKOUT   and the official code's F.grid_sample form (torch)

The shapes are the four stages of InternImage-T at batch 1 and 8, and the third stage of H. Outputs
and gradients are compared before anything is timed. The contestants take turns of a few calls, and
the figures are medians; on a shared machine only the ratios mean something.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import xla_ops
from benchmarks.official import checkout, load_official_operator

# side, channels, groups; the stages of T at 224 and the third of H at 640
STAGES = {
    "T1": (56, 64, 4),
    "T2": (28, 128, 8),
    "T3": (14, 256, 16),
    "T4": (7, 512, 32),
    "H3": (40, 1280, 40),
}
POINTS = 9
CALLS_A_TURN = 4


class Contestant(NamedTuple):
    """What an implementation computes (y and three gradients), and what to time."""

    results: list[np.ndarray]
    forward: Callable[[], object]
    both: Callable[[], object]


def inputs(batch: int, side: int, channels: int, group: int, spread: float) -> list[np.ndarray]:
    """x, offset, mask (a softmax) and dy; offsets of `spread` pixels."""
    random = np.random.RandomState(0)
    normal = lambda width: random.standard_normal((batch, side, side, width)).astype(np.float32)  # noqa: E731
    logits = normal(group * POINTS).reshape(batch, side, side, group, POINTS)
    mask = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mask = mask.reshape(batch, side, side, -1)
    return [normal(channels), spread * normal(group * POINTS * 2), mask, normal(channels)]


def ours(
    implementation: xla_ops.Implementation, group: int, arrays: list[np.ndarray], dtype: str
) -> Contestant:
    *operands, dy = [jnp.asarray(a, dtype) for a in arrays]
    function = functools.partial(xla_ops.dcnv3, group=group, implementation=implementation)
    forward, both = _calls(function, operands, dy)
    return Contestant([np.asarray(a, np.float32) for a in both()], forward, both)


def fused(group: int, arrays: list[np.ndarray], dtype: str) -> Contestant:
    """The fused form on the same points; timed only (the tests compare it)."""
    x, offset, mask, dy = arrays
    record = xla_ops.Record(group, POINTS)
    rows = np.zeros((*x.shape[:3], record.width), np.float32)
    rows[..., record.offset], rows[..., record.mask] = offset, np.log(mask)
    operands = [jnp.asarray(x, dtype), jnp.asarray(rows)]
    function = functools.partial(xla_ops.dcnv3_fused, group=group, implementation="kernel")
    return Contestant([], *_calls(function, operands, jnp.asarray(dy, dtype)))


def _calls(
    function: Callable[..., jax.Array], operands: list[jax.Array], dy: jax.Array
) -> tuple[Callable[[], jax.Array], Callable[[], tuple[jax.Array, ...]]]:
    """The forward, and forward and backward."""

    @jax.jit
    def both(*operands: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(function, *operands)
        return y, *pullback(dy)

    forward = jax.jit(function)
    return (
        lambda: jax.block_until_ready(forward(*operands)),
        lambda: jax.block_until_ready(both(*operands)),
    )


def official(function: Callable, group: int, arrays: list[np.ndarray], dtype: str) -> Contestant:
    import torch

    x, offset, mask, dy = [torch.from_numpy(a).to(getattr(torch, dtype)) for a in arrays]
    depth = x.shape[-1] // group
    for a in (x, offset, mask):
        a.requires_grad_()

    def forward() -> torch.Tensor:
        return function(x, offset, mask, 3, 3, 1, 1, 1, 1, 1, 1, group, depth, 1.0, False)

    def forward_alone() -> None:
        with torch.no_grad():
            forward()

    def both() -> tuple[torch.Tensor, ...]:
        y = forward()
        return y.detach(), *torch.autograd.grad(y, (x, offset, mask), dy)

    return Contestant([a.float().numpy() for a in both()], forward_alone, both)


def medians(contestants: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Milliseconds of a call of each, taking turns for about `seconds` a contestant.

    A turn is several calls. Its first 10 ms, and one call at least, are not timed: until then the
    threads of the contestant before may hold a core (torch's spin for milliseconds), and its data
    the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds * len(contestants)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3 * CALLS_A_TURN:
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            while time.perf_counter() - start < 0.01:
                run()
            for _ in range(CALLS_A_TURN):
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(name: str, got: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    for what, a, b in zip(("y", "dx", "doffset", "dmask"), got, expected, strict=True):
        # Offsets may fall on a pixel to rounding, where implementations take either side's slope.
        error = np.quantile(np.abs(a - b), 0.999 if what == "doffset" else 1) / np.abs(b).max()
        if not error < tolerance:
            raise SystemExit(f"{name}: {what} differs by {error:.1e} of its largest magnitude")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times DCNv3 against other implementations.")
    parser.add_argument("--official", type=checkout, help="a checkout of the official code")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--spread", type=float, default=1.0, help="of the offsets, in pixels")
    parser.add_argument("--seconds", type=float, default=1.0, help="a contestant and measurement")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()

    function = load_official_operator(options.official) if options.official else None
    print(f"kernel on {jax.default_backend()}: {xla_ops.status()}", file=sys.stderr)
    for stage in options.stages:
        side, channels, group = STAGES[stage]
        for batch in options.batches if stage.startswith("T") else options.batches[:1]:
            arrays = inputs(batch, side, channels, group, options.spread)
            forms = {f: ours(f, group, arrays, options.dtype) for f in ("kernel", "gather")}
            if function:
                forms["official"] = official(function, group, arrays, options.dtype)
            tolerance = 1e-4 if options.dtype == "float32" else 5e-2
            for form in forms:
                compare(f"{stage} {form}", forms["kernel"].results, forms[form].results, tolerance)
            forms["fused"] = fused(group, arrays, options.dtype)
            for direction in ("forward", "both"):
                runs = {form: getattr(f, direction) for form, f in forms.items()}
                times = medians(runs, options.seconds)
                row = {"stage": stage, "batch": batch, "dtype": options.dtype}
                row["direction"] = direction
                row["cpu_kernels"] = xla_ops.status()["cpu"].detail
                row |= {f"{form}_ms": round(value, 4) for form, value in times.items()}
                row |= {
                    f"{form}/kernel": round(times[form] / times["kernel"], 1)
                    for form in ("gather", "official")
                    if form in times
                }
                line = "  ".join(f"{key} {value}" for key, value in row.items())
                print(json.dumps(row) if options.json else line, flush=True)


if __name__ == "__main__":
    main()

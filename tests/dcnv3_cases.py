"""What the tests of DCNv3's kernels share: the official code's outputs, and random problems."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import xla_ops
from tests.layers import on_device

REFERENCE = Path(__file__).parent / "reference" / "goldens"
CASES = {case.pop("name"): case for case in json.loads((REFERENCE / "dcnv3_op.json").read_text())}
GRADIENTS = ("grad_x", "grad_offset", "grad_mask")
# Of the largest magnitude of the recorded array.
TOLERANCE = {"float32": 1e-5, "float64": 1e-11}
HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # unit roundoff; held to twice that


@functools.cache
def goldens() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "dcnv3_op.npz") as arrays:
        return dict(arrays)


def recorded(name: str) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """x, offset, mask and dy of a case; its output, and gradients if it has any, by name."""
    arrays = {key.split("/")[1]: a for key, a in goldens().items() if key.startswith(f"{name}/")}
    dy = arrays.get("grad_output", np.zeros_like(arrays["output"]))
    results = {key: arrays[key] for key in ("output", *GRADIENTS) if key in arrays}
    return [*(arrays[key] for key in ("x", "offset", "mask")), dy], results


def settings_of(case: dict) -> dict:
    names = ("stride", "pad", "dilation", "group", "offset_scale", "remove_center")
    return {name: case[name] for name in names} | {
        "kernel_size": (case["kernel_h"], case["kernel_w"])
    }


@functools.cache
def compiled(operator: str, options: tuple) -> Callable:
    """From operands and dy to the output and the gradients; one program, not an op at a time."""
    function = functools.partial(getattr(xla_ops, operator), **dict(options))

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(function, *arrays[:-1])
        return y, *pullback(arrays[-1])

    return jax.jit(run)


def value_and_gradients(
    implementation: str, *arrays: jax.Array | np.ndarray, **options: object
) -> tuple:
    """Of `dcnv3` for x, offset, mask and dy, or of `dcnv3_fused` for x, record and dy."""
    operator = "dcnv3" if len(arrays) == 4 else "dcnv3_fused"
    options["implementation"] = implementation
    return compiled(operator, tuple(sorted(options.items())))(*arrays)


def difference(a: jax.Array, b: jax.Array) -> float:
    """Largest difference, in units of b's largest magnitude."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def problem(
    seed: int, dtype: str, geometry: dict, size: tuple[int, int, int], depth: int, spread=1.5
):
    """Random x, offset, mask, dy; offsets whose location is never close to a pixel."""
    random = np.random.RandomState(seed)
    n, h, w = size
    g = geometry["group"]
    (kh, kw), s, p, d = (geometry[k] for k in ("kernel_size", "stride", "pad", "dilation"))
    points = kh * kw - geometry["remove_center"]
    out = [(e + 2 * p - d * (k - 1) - 1) // s + 1 for e, k in ((h, kh), (w, kw))]
    whole = np.round(random.standard_normal((n, *out, g * points * 2)) * spread)
    offset = (whole + random.uniform(0.1, 0.9, whole.shape)) / geometry["offset_scale"]
    mask = random.standard_normal((n, *out, g * points))
    x, dy = (
        random.standard_normal((n, h, w, g * depth)),
        random.standard_normal((n, *out, g * depth)),
    )
    return on_device((x, offset, mask, dy), dtype)


def fused_problem(
    dtypes: tuple[str, str], size: tuple[int, int, int], group: int, depth: int, **changes: object
) -> tuple[list[jax.Array], dict]:
    """Random x, record and dy of the fused form with nine points, and the geometry.

    The dtypes are x's and the record's.
    """
    geometry = {"group": group, "kernel_size": (3, 3), "stride": 1, "pad": 1, "dilation": 1}
    geometry |= {"offset_scale": 1.0, "remove_center": False} | changes
    x, offset, mask, dy = problem(11, dtypes[0], geometry, size, depth)
    record = xla_ops.Record(group, 9)
    rows = np.random.RandomState(12).standard_normal((*offset.shape[:3], record.width))
    rows[..., record.offset], rows[..., record.mask] = offset, 2 * np.asarray(mask, np.float64)
    return [x, *on_device([rows], dtypes[1]), dy], geometry

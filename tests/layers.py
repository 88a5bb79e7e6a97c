"""What the tests of the layers share: tolerances, operands, and which kernels there are."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import xla_ops
from xla_ops import _ffi, _targets

TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}

needs_kernel = pytest.mark.skipif(
    xla_ops.status()["cpu"].implementation != "kernel",
    reason=f"no kernel for CPU: {xla_ops.status()['cpu'].detail}",
)
SERVES = "cpu" in _ffi.serving(_targets.LINEAR_FORWARD)
kernel_serves = pytest.mark.skipif(not SERVES, reason="no kernel of `linear` for this CPU")


def kernel():
    return pytest.param("kernel", marks=kernel_serves)


def on_device(arrays: Iterable[np.ndarray], dtype: str) -> list[jax.Array]:
    """Rounded by NumPy: JAX would compile a program for each shape."""
    return [jax.device_put(a.astype(dtype)) for a in arrays]


def operands(
    shape: tuple[int, ...], size: int = 3, dtype: str = "float32", seed: int = 0
) -> list[jax.Array]:
    """x, the four parameters, and dy; a channel mean far from zero, as trained maps have."""
    stream = np.random.RandomState(seed)
    c = shape[-1]
    normal = stream.standard_normal
    arrays = [normal(shape), normal((size, size, c)) / size, normal(c) + 2]
    arrays += [1 + 0.2 * normal(c), normal(c), normal(shape)]
    return on_device(arrays, dtype)


def assert_close(got: object, wanted: object, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        if a.size:
            assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)


@functools.cache
def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("data",), axis_types=(kind,))


def for_cuda(function, *arrays: jax.Array) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()

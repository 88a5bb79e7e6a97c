"""The layers besides DCNv3 on a GPU, held to the jnp form in float64 on the CPU.

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_layers_gpu.py

Without a GPU the same code runs in test_layers_cuda.py, on the host; INTERNIMAGE_GPU_TESTS_ON=cpu
tries these tests themselves, on the CPU's kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from tests.test_dwconv import TOLERANCE, assert_close, operands
from xla_ops import _ffi

PLATFORM = os.environ.get("INTERNIMAGE_GPU_TESTS_ON", "cuda")
STATUS = xla_ops.status()[PLATFORM]

pytestmark = pytest.mark.skipif(
    STATUS.implementation != "kernel", reason=f"no kernel for {PLATFORM}: {STATUS.detail}"
)

# Of the released models, and of every way to divide channels and pixels.
SHAPES = [
    ((2, 14, 14, 64), 3),
    ((1, 7, 9, 112), 3),
    ((1, 12, 12, 1280), 5),
    ((1, 6, 7, 4096), 5),
    ((3, 5, 1, 33), 3),
    ((1, 1, 2048, 8), 1),
    ((0, 4, 4, 8), 3),
]


def on(platform: str, form: str, function: Callable, *arrays: np.ndarray) -> list[np.ndarray]:
    """Value and gradients of `function` by the platform's kernel or the jnp form."""
    device = jax.local_devices(backend=platform)[0]

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(
            lambda *a: function(*a, implementation=form), *operands[: len(arrays) - 1]
        )
        return y, *pullback(operands[-1])

    with jax.default_device(device):
        results = jax.jit(run)(*(jax.device_put(a, device) for a in arrays))
    return [np.asarray(r) for r in results]


def assert_as_exact(function: Callable, dtype: str, *arrays: jax.Array) -> None:
    got = on(PLATFORM, "kernel", function, *map(np.asarray, arrays))
    with jax.enable_x64(True):
        expected = on("cpu", "jnp", function, *(np.asarray(a, np.float64) for a in arrays))
    assert_close(got, expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_dwconv_norm_gelu(shape: tuple[int, ...], size: int, dtype: str) -> None:
    if dtype == "float64" and shape[-1] > 2048 and PLATFORM == "cuda":
        pytest.skip("more channels than CUDA's backward takes in float64")
    with jax.enable_x64(dtype == "float64"):
        assert_as_exact(xla_ops.dwconv_norm_gelu, dtype, *operands(shape, size, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 14, 14, 256), (1, 3, 5, 7), (1, 1, 1, 1), (0, 2, 2, 8)])
def test_bias_gelu(shape: tuple[int, ...], dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, _, bias, *_, dy = operands(shape, 3, dtype)
        assert_as_exact(xla_ops.bias_gelu, dtype, 4 * x, bias, dy)


@pytest.mark.skipif(
    _ffi.LINEAR_GELU_FORWARD not in _ffi.usable_targets(PLATFORM), reason="not on this platform"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((8, 56, 56, 64), 256),  # each size of tile
        ((1, 56, 56, 112), 448),
        ((1, 7, 7, 512), 2048),
        ((1, 1, 1, 8), 8),  # nothing is full
        ((3, 5, 7, 40), 136),
        ((0, 4, 4, 16), 16),
    ],
    ids=str,
)
def test_linear_bias_gelu(shape: tuple[int, ...], outputs: int, dtype: str) -> None:
    normal = np.random.RandomState(0).standard_normal
    arrays = normal(shape), normal((shape[-1], outputs)) / np.sqrt(shape[-1]), normal(outputs)
    x, kernel, vector = (jnp.asarray(a, dtype) for a in arrays)
    for bias in (vector, vector.astype("float32")):
        exact = [np.asarray(a, np.float64) for a in (x, kernel, bias)]
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            wanted = xla_ops.linear_bias_gelu(*map(jnp.asarray, exact), implementation="jnp")
        got = [xla_ops.linear_bias_gelu(x, kernel, bias, implementation="kernel") for _ in range(2)]
        assert_close(got[0], wanted, TOLERANCE[dtype])
        assert got[0].tobytes() == got[1].tobytes()


def test_half_precision_with_float32_parameters() -> None:
    x, *parameters, dy = operands((2, 7, 7, 128))
    halves = [x.astype("bfloat16"), *parameters, dy.astype("bfloat16")]
    assert_as_exact(xla_ops.dwconv_norm_gelu, "bfloat16", *halves)


def test_the_same_bits_each_time() -> None:
    arrays = [np.asarray(a) for a in operands((4, 14, 14, 128), 3, "bfloat16")]
    first, *others = (on(PLATFORM, "kernel", xla_ops.dwconv_norm_gelu, *arrays) for _ in range(3))
    for other in others:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, other, strict=True))

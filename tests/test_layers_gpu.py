"""The CUDA kernels of the layers besides DCNv3, held to the jnp form in float64 on the CPU.

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_layers_gpu.py

Without a GPU a CPU runs the same code (gpu.py); test_layers_cuda.py does under sanitizers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from tests import gpu
from tests.test_dwconv import TOLERANCE, assert_close, operands

pytestmark = gpu.needs_it()

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


def by_cuda(function: Callable, *arrays: np.ndarray, times: int = 1) -> list[list[np.ndarray]]:
    """Value and gradients of `function` by the CUDA kernels, as often as asked."""
    with gpu.kernels():
        return _on(gpu.device(), "kernel", function, *arrays, times=times)


def _on(
    device: jax.Device, form: str, function: Callable, *arrays: np.ndarray, times: int = 1
) -> list[list[np.ndarray]]:
    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(
            lambda *a: function(*a, implementation=form), *operands[: len(arrays) - 1]
        )
        return y, *pullback(operands[-1])

    with jax.default_device(device):
        local = [jax.device_put(a, device) for a in arrays]
        compiled = jax.jit(run)
        return [[np.asarray(r) for r in compiled(*local)] for _ in range(times)]


def assert_as_exact(function: Callable, dtype: str, *arrays: jax.Array) -> None:
    (got,) = by_cuda(function, *map(np.asarray, arrays))
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True):
        exact = [np.asarray(a, np.float64) for a in arrays]
        (expected,) = _on(cpu, "jnp", function, *exact)
    assert_close(got, expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("shape", "size", "dtype"),
    [
        (*case, dtype)
        for case in SHAPES
        for dtype in TOLERANCE
        if dtype != "float64" or case[0][-1] <= 2048  # what the backward takes
    ],
    ids=str,
)
def test_dwconv_norm_gelu(shape: tuple[int, ...], size: int, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        assert_as_exact(xla_ops.dwconv_norm_gelu, dtype, *operands(shape, size, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 14, 14, 256), (1, 3, 5, 7), (1, 1, 1, 1), (0, 2, 2, 8)])
def test_bias_gelu(shape: tuple[int, ...], dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, _, bias, *_, dy = operands(shape, 3, dtype)
        assert_as_exact(xla_ops.bias_gelu, dtype, 4 * x, bias, dy)


@gpu.needs_tensor_cores()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        gpu.large((16, 56, 56, 64), 256),  # blocks that stay, with four stages and with two
        gpu.large((16, 28, 28, 112), 448),
        gpu.large((64, 7, 7, 512), 2048),
        gpu.large((8, 7, 7, 904), 12288),  # and those that do not, of each size
        gpu.large((1, 28, 28, 128), 512),
        gpu.large((1, 14, 14, 256), 1024),
        gpu.large((1, 7, 7, 512), 2048),
        ((1, 33, 32, 24), 136),  # and again, on the host
        ((1, 4, 27, 208), 136),
        ((1, 1, 1, 8), 8),  # nothing is full
        ((3, 5, 7, 40), 136),
        ((0, 4, 4, 16), 16),
    ],
    ids=str,
)
def test_linear_with_gelu(shape: tuple[int, ...], outputs: int, dtype: str) -> None:
    normal = np.random.RandomState(0).standard_normal
    arrays = normal(shape), normal((shape[-1], outputs)) / np.sqrt(shape[-1]), normal(outputs)
    x, kernel, vector = (jnp.asarray(a, dtype) for a in arrays)
    for bias in (vector, vector.astype("float32")):
        exact = [np.asarray(a, np.float64) for a in (x, kernel, bias)]
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            wanted = xla_ops.linear(*map(jnp.asarray, exact), gelu=True, implementation="jnp")
        first, second = products(2, x, kernel, bias)
        assert_close(first, wanted, TOLERANCE[dtype])
        assert first.tobytes() == second.tobytes()


def products(times: int, *arrays: jax.Array) -> list[np.ndarray]:
    local = [jax.device_put(a, gpu.device()) for a in arrays]
    with gpu.kernels():
        run = jax.jit(functools.partial(xla_ops.linear, gelu=True, implementation="kernel"))
        return [np.asarray(run(*local)) for _ in range(times)]


@gpu.needs_tensor_cores()
def test_linear_with_gelu_of_what_is_not_finite() -> None:
    x, kernel, bias = np.ones((1, 9, 9, 40)), np.ones((40, 72)), np.zeros(72)
    x[0, 0, 3, 7], x[0, 5, 5, 39], x[0, 8, 8, 0] = np.nan, np.inf, -np.inf
    bias[5], bias[11] = np.nan, -np.inf
    (got,) = products(1, *(jnp.asarray(a, "bfloat16") for a in (x, kernel, bias)))
    with np.errstate(invalid="ignore"):
        z = x @ kernel + bias
    wanted = np.where(z == -np.inf, 0, z)
    np.testing.assert_array_equal(got.astype(np.float64), wanted)


def test_half_precision_with_float32_parameters() -> None:
    x, *parameters, dy = operands((2, 7, 7, 128))
    halves = [x.astype("bfloat16"), *parameters, dy.astype("bfloat16")]
    assert_as_exact(xla_ops.dwconv_norm_gelu, "bfloat16", *halves)


def test_the_same_bits_each_time() -> None:
    arrays = [np.asarray(a) for a in operands((4, 14, 14, 128), 3, "bfloat16")]
    first, *others = by_cuda(xla_ops.dwconv_norm_gelu, *arrays, times=3)
    for other in others:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, other, strict=True))

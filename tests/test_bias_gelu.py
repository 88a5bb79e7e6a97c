"""Bias and GELU: kernel and definition. What all kernels share is tested in test_dwconv.py."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from tests.layers import TOLERANCE, assert_close, needs_kernel, on_device
from tests.transforms import check_transforms
from xla_ops import _targets


def operands(shape: tuple[int, ...], dtype: str = "float32") -> list[jax.Array]:
    """x, bias and dy."""
    stream = np.random.RandomState(0)
    arrays = 3 * stream.standard_normal(shape), stream.standard_normal(shape[-1:])
    return on_device((*arrays, stream.standard_normal(shape)), dtype)


@functools.cache
def program(implementation: str | None):
    """From operands and dy to y and the gradients."""

    def run(x: jax.Array, bias: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        function = functools.partial(xla_ops.bias_gelu, implementation=implementation)
        y, pullback = jax.vjp(function, x, bias)
        return y, *pullback(dy)

    return jax.jit(run)


@pytest.mark.parametrize("implementation", ["jnp", pytest.param("kernel", marks=needs_kernel)])
def test_far_out_it_is_its_limit_and_nan_stays_nan(implementation: str) -> None:
    values = np.array([-np.inf, -1e30, 1e30, np.inf, np.nan], np.float32)
    x = jnp.asarray(values)[None, None, :, None]
    y, dx, _ = program(implementation)(x, jnp.zeros(1), jnp.ones_like(x))
    np.testing.assert_allclose(y.ravel(), [0, 0, 1e30, np.inf, np.nan], atol=1e-30)
    np.testing.assert_allclose(dx.ravel(), [0, 0, 1, 1, np.nan], atol=1e-30)


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernel_agrees_with_the_definition_in_float64(dtype: str) -> None:
    with jax.enable_x64(True):
        for shape in ((2, 3, 5, 37), (1, 1, 1, 1), (0, 2, 2, 8)):
            arrays = operands(shape, dtype)
            got = program("kernel")(*arrays)
            wanted = program("jnp")(*(np.asarray(a, np.float64) for a in arrays))
            assert [a.dtype for a in got] == [dtype] * 3
            # The bias's gradient sums what is rounded to the dtype.
            assert_close(got, wanted, 2 * TOLERANCE[dtype])
        if dtype in ("bfloat16", "float16"):
            x, bias, dy = operands((1, 2, 3, 20), dtype)
            mixed = program("kernel")(x, bias.astype("float32"), dy)
            assert mixed[2].dtype == "float32"
            assert_close(mixed, program("kernel")(x, bias, dy), 2 * TOLERANCE[dtype])


@needs_kernel
def test_rows_that_threads_do_not_share_evenly() -> None:
    arrays = operands((1, 41, 41, 64))
    assert_close(program("kernel")(*arrays), program("jnp")(*arrays))


@needs_kernel
@pytest.mark.parametrize(("value", "of_dy"), [(1.5, (6e4, -6e4)), (-0.2, (1.2e-7, 1.2e-7))])
def test_the_gradient_of_a_bias_fits_float16_where_those_of_x_do_not(
    value: float, of_dy: tuple[float, float]
) -> None:
    x = jnp.full((1, 64, 64, 1), value, "float16")
    dy = jnp.tile(jnp.asarray(of_dy, "float16"), 2048).reshape(x.shape)
    got = float(program("kernel")(x, jnp.zeros(1), dy)[2][0])
    slope = 0.5 + 0.5 * math.erf(value / math.sqrt(2))
    slope += value * math.exp(-(value**2) / 2) / math.sqrt(2 * math.pi)
    assert got == pytest.approx(slope * np.asarray(dy, np.float64).sum(), rel=1e-2, abs=1e-6)


@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_not_finite(dtype: str) -> None:
    with np.errstate(over="ignore"):
        x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0]).astype(dtype).reshape(1, 1, 1, 6)
    results = program("kernel")(x, jnp.zeros(6, dtype), jnp.ones(x.shape, dtype))
    x, y, dx, _ = (np.asarray(a, "float64") for a in (x, *results))
    np.testing.assert_array_equal(np.ravel(y)[[0, 1, 3, 5]], np.ravel(x)[[0, 1, 3, 5]])
    np.testing.assert_allclose(np.ravel(y)[[2, 4]], 0, atol=3e-37)
    np.testing.assert_allclose(np.ravel(dx), [np.nan, 1, 0, 1, 0, 0.5], rtol=2e-7, atol=1e-35)


@needs_kernel
@pytest.mark.parametrize("channels", [1, 5, 20, 37])
def test_all_channels_are_rounded_alike(channels: int) -> None:
    def value_and_slope(n: int) -> list[np.ndarray]:
        z = jnp.asarray(np.linspace(-14, 6, 64 * channels), "float32").reshape(1, 1, -1, n)
        return [np.ravel(a) for a in program("kernel")(z, jnp.zeros(n), jnp.ones_like(z))[:2]]

    for got, wanted in zip(value_and_slope(channels), value_and_slope(64), strict=True):
        np.testing.assert_array_equal(got, wanted)


@needs_kernel
def test_transforms() -> None:
    x, bias, _ = operands((4, 3, 4, 8))
    check_transforms(xla_ops.bias_gelu, [x, bias], _targets.GELU_FORWARD, shared=1)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (jnp.zeros((2, 3)), jnp.zeros(3), r"x: expected shape \(N, H, W, C\).* got \(2, 3\)"),
        (jnp.zeros((1, 1, 1, 3), int), jnp.zeros(3), "x: expected one of float32"),
        (jnp.zeros((1, 1, 1, 3)), jnp.zeros(4), r"bias: expected shape \(3,\) .* got \(4,\)"),
        (jnp.zeros((1, 1, 1, 3)), jnp.zeros(3, "bfloat16"), "bias: .* and bfloat16"),
    ],
)
def test_what_does_not_fit_is_named(x: jax.Array, bias: jax.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        xla_ops.bias_gelu(x, bias)

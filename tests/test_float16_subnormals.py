"""float16 below 6.1e-5, where it is subnormal, is read by the kernels on a CPU.

XLA's threads count subnormal float32 numbers as zeros, and each width of a vector is read in a way
of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from tests.layers import kernel_serves, needs_kernel

SMALL = 3e-5
RANDOM = np.random.RandomState(0)
Case = Callable[[str], Any]  # from the form to the results


def numbers(*shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(
        scale * RANDOM.choice([-1, 1], shape) * RANDOM.uniform(0.5, 1, shape), "float16"
    )


def dcnv3(depth: int, of_x: float, of_mask: float, of_dy: float) -> Case:
    offset = numbers(1, 5, 6, 18)
    operands = numbers(1, 5, 6, depth, scale=of_x), offset, numbers(1, 5, 6, 9, scale=of_mask)
    dy = numbers(1, 5, 6, depth, scale=of_dy)

    def run(form: str) -> Any:
        form = "gather" if form == "jnp" else form
        y, gradients = jax.vjp(
            lambda *a: xla_ops.dcnv3(*a, group=1, implementation=form),  # type: ignore[arg-type]
            *operands,
        )
        return y, *gradients(dy)

    return run


def layer(operator: Callable[..., Any], *operands: jax.Array) -> Case:
    return lambda form: operator(*operands, implementation=form)


def cases(channels: int) -> dict[str, Case]:
    small, vector = numbers(channels, scale=SMALL), numbers(channels)
    large, kernel = numbers(1, 5, 6, 8, scale=2e4), numbers(8, channels, scale=SMALL)
    x, taps = numbers(1, 5, 6, channels), numbers(3, 3, channels, scale=SMALL)
    return {
        "dcnv3, x": dcnv3(channels, SMALL, 1, 1),
        "dcnv3, mask": dcnv3(channels, 1, SMALL, 1),
        "dcnv3, dy": dcnv3(channels, 1, 1, SMALL),
        "linear": layer(xla_ops.linear, large, kernel, small),
        "layer_norm": layer(xla_ops.layer_norm, x, small, small),
        "bias_gelu": layer(xla_ops.bias_gelu, x * 0, small),
        "dwconv": layer(xla_ops.dwconv_norm_gelu, x * 64, taps, small, vector, vector),
    }


CASES = {f"{name}, {c}": case for c in (5, 12, 40) for name, case in cases(c).items()}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=kernel_serves if name.startswith("linear") else needs_kernel)
        for name in CASES
    ],
)
def test_subnormal_numbers_count(name: str) -> None:
    def results(form: str) -> list[np.ndarray]:
        leaves = jax.tree.leaves(jax.jit(lambda: CASES[name](form))())
        return [np.asarray(leaf, np.float64) for leaf in leaves]

    for a, b in zip(results("kernel"), results("jnp"), strict=True):
        # Of rounding the largest, and eight times a last bit: gradients of x in jnp are sums of
        # numbers in half precision.
        allowed = 2**-9 * np.abs(b).max() + 2**-21
        np.testing.assert_allclose(a, b, rtol=0, atol=allowed)
        assert np.abs(b).max() > 8 * allowed

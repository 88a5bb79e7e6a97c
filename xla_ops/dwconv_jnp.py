"""Depthwise convolution, LayerNorm and GELU in jnp: the definition, and what serves elsewhere.

Axes: N batch, H W map, C channels, K the side of the kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from xla_ops.explicit_axes import as_automatic
from xla_ops.gelu_jnp import gelu
from xla_ops.operands import at_least_float32, varying_alike


def dwconv_norm_gelu_jnp(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    offset: jax.Array,
    epsilon: float,
) -> jax.Array:
    """Computes `xla_ops.dwconv_norm_gelu` from checked arguments; see there for the arguments."""
    real = at_least_float32(x.dtype)
    kernel = kernel.astype(real)
    bias, scale, offset = (a.astype(real)[None, None, None] for a in (bias, scale, offset))
    y = depthwise_convolution(x.astype(real), kernel) + bias
    # Not E[x^2] - E[x]^2, which cancels where the mean is large.
    y -= y.mean(-1, keepdims=True)
    y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return gelu(y * scale + offset).astype(x.dtype)


def depthwise_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves each channel of `x` (N, H, W, C) with its kernel (K, K, C), to the same size."""

    # On a CPU, XLA's depthwise convolution is some thirty times slower than the sum.
    def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.platform_dependent(x, kernel, cpu=_sum_of_shifts, default=_convolution)

    return as_automatic(run, x, kernel)


def _convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    side = (kernel.shape[0] // 2, kernel.shape[0] // 2)
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        window_strides=(1, 1),
        padding=(side, side),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _sum_of_shifts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Walks the taps one by one: unrolled, the gradient takes XLA seconds to compile."""
    size, (_, h, w, c) = kernel.shape[0], x.shape
    side = (size // 2,) * 2
    padded = jnp.pad(x, ((0, 0), side, side, (0, 0)))

    @jax.checkpoint  # the shifted maps of all taps would be kept otherwise
    def contribution(padded, tap, weight):
        shifted = lax.dynamic_slice_in_dim(padded, tap // size, h, axis=1)
        return lax.dynamic_slice_in_dim(shifted, tap % size, w, axis=2) * weight[None, None, None]

    def step(y, tap):
        return y + contribution(padded, *tap), None

    taps = jnp.arange(size * size), kernel.reshape(size * size, c)
    return lax.scan(step, varying_alike(jnp.zeros_like(x), x, kernel)[0], taps)[0]

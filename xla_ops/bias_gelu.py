"""Bias and GELU as one operator: what follows the first matrix product of an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from xla_ops import _targets
from xla_ops.custom_call import Arrays, Operator, Target, call, run
from xla_ops.gelu_jnp import gelu
from xla_ops.operands import (
    ATTRIBUTES,
    arrays,
    at_least_float32,
    bias_gradient,
    check_dtype,
    check_operand,
    like_first,
)


def bias_gelu(
    x: jax.Array,
    bias: jax.Array,
    *,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> jax.Array:
    """Returns z * Phi(z) for z = x + bias, Phi the distribution function of the normal law.

    This is the erf form of GELU (not the tanh form, another function); the kernels' relative error
    in float32 is below 6e-7, also where Phi(z) is tiny, down to z = -12.9, where the result is
    -3e-37. Below that, in float32, the result stays at that value, and the derivative at -4e-36.

    Args:
        x: (N, H, W, C), float32, bfloat16, float16 or float64.
        bias: (C,), of x's dtype, or float32 where x is bfloat16 or float16.
        implementation: As for `xla_ops.dwconv_norm_gelu`.

    Returns:
        (N, H, W, C) of x's dtype, computed in float32 for bfloat16 and float16.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.

    Reference: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415.
    """
    x, bias = arrays(x=x, bias=bias)
    if x.ndim != 4 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (N, H, W, C), C at least 1, got {x.shape}")
    check_dtype(x)
    check_operand("bias", bias, x.shape[-1:], x.dtype, at_least_float32(x.dtype))
    # The kernel's gradient of the bias is a sum of dx as it is rounded. That has bfloat16's range,
    # but of float16's only what lies between 6e-8 and 65504: under differentiation it is the jnp
    # form.
    return call(BiasGelu(), implementation, x, bias, gradients=x.dtype != jnp.float16)


@dataclass(frozen=True)
class BiasGelu(Operator):
    """`bias_gelu` as `xla_ops.custom_call` takes it."""

    @property
    def forward(self) -> Target:
        return Target(_targets.GELU_FORWARD, (3, 1), (3,), like_first, ATTRIBUTES, shared=(1,))

    def backward(self, platform: str) -> Target:
        del platform  # they all have the same
        return Target(_targets.GELU_BACKWARD, (3, 1, 3), (3,), like_first, ATTRIBUTES, shared=(1,))

    def definition(self, *operands: jax.Array) -> jax.Array:
        x, bias = operands
        real = at_least_float32(x.dtype)
        z = x.astype(real) + bias.astype(real)[None, None, None]
        return gelu(z).astype(x.dtype)

    def gradients(self, platform: str, kept: Arrays, dys: Arrays) -> Arrays:
        _x, bias = kept
        (dx,) = run(self.backward(platform), *kept, *dys)
        return dx, bias_gradient(dx, bias)

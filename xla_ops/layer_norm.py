"""LayerNorm, alone or with an addition before or after, as one kernel that reads a row once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xla_ops import _ffi, _targets
from xla_ops.custom_call import Arrays, Operator, Shapes, Target, call, run
from xla_ops.explicit_axes import sharded_alike
from xla_ops.operands import (
    ATTRIBUTES,
    are_known,
    arrays,
    at_least_float32,
    check_dtype,
    check_epsilon,
    check_operand,
    chunks_of,
    like_first,
)

# A map of fewer numbers takes a GPU no longer than a launch does, and XLA's pass takes along what
# is around it, such as a bias or gamma, each else a launch of its own.
FEWEST_ON_CUDA = 1 << 20


def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = 1e-6,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> jax.Array:
    """Returns scale * (x - mean(x)) / sqrt(var(x) + epsilon) + bias, mean and var over channels.

    Except in float64, the sum of squares is a float32: for values from some 1e18 on it is infinite,
    and the result is `bias`.

    Args:
        x: (N, H, W, C), float32, bfloat16, float16 or float64.
        scale: (C,), of x's dtype, or float32 where x is bfloat16 or float16.
        bias: (C,), likewise and of the dtype of `scale`.
        epsilon: Added to the variance.
        implementation: "jnp" runs anywhere; "kernel" is the kernel, which has gradients on a CPU
            and elsewhere the jnp form's; None takes it where it is known to serve, on CUDA for a
            million numbers or more.

    Returns:
        (N, H, W, C) of x's dtype, computed in float32 for bfloat16 and float16.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.

    Reference: Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450.
    """
    x, scale, bias = arrays(x=x, scale=scale, bias=bias)
    _check(x, scale, bias, epsilon)
    serving = _serving(_targets.NORM_FORWARD, x, implementation)
    return call(LayerNorm(float(epsilon)), implementation, x, scale, bias, platforms=serving)


def add_norm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = 1e-6,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns x + residual, and `layer_norm` of that sum.

    Args:
        x: (N, H, W, C), float32, bfloat16, float16 or float64.
        residual: Of x's shape and dtype.
        scale: (C,), of x's dtype, or float32 where x is bfloat16 or float16.
        bias: (C,), likewise and of the dtype of `scale`.
        epsilon: Added to the variance.
        implementation: As for `layer_norm`.

    Returns:
        Two of x's shape and dtype. The sum is rounded to it before it is normalised.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.
    """
    x, residual, scale, bias = arrays(x=x, residual=residual, scale=scale, bias=bias)
    _check(x, scale, bias, epsilon, residual)
    serving = _serving(_targets.ADD_NORM_FORWARD, x, implementation)
    operands = *sharded_alike(x, residual), scale, bias
    return call(AddNorm(float(epsilon)), implementation, *operands, platforms=serving)


def norm_add(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = 1e-6,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> jax.Array:
    """Returns `layer_norm` of x, plus residual.

    Args:
        x: (N, H, W, C), float32, bfloat16, float16 or float64.
        residual: Of x's shape and dtype.
        scale: (C,), of x's dtype, or float32 where x is bfloat16 or float16.
        bias: (C,), likewise and of the dtype of `scale`.
        epsilon: Added to the variance.
        implementation: As for `layer_norm`.

    Returns:
        (N, H, W, C) of x's dtype. In half precision the kernel rounds once, after the addition; the
        jnp form rounds the norm too.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.
    """
    x, residual, scale, bias = arrays(x=x, residual=residual, scale=scale, bias=bias)
    _check(x, scale, bias, epsilon, residual)
    serving = _serving(_targets.NORM_ADD_FORWARD, x, implementation)
    operands = x, residual, scale, bias
    return call(NormAdd(float(epsilon)), implementation, *operands, platforms=serving)


def _serving(name: str, x: jax.Array, implementation: str | None) -> tuple[str, ...]:
    """Platforms whose kernel is to be taken."""
    serving = _ffi.serving(name)
    if implementation is None and not (are_known(x.shape) and x.size >= FEWEST_ON_CUDA):
        return tuple(platform for platform in serving if platform != "cuda")
    return serving


def _check(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    residual: jax.Array | None = None,
) -> None:
    if x.ndim != 4 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (N, H, W, C), C at least 1, got {x.shape}")
    check_dtype(x)
    check_epsilon(epsilon)
    check_operand("scale", scale, x.shape[-1:], x.dtype, at_least_float32(x.dtype))
    check_operand("bias", bias, x.shape[-1:], scale.dtype)
    if residual is not None:
        check_operand("residual", residual, x.shape, x.dtype)


@dataclass(frozen=True)
class LayerNorm(Operator):
    """`layer_norm` as `xla_ops.custom_call` takes it."""

    epsilon: float

    @property
    def forward(self) -> Target:
        attributes = _attributes(self.epsilon)
        return Target(_targets.NORM_FORWARD, (3, 1, 1), (3,), like_first, attributes, shared=(1, 2))

    def backward(self, platform: str) -> Target:
        return _backward(_targets.NORM_BACKWARD, self.epsilon, (3,))

    def gradients(self, platform: str, kept: Arrays, dys: Arrays) -> Arrays:
        x, scale, bias = kept
        dx, parts = run(self.backward(platform), x, scale, *dys)
        return dx, *_of_parameters(parts, bias)

    def definition(self, *operands: jax.Array) -> jax.Array:
        x, scale, bias = operands
        return _normalized(x, scale, bias, self.epsilon).astype(x.dtype)


@dataclass(frozen=True)
class AddNorm(Operator):
    """`add_norm` as `xla_ops.custom_call` takes it."""

    epsilon: float

    @property
    def forward(self) -> Target:
        name, attributes = _targets.ADD_NORM_FORWARD, _attributes(self.epsilon)
        return Target(name, (3, 3, 1, 1), (3, 3), _twice_like_x, attributes, shared=(2, 3))

    def backward(self, platform: str) -> Target:
        return _backward(_targets.ADD_NORM_BACKWARD, self.epsilon, (3, 3))

    def kept(self, operands: Arrays, results: Arrays) -> Arrays:
        # The sum, which what follows keeps too, for the two.
        return results[0], *operands[2:]

    def gradients(self, platform: str, kept: Arrays, dys: Arrays) -> Arrays:
        total, scale, bias = kept
        dtotal, parts = run(self.backward(platform), total, scale, *dys)
        return dtotal, *_of_parameters(parts, bias)

    def gradients_by_definition(self, kept: Arrays, dys: Arrays) -> Arrays:
        dtotal, dy = dys
        dx, *others = LayerNorm(self.epsilon).gradients_by_definition(kept, (dy,))
        return dtotal + dx, *others

    def of_operands(self, gradients: Arrays) -> Arrays:
        return gradients[0], *gradients

    def definition(self, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, residual, *vectors = operands
        total = x + residual
        return total, LayerNorm(self.epsilon).definition(total, *vectors)


@dataclass(frozen=True)
class NormAdd(Operator):
    """`norm_add` as `xla_ops.custom_call` takes it."""

    epsilon: float

    @property
    def forward(self) -> Target:
        name, attributes = _targets.NORM_ADD_FORWARD, _attributes(self.epsilon)
        return Target(name, (3, 3, 1, 1), (3,), like_first, attributes, shared=(2, 3))

    def backward(self, platform: str) -> Target:
        return LayerNorm(self.epsilon).backward(platform)

    def gradients(self, platform: str, kept: Arrays, dys: Arrays) -> Arrays:
        x, _residual, *parameters = kept
        dx, *others = LayerNorm(self.epsilon).gradients(platform, (x, *parameters), dys)
        return dx, *dys, *others

    def definition(self, *operands: jax.Array) -> jax.Array:
        x, residual, scale, bias = operands
        # Not added in float32: on a GPU XLA then keeps the sum in float32 for the next addition,
        # and converts it for all else in a launch of its own.
        return _normalized(x, scale, bias, self.epsilon).astype(x.dtype) + residual


def _normalized(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm in jnp, at least float32."""
    real = at_least_float32(x.dtype)
    scale, bias = (a.astype(real)[None, None, None] for a in (scale, bias))
    y = x.astype(real)
    # Not E[x^2] - E[x]^2, which cancels where the mean is large.
    y -= y.mean(-1, keepdims=True)
    y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon) * scale
    return y + bias


def _backward(name: str, epsilon: float, dys: tuple[int, ...]) -> Target:
    """From x, scale and gradients of results to x's and each chunk's part of the parameters'."""
    operands, attributes = (3, 1, *dys), _attributes(epsilon)
    return Target(name, operands, (3, 3), _x_and_parts, attributes, shared=(1,))


def _x_and_parts(x: jax.Array, *others: jax.Array) -> Shapes:
    parts = (*x.shape[:-3], chunks_of(x), 2, x.shape[-1])
    return [(x.shape, x.dtype), (parts, at_least_float32(x.dtype))]


def _of_parameters(parts: jax.Array, bias: jax.Array) -> Arrays:
    """The gradients of scale and bias."""
    scale_and_bias = parts.sum((0, 1)).astype(bias.dtype)
    return scale_and_bias[0], scale_and_bias[1]


def _attributes(epsilon: float) -> tuple[tuple[str, Any], ...]:
    return ("epsilon", np.float64(epsilon)), *ATTRIBUTES


def _twice_like_x(x: jax.Array, *_: jax.Array) -> Shapes:
    return [(x.shape, x.dtype)] * 2

"""Depthwise convolution, LayerNorm and GELU as one operator: its checks, and it as custom calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from xla_ops import _targets
from xla_ops.custom_call import Arrays, Operator, Shapes, Target, call, run
from xla_ops.dwconv_jnp import dwconv_norm_gelu_jnp
from xla_ops.operands import (
    ATTRIBUTES,
    arrays,
    at_least_float32,
    check_dtype,
    check_epsilon,
    chunks_of,
    like_first,
)


def dwconv_norm_gelu(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    offset: jax.Array,
    *,
    epsilon: float = 1e-6,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> jax.Array:
    """Convolves each channel with a kernel of its own, normalises over channels, applies GELU.

    With r = K // 2, zeros around the map, and Phi the distribution function of the normal law (the
    erf form of GELU, also far out where Phi(z) is tiny)

        v[n, i, j] = bias + sum over a, b of kernel[a, b] * x[n, i + a - r, j + b - r]
        z = scale * (v - mean(v)) / sqrt(var(v) + epsilon) + offset
        y = z * Phi(z)

    Args:
        x: Features (N, H, W, C), float32, bfloat16, float16 or float64.
        kernel: (K, K, C), K odd. Like the other parameters of x's dtype, or float32 where x is
            bfloat16 or float16.
        bias: Of the convolution (C,).
        scale: Of the norm (C,).
        offset: Of the norm (C,).
        epsilon: Added to the variance.
        implementation: "jnp" runs anywhere, and has forward mode; "kernel" is the custom call of
            the platform that the program is compiled for, whose second derivatives are those of the
            jnp form; None takes the kernel where there is one, and the jnp form elsewhere and
            beyond 4096 channels (2048 in float64), which CUDA's backward does not take.

    Returns:
        (N, H, W, C) of x's dtype. Everything between is float32 for bfloat16 and float16, and of
        x's dtype otherwise.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.

    Reference: Wang et al., InternImage (CVPR 2023, arXiv 2211.05778), section 3.1: the separable
    convolution that offsets and masks are read from.
    """
    parameters = {"kernel": kernel, "bias": bias, "scale": scale, "offset": offset}
    x, *values = arrays(x=x, **parameters)
    _check(x, dict(zip(parameters, values, strict=True)))
    check_epsilon(epsilon)
    if implementation is None and x.shape[-1] * at_least_float32(x.dtype).itemsize > 4 * 4096:
        implementation = "jnp"
    return call(DwconvNormGelu(float(epsilon)), implementation, x, *values)


@dataclass(frozen=True)
class DwconvNormGelu(Operator):
    """`dwconv_norm_gelu` as `xla_ops.custom_call` takes it."""

    epsilon: float

    @property
    def forward(self) -> Target:
        name, attributes = _targets.DWCONV_FORWARD, self._attributes
        return Target(name, _OPERANDS, (3,), like_first, attributes, shared=_PARAMETERS)

    def backward(self, platform: str) -> Target:
        cuda = platform == "cuda"
        results, shapes = ((3, 3, 3), _rows_and_scratch) if cuda else ((3, 3), _parts)
        name, operands, attributes = _targets.DWCONV_BACKWARD, (*_OPERANDS, 3), self._attributes
        return Target(name, operands, results, shapes, attributes, shared=_PARAMETERS)

    def definition(self, *operands: jax.Array) -> jax.Array:
        x, kernel, bias, scale, offset = operands
        return dwconv_norm_gelu_jnp(x, kernel, bias, scale, offset, self.epsilon)

    def gradients(self, platform: str, kept: Arrays, dys: Arrays) -> Arrays:
        dx, parts, *_ = run(self.backward(platform), *kept, *dys)
        total = parts.sum((0, 1))  # (3 + K * K, C)
        offset, scale, bias, kernel = total[0], total[1], total[2], total[3:]
        ordered = (kernel.reshape(kept[1].shape), bias, scale, offset)
        return dx, *(a.astype(p.dtype) for a, p in zip(ordered, kept[1:], strict=True))

    @property
    def _attributes(self) -> tuple:
        return ("epsilon", np.float64(self.epsilon)), *ATTRIBUTES


_OPERANDS = (3, 3, 1, 1, 1)  # axes of x, kernel, bias, scale, offset; the batch is x's alone
_PARAMETERS = (1, 2, 3, 4)


def _parts(x: jax.Array, kernel: jax.Array, *others: jax.Array) -> Shapes:
    """Shapes of dx and of each chunk's part of the parameters' gradients.

    Each chunk differentiates the neighbours' rows once more for itself.
    """
    return _in_chunks(x, kernel, chunks_of(x))


def _rows_and_scratch(x: jax.Array, kernel: jax.Array, *others: jax.Array) -> Shapes:
    """Those of CUDA: a row is a chunk; and v's gradient, which it works in and nobody reads."""
    return [*_in_chunks(x, kernel, x.shape[-3]), (x.shape, at_least_float32(x.dtype))]


def _in_chunks(x: jax.Array, kernel: jax.Array, chunks: int) -> Shapes:
    parts = (*x.shape[:-3], chunks, 3 + kernel.shape[-2] ** 2, x.shape[-1])
    return [(x.shape, x.dtype), (parts, at_least_float32(x.dtype))]


def _check(x: jax.Array, parameters: dict[str, jax.Array]) -> None:
    """Raises unless x and the parameters fit together."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected shape (N, H, W, C), a map not empty, got {x.shape}")
    check_dtype(x)
    kernel, channels = parameters["kernel"], x.shape[-1]
    size = kernel.shape[0] if kernel.ndim else 0
    if kernel.shape != (size, size, channels) or size % 2 == 0:
        raise ValueError(
            f"kernel: expected shape (K, K, {channels}) with K odd for x of shape {x.shape}, "
            f"got {kernel.shape}"
        )
    real = at_least_float32(x.dtype)
    for name, array in parameters.items():
        if name != "kernel" and array.shape != (channels,):
            raise ValueError(f"{name}: expected shape ({channels},), got {array.shape}")
        if array.dtype not in (x.dtype, real) or array.dtype != kernel.dtype:
            also = f" or {real}" if real != x.dtype else ""
            raise ValueError(
                f"{name}: expected the dtype of x, {x.dtype}{also}, and that of kernel, "
                f"got {array.dtype}"
            )

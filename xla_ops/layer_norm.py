"""LayerNorm as one kernel that reads a row once."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xla_ops import _ffi
from xla_ops.custom_call import Shapes, Target, forward
from xla_ops.geometry import DTYPES, at_least_float32


def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = 1e-6,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> jax.Array:
    """Returns scale * (x - mean(x)) / sqrt(var(x) + epsilon) + bias, mean and var over channels.

    Args:
        x: (N, H, W, C), float32, bfloat16, float16 or float64.
        scale: (C,), of x's dtype, or float32 where x is bfloat16 or float16.
        bias: (C,), likewise and of the dtype of `scale`.
        epsilon: Added to the variance.
        implementation: "jnp" runs anywhere; "kernel" is the kernel, but for gradients; None
            takes it where it is known to serve. For `jax.export` the target to name is
            "internimage_layer_norm_forward".

    Returns:
        (N, H, W, C) of x's dtype, computed in float32 for bfloat16 and float16.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.

    Reference: Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450.
    """
    if x.ndim != 4 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (N, H, W, C), C at least 1, got {x.shape}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon: expected a number of at least 0, got {epsilon!r}")
    real = at_least_float32(x.dtype)
    dtypes = {"scale": (x.dtype, real), "bias": (scale.dtype,)}
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector.shape != x.shape[-1:] or vector.dtype not in dtypes[name]:
            wanted = " or ".join(dict.fromkeys(map(str, dtypes[name])))
            raise ValueError(
                f"{name}: expected shape {x.shape[-1:]} and dtype {wanted}, "
                f"got {vector.shape} and {vector.dtype}"
            )
    operator, serving = LayerNorm(float(epsilon)), _ffi.serving(_ffi.NORM_FORWARD)
    return forward(operator, implementation, serving, "", x, scale, bias)


class LayerNorm(NamedTuple):
    """`layer_norm` as `xla_ops.custom_call` takes it."""

    epsilon: float

    @property
    def forward(self) -> Target:
        attributes = ("epsilon", np.float64(self.epsilon)), ("version", np.int64(_ffi.VERSION))
        return Target(_ffi.NORM_FORWARD, (3, 1, 1), (3,), _like_x, attributes, shared=(1, 2))

    def definition(self, *operands: jax.Array) -> jax.Array:
        x, *vectors = operands
        real = at_least_float32(x.dtype)
        scale, bias = (a.astype(real)[None, None, None] for a in vectors)
        y = x.astype(real)
        # Not E[x^2] - E[x]^2, which cancels where the mean is large.
        y -= y.mean(-1, keepdims=True)
        y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * scale
        return (y + bias).astype(x.dtype)


def _like_x(x: jax.Array, *_: jax.Array) -> Shapes:
    return [(x.shape, x.dtype)]

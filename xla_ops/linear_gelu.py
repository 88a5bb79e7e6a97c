"""A matrix product, bias and GELU: as one kernel on CUDA in half precision, where that pays."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xla_ops import _ffi
from xla_ops.bias_gelu import bias_gelu
from xla_ops.custom_call import Shapes, Target, forward, forward_mode_named
from xla_ops.geometry import DTYPES, at_least_float32

# Beyond so many input channels the product is most of the time, and XLA chooses among more forms
# of it than there are here.
MOST_CHANNELS = 512


def linear_bias_gelu(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> jax.Array:
    """Returns the erf form of GELU of x @ kernel + bias: what an MLP begins with.

    On CUDA, in half precision and up to 512 input channels, one kernel does it all: what goes into
    GELU is neither rounded nor written. Under differentiation, and everywhere else, it is the
    product, rounded to x's dtype, and `xla_ops.bias_gelu`: in float16 a product beyond 65504 is
    infinite there, whatever the bias.

    Args:
        x: (N, H, W, C), float32, bfloat16, float16 or float64.
        kernel: (C, K), K at least 1, of x's dtype.
        bias: (K,), of x's dtype, or float32 where x is bfloat16 or float16.
        implementation: "jnp" runs anywhere; "kernel" is the one kernel, on CUDA alone, but for
            gradients; None takes it where it is known to serve, and elsewhere the product and the
            best `bias_gelu`. For `jax.export` the targets to name are
            "internimage_linear_bias_gelu_forward" and those of `bias_gelu`.

    Returns:
        (N, H, W, K) of x's dtype.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.

    Reference: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415.
    """
    _check(x, kernel, bias)
    if implementation not in ("kernel", "jnp", None):
        raise ValueError(
            f"implementation: expected 'kernel', 'jnp' or None, got {implementation!r}"
        )
    if implementation == "jnp":
        return bias_gelu(x @ kernel, bias, implementation="jnp")
    serving = _ffi.serving(_ffi.LINEAR_GELU_FORWARD)
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and not any(size % 8 for size in kernel.shape)
    if implementation == "kernel" and not fits:
        raise ValueError(
            "implementation: the 'kernel' takes bfloat16 or float16, and C and K in eights, "
            f"got {x.dtype} and a kernel of {kernel.shape}; use 'jnp' or None"
        )
    if implementation == "kernel" and not serving:
        raise ValueError(
            "implementation: no 'kernel' to serve here; it wants a GPU of compute capability 8.0 "
            f"or later ({_ffi.reasons()}); use 'jnp' or None"
        )
    if implementation == "kernel" or (serving and fits and x.shape[-1] <= MOST_CHANNELS):
        with forward_mode_named("jnp"):
            return _differentiable(implementation is None, x, kernel, bias)
    return _in_two(x, kernel, bias)


class LinearGelu(NamedTuple):
    """`linear_bias_gelu` as `xla_ops.custom_call` takes it."""

    @property
    def forward(self) -> Target:
        attributes = (("version", np.int64(_ffi.VERSION)),)
        return Target(_ffi.LINEAR_GELU_FORWARD, (3, 2, 1), (3,), _result, attributes, shared=(1, 2))

    def definition(self, *operands: jax.Array) -> jax.Array:
        return _in_two(*operands)


def _in_two(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return bias_gelu(x @ kernel, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(fallback: bool, *operands: jax.Array) -> jax.Array:
    return forward(LinearGelu(), _ffi.serving(_ffi.LINEAR_GELU_FORWARD), fallback, *operands)


# The gradients want the product without bias and GELU, so that is what runs under differentiation.
_differentiable.defvjp(
    lambda fallback, *operands: jax.vjp(_in_two, *operands),
    lambda fallback, pullback, dy: pullback(dy),
)


def _result(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Shapes:
    return [((*x.shape[:-1], kernel.shape[-1]), x.dtype)]


def _check(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> None:
    if x.ndim != 4 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (N, H, W, C), C at least 1, got {x.shape}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    shape = kernel.shape
    if len(shape) != 2 or shape[0] != x.shape[-1] or shape[1] < 1 or kernel.dtype != x.dtype:
        raise ValueError(
            f"kernel: expected shape ({x.shape[-1]}, K), K at least 1, and dtype {x.dtype}, "
            f"got {kernel.shape} and {kernel.dtype}"
        )
    real = at_least_float32(x.dtype)
    if bias.shape != kernel.shape[1:] or bias.dtype not in (x.dtype, real):
        also = f" or {real}" if real != x.dtype else ""
        raise ValueError(
            f"bias: expected shape {kernel.shape[1:]} and dtype {x.dtype}{also}, "
            f"got {bias.shape} and {bias.dtype}"
        )

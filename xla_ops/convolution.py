"""The dense convolution of stem and downsampling: 3 x 3 pixels, stride 2, padding 1."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from xla_ops import _ffi, _targets
from xla_ops.custom_call import Arrays, Operator, Shapes, Target, call, run
from xla_ops.linear import check_kernel
from xla_ops.operands import ATTRIBUTES, are_known, arrays, bias_gradient, check_dtype
from xla_ops.panels import from_panels

# Bytes, of the batch as it is traced, on however many devices. What stays in a GPU's second-level
# cache, 50 MB of an H100, costs no time of its memory, and a little more costs less than the
# transposes around a convolution (T at batch 64 on an H200: 4.95 ms, with 32 MB 4.97).
LARGEST_PATCHES = 64 << 20


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> jax.Array:
    """Returns the convolution of 3 x 3 pixels with stride 2 and padding 1 on all sides.

    On x86 processors with AVX2 it is one kernel, except in float64: a matrix product whose rows are
    put together as they are read. The gradient of `kernel` is such a product too; that of x is
    XLA's. On CUDA a small one is a matrix product over patches: XLA keeps convolutions out of its
    command buffers, and a product is launched with all else as one CUDA graph. Everywhere else it
    is XLA's convolution.

    Args:
        x: (N, H, W, C), float32, bfloat16, float16 or float64, H and W at least 1.
        kernel: (3, 3, C, K), K at least 1, of x's dtype, or that in panels, as for
            `xla_ops.linear`.
        bias: (K,), of x's dtype, or float32 where x is bfloat16 or float16; None for none, not with
            panels.
        implementation: "jnp" runs anywhere; "kernel" is the kernel; None takes it where it is known
            to serve.

    Returns:
        (N, (H + 1) // 2, (W + 1) // 2, K) of x's dtype.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.
    """
    x, kernel = arrays(x=x, kernel=kernel)
    if bias is None:
        if kernel.ndim == 3:
            raise ValueError(f"bias: expected one beside a kernel in panels, {kernel.shape}")
        bias = jnp.zeros(kernel.shape[-1:], x.dtype)
    (bias,) = arrays(bias=bias)
    _check(x, kernel, bias)
    taken = _ffi.serving(_targets.CONVOLUTION_FORWARD) if x.dtype != jnp.float64 else ()
    refusal = "it does not take float64" if x.dtype == jnp.float64 else ""
    operator = Convolution(LARGEST_PATCHES, kernel.ndim == 3)
    operands = x, kernel, bias
    return call(operator, implementation, *operands, platforms=taken, refusal=refusal)


@dataclass(frozen=True)
class Convolution(Operator):
    """`convolution` as `xla_ops.custom_call` takes it."""

    largest_patches: int
    panels: bool = False  # the kernel's layout

    @property
    def forward(self) -> Target:
        target, axes = _targets.CONVOLUTION_FORWARD, (3, 3 if self.panels else 4, 1)
        return Target(target, axes, (3,), _result, ATTRIBUTES, shared=(1, 2))

    def definition(self, *operands: jax.Array) -> jax.Array:
        x, kernel, bias = operands
        kernel = self._in_rows(kernel, x.shape[-1], len(bias))
        if not are_known(x.shape) or 9 / 4 * x.size * x.dtype.itemsize > self.largest_patches:
            y = by_xla(x, kernel)
        else:
            y = lax.platform_dependent(x, kernel, cuda=by_patches, default=by_xla)
        return y + bias.astype(y.dtype)[None, None, None]

    def backward(self, platform: str) -> Target:
        return KERNEL_GRADIENT  # asked of all platforms; a CPU has it

    def gradients(self, platform: str, kept: Arrays, dys: Arrays) -> Arrays:
        (x, kernel, bias), (dy,) = kept, dys
        in_rows = functools.partial(self._in_rows, inputs=x.shape[-1], outputs=len(bias))
        kernel_in_rows, to_layout = jax.vjp(in_rows, kernel)
        (dx,) = jax.vjp(lambda x: by_xla(x, kernel_in_rows), x)[1](dy)
        (dkernel,) = run(self.backward(platform), x, dy)
        return dx, *to_layout(dkernel), bias_gradient(dy, bias)

    def _in_rows(self, kernel: jax.Array, inputs: int, outputs: int) -> jax.Array:
        if not self.panels:
            return kernel
        return from_panels(kernel, outputs).reshape(3, 3, inputs, outputs)


def _like_kernel(x: jax.Array, dy: jax.Array) -> Shapes:
    return [((*x.shape[:-4], 3, 3, x.shape[-1], dy.shape[-1]), x.dtype)]


KERNEL_GRADIENT = Target(
    _targets.CONVOLUTION_BACKWARD, (3, 3), (4,), _like_kernel, ATTRIBUTES, summed=True
)


def by_xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as XLA has it."""
    layouts = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layouts)


def by_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as a matrix product over the nine pixels of each place, side by side."""
    n, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        lax.slice(x, (0, i, j, 0), (n, i + h, j + w, c), (1, 2, 2, 1))
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(taps, axis=-1) @ kernel.reshape(9 * c, -1)


def _result(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Shapes:
    *batch, height, width, _ = x.shape  # the sizes as XLA has them: symbols have to be the same
    return [((*batch, (height - 1) // 2 + 1, (width - 1) // 2 + 1, bias.shape[-1]), x.dtype)]


def _check(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> None:
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected shape (N, H, W, C), H, W and C at least 1, got {x.shape}")
    check_dtype(x)
    check_kernel(x.dtype, kernel, bias, (3, 3, x.shape[-1]))

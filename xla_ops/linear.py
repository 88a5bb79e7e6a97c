"""A matrix product with bias and GELU as one operator, where that pays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xla_ops import _ffi, _targets
from xla_ops.bias_gelu import bias_gelu
from xla_ops.custom_call import Arrays, Operator, Shapes, Target, call, run
from xla_ops.operands import (
    ATTRIBUTES,
    are_known,
    arrays,
    at_least_float32,
    bias_gradient,
    check_dtype,
    check_operand,
)
from xla_ops.panels import from_panels, panels_shape

# Beyond so many input channels the product is most of the time, and XLA chooses among more forms
# of it for a GPU than there are here (T on an H200: 4.94 ms, with 512 4.97, with 128 4.92).
MOST_CHANNELS = 256
# The form that compute capability 9.0 has of its own takes up to so many, and pays from so many
# results on: a tile of 64 x 128 for each multiprocessor.
MOST_CHANNELS_WIDE, LEAST_RESULTS_WIDE = 512, 132 * 64 * 128
# Without GELU that form is for up to so many, where they do not come in 128s: there XLA's are slow
# (S at batch 64 6.54 to 6.43 ms, B 9.38 to 9.31; T, of powers of two, as before).
MOST_CHANNELS_WITHOUT_GELU = 320


def linear(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    gelu: bool = False,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> jax.Array:
    """Returns x @ kernel + bias, or the erf form of GELU of it.

    One kernel does it all, and neither rounds nor writes the sums before bias and GELU: on x86
    processors with AVX2, except in float64; on CUDA from compute capability 8.0 on, in half
    precision with GELU, C and K multiples of 8, C at most 256; and on 9.0 (H100, H200), for large
    maps, with GELU for C up to 512, and without it for C up to 320 that is no multiple of 128.
    Everywhere else, and under differentiation on CUDA or with GELU, it is a product, rounded to x's
    dtype, and then the bias, or `xla_ops.bias_gelu`: in float16 a product beyond 65504 is infinite
    there, whatever the bias. That product is XLA's, and on a CPU the kernel's where it serves, as
    are its gradients.

    Args:
        x: (N, H, W, C), float32, bfloat16, float16 or float64.
        kernel: (C, K), K at least 1, of x's dtype; or as `xla_ops.in_panels` makes it of that,
            which CPUs read faster; then K is the bias's.
        bias: (K,), of x's dtype, or float32 where x is bfloat16 or float16.
        gelu: Whether GELU follows.
        implementation: "jnp" runs anywhere; "kernel" is the one kernel, gradients as above; None
            takes it where it is known to serve, and elsewhere the product and the best `bias_gelu`.

    Returns:
        (N, H, W, K) of x's dtype.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.

    Reference: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415.
    """
    operands = x, kernel, bias = arrays(x=x, kernel=kernel, bias=bias)
    check_operands(x, kernel, bias)
    operator = Linear(gelu, kernel.ndim == 3, "jnp" if implementation == "jnp" else None)
    serving = _ffi.serving(operator.name)
    taken = tuple(platform for platform in serving if _takes(platform, kernel, gelu))
    if implementation is None and not _pays_on_cuda(x.shape, bias.shape[0], gelu):
        taken = tuple(platform for platform in taken if platform != "cuda")
    refusal = _TAKEN if serving else ""
    return call(
        operator, implementation, *operands, platforms=taken, refusal=refusal, gradients=not gelu
    )


def product(
    x: jax.Array, kernel: jax.Array, implementation: Literal["jnp"] | None = None
) -> jax.Array:
    """Returns x @ kernel for x (N, H, W, C) and kernel (C, K), by XLA or a CPU's kernel."""
    operands = x, kernel, jnp.zeros(kernel.shape[-1], x.dtype)
    serving = _ffi.serving(_targets.LINEAR_FORWARD) if _takes("cpu", kernel, False) else ()
    platforms = tuple(platform for platform in serving if platform == "cpu")
    return call(Linear(biased=False), implementation, *operands, platforms=platforms)


_TAKEN = (
    "on a CPU, with AVX2, it takes all but float64; on CUDA, from compute capability 8.0 on with "
    "GELU, on 9.0 up to 512 channels without, bfloat16 and float16, with C and K in eights, the "
    "kernel not in panels"
)


def _takes(platform: str, kernel: jax.Array, gelu: bool) -> bool:
    if platform == "cpu":
        return kernel.dtype != jnp.float64
    if not are_known(kernel.shape) or kernel.ndim == 3 or kernel.dtype.itemsize != 2:
        return False
    if any(size % 8 for size in kernel.shape):
        return False
    return gelu or kernel.shape[0] <= MOST_CHANNELS_WIDE


def _pays_on_cuda(shape: tuple[int, ...], outputs: int, gelu: bool) -> bool:
    *pixels, channels = shape
    if not are_known([channels]):
        return False
    if gelu and channels <= MOST_CHANNELS:
        return True
    # The GPU at hand is of compute capability 9.0 where the product without GELU serves.
    if "cuda" not in _ffi.serving(_targets.LINEAR_FORWARD):
        return False
    sizes = (*pixels, outputs)
    if not are_known(sizes) or math.prod(sizes) < LEAST_RESULTS_WIDE:
        return False
    if gelu:
        return channels <= MOST_CHANNELS_WIDE
    return channels <= MOST_CHANNELS_WITHOUT_GELU and channels % 128 != 0


@dataclass(frozen=True)
class Linear(Operator):
    """`linear` as `xla_ops.custom_call` takes it; that with GELU has no kernel for gradients."""

    gelu: bool = False
    panels: bool = False  # the kernel's layout
    implementation: Literal["jnp"] | None = None  # of what GELU is made of
    biased: bool = True  # else the bias is zeros, which the kernel wants

    @property
    def name(self) -> str:
        return _targets.LINEAR_GELU_FORWARD if self.gelu else _targets.LINEAR_FORWARD

    @property
    def forward(self) -> Target:
        axes = (3, 3 if self.panels else 2, 1)
        return Target(self.name, axes, (3,), _result, ATTRIBUTES, shared=(1, 2))

    def definition(self, *operands: jax.Array) -> jax.Array:
        x, kernel, bias = operands
        if self.panels:
            kernel = from_panels(kernel, len(bias))
        if self.gelu:
            y = product(x, kernel, self.implementation)
            return bias_gelu(y, bias, implementation=self.implementation)
        y = lax.platform_dependent(x, kernel, cpu=_of_two_axes, default=jnp.matmul)
        return y + bias.astype(y.dtype)[None, None, None] if self.biased else y

    def backward(self, platform: str) -> Target:
        return KERNEL_GRADIENT  # asked of all platforms; a CPU has it

    def gradients(self, platform: str, kept: Arrays, dys: Arrays) -> Arrays:
        (x, kernel, bias), (dy,) = kept, dys
        inputs, outputs = x.shape[-1], bias.shape[0]
        matrix, to_layout = jax.vjp(
            lambda kernel: from_panels(kernel, outputs) if self.panels else kernel, kernel
        )
        (dx,) = run(Linear().forward, dy, matrix.T, jnp.zeros(inputs, x.dtype))
        # The first operand is transposed on the way: the one with fewer channels.
        if inputs <= outputs:
            (dmatrix,) = run(self.backward(platform), x, dy)
        else:
            dmatrix = run(self.backward(platform), dy, x)[0].T
        dbias = bias_gradient(dy, bias) if self.biased else jnp.zeros_like(bias)
        return dx, *to_layout(dmatrix), dbias


def _of_two_axes(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel; of more axes a CPU's XLA copies gradients, badly, to transpose them."""
    *pixels, inputs = x.shape
    return (x.reshape(math.prod(pixels), inputs) @ kernel).reshape(*pixels, kernel.shape[1])


def _result(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Shapes:
    return [((*x.shape[:-1], bias.shape[-1]), x.dtype)]


def _like_kernel(x: jax.Array, dy: jax.Array) -> Shapes:
    return [((*x.shape[:-4], x.shape[-1], dy.shape[-1]), x.dtype)]


KERNEL_GRADIENT = Target(
    _targets.LINEAR_BACKWARD, (3, 3), (2,), _like_kernel, ATTRIBUTES, summed=True
)


def check_operands(
    x: jax.Array | jax.ShapeDtypeStruct,
    kernel: jax.Array,
    bias: jax.Array,
    names: tuple[str, str] = ("kernel", "bias"),
) -> None:
    """Raises a `ValueError` about the operand that does not fit; `names` are the last two's."""
    if len(x.shape) != 4 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (N, H, W, C), C at least 1, got {x.shape}")
    check_dtype(x)
    check_kernel(x.dtype, kernel, bias, (x.shape[-1],), names)


def check_kernel(
    dtype: np.dtype,
    kernel: jax.Array,
    bias: jax.Array | jax.ShapeDtypeStruct,
    inputs: tuple[int, ...],
    names: tuple[str, str] = ("kernel", "bias"),
) -> None:
    """Likewise of a kernel, (*inputs, K) or that in panels, and its bias."""
    shape = kernel.shape
    if len(bias.shape) != 1:
        raise ValueError(f"{names[1]}: expected shape (K,), got {bias.shape}")
    in_panels = shape == panels_shape(math.prod(inputs), bias.shape[0])
    in_rows = len(shape) == len(inputs) + 1 and shape[:-1] == inputs and shape[-1] >= 1
    if not (in_panels or in_rows) or kernel.dtype != dtype:
        wanted = ", ".join(map(str, (*inputs, "K")))
        raise ValueError(
            f"{names[0]}: expected shape ({wanted}), K at least 1, or that in panels, "
            f"and dtype {dtype}, got {shape} and {kernel.dtype}"
        )
    columns = bias.shape if in_panels else shape[-1:]
    check_operand(names[1], bias, columns, dtype, at_least_float32(dtype))

"""Two matrix products with GELU between them as one operator, where that pays."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from xla_ops import _ffi, _targets
from xla_ops.custom_call import Forward, Shapes, Target, call
from xla_ops.linear import check_operands, linear
from xla_ops.operands import ATTRIBUTES, are_known, arrays

# Pixels for each thread of a CPU. With fewer, what each does once for all of its pixels, which is
# to bring both kernels into the form they are multiplied in, takes as long as is won.
LEAST_PIXELS = 96
# Input channels. With more, what is between the products no longer stays in the caches.
MOST_CHANNELS = 1280

# The CUDA kernel's, which has both kernels on the multiprocessor: those of T's and S's first level.
CHANNELS_ON_CUDA = (64, 80)
# Pixels. With fewer, bringing the kernels there takes longer than is won.
LEAST_PIXELS_ON_CUDA = 65536


def mlp(
    x: jax.Array,
    kernel1: jax.Array,
    bias1: jax.Array,
    kernel2: jax.Array,
    bias2: jax.Array,
    *,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> jax.Array:
    """Returns GELU(x @ kernel1 + bias1) @ kernel2 + bias2, GELU in its erf form.

    On x86 processors with AVX2, but for float64, it is one kernel: what is between the products
    stays in the caches. The results are those of two calls of `xla_ops.linear`, to the bit except
    in rows that are not finite (or within 2^-9 of the largest float32). On CUDA it is one kernel in
    half precision on compute capability 9.0 (H100, H200), for C and L both 64 or both 80 and K a
    multiple of 64 up to 4 C: there what is between the products stays in registers. It is the two
    calls under differentiation and everywhere else.

    Args:
        x: (N, H, W, C), float32, bfloat16, float16 or float64.
        kernel1: (C, K), K at least 1, of x's dtype, or that in panels, as for `xla_ops.linear`.
        bias1: (K,), of x's dtype, or float32 where x is bfloat16 or float16.
        kernel2: (K, L), L at least 1, of x's dtype, or that in panels.
        bias2: (L,), as bias1.
        implementation: "jnp" runs anywhere; "kernel" is the one kernel, and two calls of `linear`
            under differentiation; None takes it where it is known to serve (on CPUs for up to 1280
            channels and from 96 pixels on for each CPU of this process, on CUDA from 65536 pixels
            on; under `vmap`, of one example), and elsewhere two calls of `linear`.

    Returns:
        (N, H, W, L) of x's dtype.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.
    """
    given = {"x": x, "kernel1": kernel1, "bias1": bias1, "kernel2": kernel2, "bias2": bias2}
    operands = x, kernel1, bias1, kernel2, bias2 = arrays(**given)
    check_operands(x, kernel1, bias1, ("kernel1", "bias1"))
    hidden = jax.ShapeDtypeStruct((*x.shape[:-1], bias1.shape[0]), x.dtype)
    check_operands(hidden, kernel2, bias2, ("kernel2", "bias2"))
    serving = _ffi.serving(_targets.MLP_FORWARD)
    taken = tuple(platform for platform in serving if _takes(platform, kernel1, kernel2))
    if implementation is None:
        taken = tuple(platform for platform in taken if _pays(platform, x.shape))
    panels = (kernel1.ndim == 3, kernel2.ndim == 3)
    operator = MLP(panels, "jnp" if implementation == "jnp" else None)
    refusal = _TAKEN if serving else ""
    return call(
        operator, implementation, *operands, platforms=taken, refusal=refusal, gradients=False
    )


_TAKEN = (
    "on a CPU, with AVX2, it takes all but float64; on CUDA, on compute capability 9.0, bfloat16 "
    "and float16, with C and L both 64 or both 80, K in 64s up to 4 C, the kernels not in panels"
)


def _takes(platform: str, kernel1: jax.Array, kernel2: jax.Array) -> bool:
    if platform == "cpu":
        return kernel1.dtype != jnp.float64
    if kernel1.ndim == 3 or kernel2.ndim == 3:
        return False
    (channels, hidden), outputs = kernel1.shape, kernel2.shape[1]
    if not are_known((channels, hidden, outputs)):
        return False
    fits = channels == outputs and channels in CHANNELS_ON_CUDA and hidden % 64 == 0
    return kernel1.dtype.itemsize == 2 and fits and hidden <= 4 * channels


def _pays(platform: str, shape: tuple[int, ...]) -> bool:
    if not are_known(shape):
        return False
    pixels = int(np.prod(shape[:-1]))
    if platform == "cuda":
        return pixels >= LEAST_PIXELS_ON_CUDA
    return pixels >= LEAST_PIXELS * len(os.sched_getaffinity(0)) and shape[-1] <= MOST_CHANNELS


@dataclass(frozen=True)
class MLP(Forward):
    """`mlp` as `xla_ops.custom_call` takes it."""

    panels: tuple[bool, bool] = (False, False)  # the kernels' layouts
    implementation: Literal["jnp"] | None = None  # of the products, where it is not one kernel

    @property
    def forward(self) -> Target:
        axes = (3, 2 + self.panels[0], 1, 2 + self.panels[1], 1)
        return Target(_targets.MLP_FORWARD, axes, (3,), _result, ATTRIBUTES, shared=(1, 2, 3, 4))

    def definition(self, *operands: jax.Array) -> jax.Array:
        x, kernel1, bias1, kernel2, bias2 = operands
        y = linear(x, kernel1, bias1, gelu=True, implementation=self.implementation)
        return linear(y, kernel2, bias2, implementation=self.implementation)


def _result(x: jax.Array, *parameters: jax.Array) -> Shapes:
    return [((*x.shape[:-1], parameters[3].shape[-1]), x.dtype)]

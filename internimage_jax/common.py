"""What the layers share: how they are built, normalised, initialised and dropped out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

import xla_ops
from internimage_jax.config import InternImageConfig

# The initial values of the official code: PyTorch's own for convolutions, 0.02 for linear layers.
conv_kernel = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
linear_kernel = nnx.initializers.normal(0.02)
xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()


def conv_bias(fan_in: int) -> Callable[..., jax.Array]:
    """The initializer of a convolution's bias, uniform in +-1 / sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Context(NamedTuple):
    """What every layer is built with besides its sizes."""

    config: InternImageConfig
    dtype: DTypeLike  # of the computation
    param_dtype: DTypeLike
    implementation: xla_ops.Implementation | None  # of DCNv3
    rngs: nnx.Rngs

    @property
    def dtypes(self) -> dict[str, Any]:
        """The arguments that every flax layer takes."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}

    def linear(self, inputs: int, outputs: int, init: Any = linear_kernel, bias: bool = True) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, **self.dtypes)

    def norm(self, channels: int, kind: str = "LN") -> nnx.LayerNorm | nnx.BatchNorm:
        # The fast variance, E[x^2] - E[x]^2, cancels where a channel's mean is large.
        if kind == "BN":
            return nnx.BatchNorm(
                channels, epsilon=1e-5, momentum=0.9, use_fast_variance=False, **self.dtypes
            )
        return nnx.LayerNorm(channels, epsilon=1e-6, use_fast_variance=False, **self.dtypes)


def normalize(norm: nnx.LayerNorm | nnx.BatchNorm, x: jax.Array, train: bool) -> jax.Array:
    """Applies `norm`; a BatchNorm uses and updates the batch's statistics in training only."""
    return norm(x, use_running_average=not train) if isinstance(norm, nnx.BatchNorm) else norm(x)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)  # the tanh form would be another network


def activation(config: InternImageConfig) -> Callable[[jax.Array], jax.Array]:
    """The function that `config.act_layer` names."""
    return {"GELU": _gelu, "SiLU": jax.nn.silu, "ReLU": jax.nn.relu}[config.act_layer]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes values of `x` at `rate` and scales up the others; without a key, returns `x`."""
    return _drop(x, rate, key, x.shape)


def drop_path(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes whole images of `x` (N, ...) at `rate` and scales up the others (stochastic depth)."""
    return _drop(x, rate, key, (x.shape[0], *[1] * (x.ndim - 1)))


def _drop(x: jax.Array, rate: float, key: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, shape)
    return x * (kept / np.float32(1 - rate)).astype(x.dtype)


def split(key: jax.Array | None, count: int) -> list[Any]:
    """`count` keys from one; none from none."""
    return [None] * count if key is None else list(jax.random.split(key, count))

"""The values a model starts its training from, and how values of any origin get into it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike

from internimage_jax.common import on_device
from internimage_jax.config import InternImageConfig
from internimage_jax.shapes import Shape, parameter_shapes
from xla_ops.operands import at_least_float32

_Key = tuple[jax.Array, int]  # a PRNG key and the index of the array

_CONVOLUTION = re.compile(r".*(conv[12]?|dcnv3_head_x[34])")
_ZERO = re.compile(r".*\.dcn\.(offset|mask|center_feature_scale_proj)")
_XAVIER = re.compile(r".*\.dcn\.(input|output)_proj")


def initial_values(
    config: InternImageConfig, key: jax.Array, dtype: DTypeLike
) -> dict[str, jax.Array | np.ndarray]:
    """Draws initial values as the official code does.

    Convolutions are uniform within 1 / sqrt(fan_in), linear layers normal with a deviation of
    0.02, DCNv3's projections Xavier-uniform. DCNv3 starts as a convolution with equal weights:
    the products that make offsets, masks and centre scales are 0.

    Args:
        config: The architecture.
        key: A JAX PRNG key.
        dtype: Of the values; BatchNorm statistics are at least float32.

    Returns:
        Values by path.
    """
    shapes = parameter_shapes(config)
    dtype = jnp.dtype(dtype)
    return {path: _value(path, shapes, config, (key, i), dtype) for i, path in enumerate(shapes)}


def _value(
    path: str, shapes: Mapping[str, Shape], config: InternImageConfig, key: _Key, dtype: np.dtype
) -> jax.Array | np.ndarray:
    shape = shapes[path]
    module, _, leaf = path.rpartition(".")
    if leaf in ("mean", "var"):
        return np.full(shape, leaf == "var", at_least_float32(dtype))
    if leaf in ("gamma1", "gamma2"):
        return np.full(shape, config.layer_scale, dtype)
    if leaf in ("kernel", "bias") and _CONVOLUTION.fullmatch(module):
        return _draw(key, shape, dtype, math.prod(shapes[f"{module}.kernel"][:-1]) ** -0.5)
    if leaf == "kernel" and _XAVIER.fullmatch(module):
        return _draw(key, shape, dtype, (6 / sum(shape)) ** 0.5)
    if leaf == "kernel" and not _ZERO.fullmatch(module):
        return _draw(key, shape, dtype, 0.02, normal=True)
    return np.full(shape, leaf == "scale", dtype)


def _draw(
    key: _Key, shape: Shape, dtype: np.dtype, scale: float, *, normal: bool = False
) -> jax.Array | np.ndarray:
    """Normal values of deviation `scale`, or uniform ones within it; drawn in float32 at least."""
    size = math.prod(shape)
    block = next((block for block in _BLOCKS if size <= 32 * block), _BLOCKS[-1])
    draw = functools.partial(_normal if normal else _uniform, dtype=at_least_float32(dtype))
    count, own = -(-size // block), jax.random.fold_in(*key)
    if isinstance(own, Tracer):  # within a program, which is to be small
        values = jax.vmap(lambda i: draw(own, i, block))(jnp.arange(count)).reshape(-1)
    else:
        values = np.concatenate([draw(own, i, block) for i in range(count)])
    return (values[:size].reshape(shape) * scale).astype(dtype)


# Values that are drawn at a time: a model has 60 shapes, and each size is a program to compile.
_BLOCKS = (1 << 12, 1 << 17, 1 << 22)


@functools.partial(jax.jit, static_argnames=("size", "dtype"))
def _normal(key: jax.Array, block: int, size: int, dtype: np.dtype) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, block), (size,), dtype)


@functools.partial(jax.jit, static_argnames=("size", "dtype"))
def _uniform(key: jax.Array, block: int, size: int, dtype: np.dtype) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, block), (size,), dtype, -1, 1)


def fill(model: nnx.Module, values: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Puts values, by path, into the parameters and statistics of `model`."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        if name in values:
            variable.set_value(on_device(values[name]))

"""What the operators share about operands: their dtypes, open sizes and mesh axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xla_ops import _targets

DTYPES = tuple(jnp.dtype(name) for name in ("float32", "bfloat16", "float16", "float64"))
# Of every custom call but DCNv3's, which has the version elsewhere: the handlers refuse another.
ATTRIBUTES = (("version", np.int64(_targets.VERSION)),)

Shapes = Sequence[tuple[tuple[int, ...], np.dtype]]


def arrays(**operands: Any) -> tuple[jax.Array, ...]:
    """The operands as JAX has them; raises a `ValueError` that names one that is no array."""
    for name, value in operands.items():
        if not isinstance(value, jax.Array | np.ndarray) and not hasattr(value, "__jax_array__"):
            raise ValueError(f"{name}: expected an array, got {type(value).__name__}")
    values = operands.values()
    return tuple(value if isinstance(value, jax.Array) else jnp.asarray(value) for value in values)


def check_integer(name: str, value: Any, *, at_least: int) -> int:
    """The setting as an int; raises a `ValueError` that names it."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < at_least:
        raise ValueError(f"{name}: expected an integer of at least {at_least}, got {value!r}")
    return int(value)


def check_dtype(x: jax.Array | jax.ShapeDtypeStruct) -> None:
    """Raises a `ValueError` unless x is of a dtype that the operators take."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected one of {', '.join(map(str, DTYPES))}, got {x.dtype}")


def check_operand(
    name: str,
    value: jax.Array | jax.ShapeDtypeStruct,
    shape: tuple[Any, ...],
    *dtypes: np.dtype,
) -> None:
    """Raises a `ValueError` unless the operand is of the shape and of one of the dtypes."""
    if value.shape != shape or value.dtype not in dtypes:
        wanted = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise ValueError(
            f"{name}: expected shape {shape} and dtype {wanted}, "
            f"got {value.shape} and {value.dtype}"
        )


def check_epsilon(epsilon: float) -> None:
    """Raises a `ValueError` unless it can be added to a variance."""
    if not epsilon >= 0:
        raise ValueError(f"epsilon: expected a number of at least 0, got {epsilon!r}")


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """The dtype of locations, weights and sums: half precision serves storage only."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def are_known(sizes: Iterable[Any]) -> bool:
    """Whether all sizes are numbers: `jax.export` has symbols too."""
    return all(isinstance(size, int) for size in sizes)


def chunks_of(x: jax.Array) -> int:
    """In how many parts, rows of an image each, a CPU makes sums over the pixels of x (N, H, W, C).

    Enough parts for several threads, of rows enough that what comes with each does not weigh.
    """
    *batch, height, _width, _channels = x.shape
    images = math.prod(n for n in batch if are_known([n]))
    rows = height if are_known([height]) else 1
    return max(1, min(8 // max(1, images), rows // 4))


def bias_gradient(dy: jax.Array, bias: jax.Array) -> jax.Array:
    """That of a bias which is added to each pixel, from that of the sum (N, H, W, C)."""
    return dy.astype(at_least_float32(dy.dtype)).sum((0, 1, 2)).astype(bias.dtype)


def like_first(x: jax.Array, *_: jax.Array) -> Shapes:
    """Shape and dtype of a custom call's result that has those of the first operand."""
    return [(x.shape, x.dtype)]


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Marks each array as varying over the mesh axes that any of them does, for `shard_map`."""
    kinds = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    axes = frozenset().union(*kinds)
    return [
        lax.pcast(a, tuple(axes - kind), to="varying") if axes - kind else a
        for a, kind in zip(arrays, kinds, strict=True)
    ]

"""Meshes of explicit axes, on which shardings are part of types.

Operators compute there as on meshes of automatic axes, and say how their results are sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

Arrays = tuple[jax.Array, ...]
Function = Callable[..., Any]


def automatic(function: Function, operands: Arrays, sharding: Any) -> Any:
    """Calls `function` as on a mesh of automatic axes, where the operands' are explicit.

    `sharding` is the results', which there are part of their types.
    """
    if explicit_mesh(operands) is None:
        return function(*operands)
    return jax.sharding.auto_axes(function, out_sharding=sharding)(*operands)


def sharded_alike(*maps: jax.Array) -> Arrays:
    """The maps, on a mesh of explicit axes all of them over the batch alone, as the first one is.

    That is how results are sharded: types that gradients have to have.
    """
    mesh = explicit_mesh(maps)
    if mesh is None:
        return maps
    sharding = over_batch(maps[0], mesh)
    return tuple(jax.sharding.reshard(a, sharding) for a in maps)


def undivided(a: jax.Array) -> jax.Array:
    """The array, whole on each device if it is divided over explicit axes."""
    sharding = jax.typeof(a).sharding
    if not sharding.mesh.explicit_axes or not any(sharding.spec):
        return a
    return jax.sharding.reshard(a, sharding.update(spec=PartitionSpec(*[None] * a.ndim)))


def as_automatic(function: Function, *operands: jax.Array) -> jax.Array:
    """Calls `function` as on a mesh of automatic axes, where the operands' are explicit.

    The result is sharded over the batch as the first operand is.
    """
    return automatic(function, operands, over_batch(operands[0], explicit_mesh(operands)))


def explicit_mesh(operands: Arrays) -> Any:
    """The mesh of the operands where it has explicit axes; those made of constants have none."""
    meshes = (jax.typeof(a).sharding.mesh for a in operands)
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def shardings_of(arrays: Arrays, mesh: Any) -> tuple[NamedSharding, ...]:
    """The arrays' shardings; `mesh` is used for those that have none."""
    shardings = (jax.typeof(a).sharding for a in arrays)
    return tuple(
        NamedSharding(mesh, PartitionSpec(*[None] * a.ndim)) if mesh and of.mesh.empty else of
        for a, of in zip(arrays, shardings, strict=True)
    )


def over_batch(x: jax.Array, mesh: Any) -> NamedSharding:
    """That of x over its first axis alone."""
    [sharding] = shardings_of((x,), mesh)
    return sharding.update(spec=PartitionSpec(sharding.spec[0], *[None] * (x.ndim - 1)))

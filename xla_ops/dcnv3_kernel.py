"""DCNv3 as a custom call that JAX's transforms pass through.

From the outside in, each layer gives the call one transform:

    custom_vjp            grad: the backward is a custom call of its own
    platform_dependent    the platform that the program is compiled for picks kernel or jnp form
    custom_vmap           vmap: the mapped axis becomes one more axis of batch
    custom_partitioning   jit over a sharded batch: each device computes its part, nothing moves
    ffi_call              the kernel
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from xla_ops import _ffi
from xla_ops.dcnv3_gather import dcnv3_fused_gather, dcnv3_gather
from xla_ops.geometry import Geometry

Arrays = tuple[jax.Array, ...]
Function = Callable[..., Any]

_OPERANDS = {_ffi.FORWARD: 3, _ffi.BACKWARD: 4, _ffi.FUSED_FORWARD: 2, _ffi.FUSED_BACKWARD: 3}


class _Form(NamedTuple):
    """What is static about a call: settings, the platforms whose kernel serves, and whether the jnp
    form serves on others."""

    geometry: Geometry
    platforms: tuple[str, ...]
    fallback: bool


def dcnv3_kernel(
    x: jax.Array, offset: jax.Array, mask: jax.Array, geometry: Geometry, *, fallback: bool
) -> jax.Array:
    """Computes `xla_ops.dcnv3` from checked arguments by the kernel of the platform.

    With `fallback` the jnp form serves a platform without a kernel; otherwise that is an error when
    the program is compiled.
    """
    form = _Form(geometry, _ffi.serving(), fallback)
    return _differentiable(form, *varying_alike(x, offset, mask))


def dcnv3_fused_kernel(
    x: jax.Array, record: jax.Array, geometry: Geometry, *, fallback: bool
) -> jax.Array:
    """Computes `xla_ops.dcnv3_fused` likewise."""
    form = _Form(geometry, _ffi.serving(), fallback)
    return _differentiable(form, *varying_alike(x, record))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(form: _Form, *operands: jax.Array) -> jax.Array:
    return _forward(form, *operands)


def _differentiable_forward(form: _Form, *operands: jax.Array) -> tuple[jax.Array, Arrays]:
    return _forward(form, *operands), operands


def _differentiable_backward(form: _Form, operands: Arrays, dy: jax.Array) -> Arrays:
    return _backward(form, *varying_alike(*operands, dy))


_differentiable.defvjp(_differentiable_forward, _differentiable_backward)


# jit keeps what it traced: the branches are not traced anew for each layer of a model.
@functools.partial(jax.jit, static_argnums=0)
def _forward(form: _Form, *operands: jax.Array) -> jax.Array:
    target = _ffi.FORWARD if len(operands) == 3 else _ffi.FUSED_FORWARD
    x = jax.typeof(operands[0]).sharding
    y = x.update(spec=PartitionSpec(x.spec[0], None, None, None))
    return _dispatch(form, target, operands, _gather(form, len(operands)), (y,))[0]


@functools.partial(jax.jit, static_argnums=0)
def _backward(form: _Form, *operands: jax.Array) -> Arrays:
    target = _ffi.BACKWARD if len(operands) == 4 else _ffi.FUSED_BACKWARD
    gather = _gather(form, len(operands) - 1)

    def by_gather(*operands: jax.Array) -> Arrays:
        *primals, dy = operands
        return jax.vjp(lambda *a: gather(*a)[0], *primals)[1](dy)

    gradients = tuple(jax.typeof(a).sharding for a in operands[:-1])
    return _dispatch(form, target, operands, by_gather, gradients)


def _dispatch(
    form: _Form, target: str, operands: Arrays, gather: Function, sharding: tuple[Any, ...]
) -> Any:
    """Runs the kernel of the platform; `sharding` is the results' where it is part of types."""

    def kernel(platform: str) -> Function:
        call = _custom_call(target, platform, form.geometry, leading=1)
        return lambda *operands: call(*operands)[: len(sharding)]  # the rest is scratch

    branches = {name: kernel(name) for name in form.platforms}
    default = gather if form.fallback else None

    def run(*operands: jax.Array) -> Any:
        return lax.platform_dependent(*operands, **branches, default=default)

    if jax.typeof(operands[0]).sharding.mesh.explicit_axes:
        return jax.sharding.auto_axes(run, out_sharding=sharding)(*operands)
    return run(*operands)


def _gather(form: _Form, operands: int) -> Function:
    gather = dcnv3_gather if operands == 3 else dcnv3_fused_gather
    return lambda *a: (gather(*a, form.geometry),)


@functools.cache
def _custom_call(target: str, platform: str, geometry: Geometry, leading: int) -> Function:
    """The call of a platform's target, from operands to a tuple of results.

    All have `leading` axes of batch; `vmap` puts one more before them, and the handlers take any
    number. Folding them into one would move data between devices where one of them is sharded.
    """
    backward = target in (_ffi.BACKWARD, _ffi.FUSED_BACKWARD)
    has_scratch = _ffi.has_scratch(target, platform)

    def call(*operands: jax.Array) -> Arrays:
        x, points = operands[:2]
        like = [(a.shape, a.dtype) for a in operands[:-1]]
        if not backward:
            like = [((*points.shape[:-1], x.shape[-1]), x.dtype)]
        if has_scratch:
            scratch = _ffi.scratch(x, operands[-1], len(geometry.points))
            like.append((scratch.shape, scratch.dtype))
        t = jax.typeof(x)  # in a shard_map it has the mesh axes that x varies over; results do too
        kind = {"sharding": t.sharding, "manual_axis_type": t.manual_axis_type}
        results = [jax.ShapeDtypeStruct(*a, **kind) for a in like]
        attributes = _attributes(
            geometry, fused=target in (_ffi.FUSED_FORWARD, _ffi.FUSED_BACKWARD)
        )
        return tuple(jax.ffi.ffi_call(target, results)(*operands, **attributes))

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        batch = tuple(arguments[0].sharding.spec)[:leading]
        sharding = NamedSharding(mesh, PartitionSpec(*batch))
        return mesh, call, (sharding,) * len(results), (sharding,) * len(arguments)

    partitioned = custom_partitioning(call)
    operands = _OPERANDS[target]
    arrays = operands + (operands - 1 if backward else 1) + has_scratch
    batch = [f"n{i}" for i in range(leading)]
    others = [[f"{letter}{i}" for letter in "hwc"] for i in range(arrays)]  # each array its own
    axes = [" ".join(batch + other) for other in others]
    partitioned.def_partition(
        partition,
        sharding_rule=f"{', '.join(axes[:operands])} -> {', '.join(axes[operands:])}",
        need_replication_factors=tuple(itertools.chain(*others)),
    )
    mapped = custom_vmap(partitioned)

    @mapped.def_vmap
    def _(
        size: int, is_mapped: list[bool], *operands: jax.Array
    ) -> tuple[Arrays, tuple[bool, ...]]:
        whole = [
            a if has_axis else jnp.broadcast_to(a, (size, *a.shape))
            for a, has_axis in zip(operands, is_mapped, strict=True)
        ]
        results = _custom_call(target, platform, geometry, leading + 1)(*whole)
        return results, (True,) * len(results)

    return mapped


def _attributes(geometry: Geometry, *, fused: bool) -> dict[str, Any]:
    pairs = (geometry.kernel_size, geometry.stride, geometry.pad, geometry.dilation)
    numbers = [n for pair in pairs for n in pair]
    numbers += [geometry.group, int(geometry.remove_center), _ffi.VERSION]
    attributes: dict[str, Any] = {
        "geometry": np.array(numbers, np.int64),
        "offset_scale": np.float64(geometry.offset_scale),
    }
    return attributes | ({"center_feature_scale": geometry.center_feature_scale} if fused else {})


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Marks each array as varying over the mesh axes that any of them does, for `shard_map`."""
    kinds = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    axes = frozenset().union(*kinds)
    return [
        lax.pcast(a, tuple(axes - kind), to="varying") if axes - kind else a
        for a, kind in zip(arrays, kinds, strict=True)
    ]

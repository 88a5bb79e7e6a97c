"""What JAX's transforms make of an operator, by its kernels and by its jnp form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.layers import assert_close, mesh


def check_transforms(
    operator: Callable[..., Any], arrays: Sequence[jax.Array], target: str, shared: int = 2
) -> None:
    """Holds the kernel's values and gradients to the jnp form's under jit, vmap and sharding.

    Of the operands the last `shared` have no batch, the others one of 4 or another multiple of the
    mesh.
    """
    count = len(arrays)

    def value_and_gradients(implementation: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        def results(*arrays: jax.Array) -> list[jax.Array]:
            return jax.tree.leaves(operator(*arrays, implementation=implementation))

        def loss(*arrays: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            ys = results(*arrays)
            # Of a tenth: the sine's slope at hundreds is what they are rounded to.
            return sum((jnp.sin(y / 10).sum() for y in ys), jnp.zeros(())), ys

        (_, ys), gradients = jax.value_and_grad(loss, tuple(range(count)), has_aux=True)(*arrays)
        return *results(*arrays), *ys, *gradients

    by_kernel, by_jnp = (functools.partial(value_and_gradients, i) for i in ("kernel", "jnp"))
    wanted = jax.jit(by_jnp)(*arrays)
    assert_close(jax.jit(by_kernel)(*arrays), wanted)
    stacked = [jnp.stack([a, 2 * a, a + 1]) for a in arrays]
    for mapped in ((0,), (count - shared,), range(count)):
        axes = tuple(0 if i in mapped else None for i in range(count))
        each = [b if axis == 0 else a for a, b, axis in zip(arrays, stacked, axes, strict=True)]
        got, by_map = (jax.jit(jax.vmap(f, axes))(*each) for f in (by_kernel, by_jnp))
        assert_close(got, by_map)
    specs = (*[P("data")] * (count - shared), *[P()] * shared)
    results = (*[P("data")] * (len(wanted) - count), *specs)
    mapped = jax.shard_map(by_kernel, mesh=mesh(), in_specs=specs, out_specs=results)
    assert_close(jax.jit(mapped)(*arrays), wanted)
    local = [
        jax.device_put(a, NamedSharding(mesh(), s)) for a, s in zip(arrays, specs, strict=True)
    ]
    compiled = jax.jit(operator).lower(*local).compile()
    assert "all-gather" not in compiled.as_text() and target in compiled.as_text()
    values = jax.tree.leaves(compiled(*local))
    assert_close(values, wanted[: len(values)])
    with pytest.raises(ValueError, match=r"no forward mode .* use 'jnp'"):
        jax.jvp(operator, tuple(arrays), tuple(arrays))

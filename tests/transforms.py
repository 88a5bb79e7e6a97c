"""What JAX's transforms make of an operator whose kernel has no backward of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.test_dwconv import assert_close, mesh


def check_transforms(
    operator: Callable[..., jax.Array], arrays: Sequence[jax.Array], target: str
) -> None:
    """Holds the kernel's values and gradients to the jnp form's under jit, vmap and sharding.

    Of the three operands the first has a batch of 4 or another multiple of the mesh.
    """

    def value_and_gradients(implementation: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = operator(*arrays, implementation=implementation)
            return jnp.sin(y).sum(), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays)
        return operator(*arrays, implementation=implementation), y, *gradients

    by_kernel, by_jnp = (functools.partial(value_and_gradients, i) for i in ("kernel", "jnp"))
    wanted = jax.jit(by_jnp)(*arrays)
    assert_close(jax.jit(by_kernel)(*arrays), wanted)
    stacked = [jnp.stack([a, 2 * a, a + 1]) for a in arrays]
    for axes in ((0, None, None), (None, 0, None), (0, 0, 0)):
        each = [b if axis == 0 else a for a, b, axis in zip(arrays, stacked, axes, strict=True)]
        got, by_map = (jax.jit(jax.vmap(f, axes))(*each) for f in (by_kernel, by_jnp))
        assert_close(got, by_map)
    specs = (P("data"), P(), P())
    results = (P("data"), P("data"), *specs)
    mapped = jax.shard_map(by_kernel, mesh=mesh(), in_specs=specs, out_specs=results)
    assert_close(jax.jit(mapped)(*arrays), wanted)
    local = [
        jax.device_put(a, NamedSharding(mesh(), s)) for a, s in zip(arrays, specs, strict=True)
    ]
    compiled = jax.jit(operator).lower(*local).compile()
    assert "all-gather" not in compiled.as_text() and target in compiled.as_text()
    assert_close(compiled(*local), wanted[0])
    with pytest.raises(ValueError, match=r"no forward mode .* use 'jnp'"):
        jax.jvp(operator, tuple(arrays), tuple(arrays))

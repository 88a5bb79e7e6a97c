"""GELU in jnp, with a derivative written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Returns x * Phi(x), Phi the distribution function of the normal law (the erf form)."""
    # Below -40, Phi is 0 in every dtype; minus infinity times it would be NaN, and the limit is 0.
    return jax.nn.gelu(jnp.maximum(x, -40), approximate=False)


# JAX 0.12.0's own rule for erfc fails in a `shard_map` with its checks on.
@gelu.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    near = jnp.clip(x, -40, 40)
    density = jnp.exp(-0.5 * near * near) * 0.3989422804014327
    return gelu(x), (0.5 * lax.erfc(-near * 0.7071067811865476) + near * density) * dx

"""From pixels to what the model reads, on the device. What comes before is in `preprocess`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from internimage_jax.preprocess import Preprocessing


def normalize(pixels: np.ndarray | jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """Turns pixel values into model input: (v / 255 - mean) / std. Works inside `jit`.

    Args:
        pixels: uint8 (..., 3), RGB.
        preprocessing: Mean and std.

    Returns:
        float32 of the same shape, bit for bit what NumPy and PyTorch compute in float32. The 256
        values of a channel are looked up: XLA's own arithmetic, which need not divide where we
        write a division, gives two values in three other last bits.

    Raises:
        ValueError: Another dtype, or a last axis that is not 3.
    """
    if pixels.dtype != np.uint8 or pixels.ndim < 1 or pixels.shape[-1] != 3:
        raise ValueError(
            f"pixels: got {pixels.dtype} {tuple(pixels.shape)}, expected uint8 with 3 channels "
            "last; floats v from 0 to 255 are normalised by (v / 255 - mean) / std"
        )
    values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)  # (256, 1)
    mean, std = (np.asarray(t, np.float32) for t in (preprocessing.mean, preprocessing.std))
    table = jnp.asarray((values - mean) / std)  # (256, 3)
    rows = jnp.asarray(pixels).astype(jnp.int32)  # (..., 3)
    channels = lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1)  # (..., 3)
    # On a mesh of explicit axes JAX does not work out how what is looked up is sharded.
    sharding = jax.typeof(rows).sharding
    return table.at[rows, channels].get(mode="promise_in_bounds", out_sharding=sharding)

"""DCNv3 in jnp: the definition, the oracle of every kernel, and what serves where there is none.

The sampling points are walked one by one (a scan of P steps), so the samples of all points never
exist at once. A map is padded with a border of zeros, one pixel before and two after; a point whose
four neighbours reach outside then reads zeros, and a point that counts as outside altogether is
sent to the border, without a test per neighbour.

Axes: N batch, H W input, Ho Wo output, G groups, D channels of a group, P points.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from xla_ops.geometry import Geometry
from xla_ops.operands import at_least_float32, varying_alike

_BEFORE, _AFTER = 1, 2  # width of the border of zeros


def dcnv3_gather(x: jax.Array, offset: jax.Array, mask: jax.Array, geometry: Geometry) -> jax.Array:
    """Computes `xla_ops.dcnv3` from checked arguments; see there for the arguments."""
    n, h, w, channels = x.shape
    out_h, out_w = offset.shape[1:3]
    group, points = geometry.group, geometry.points
    width = channels // group
    # Half precision serves storage only: locations, weights and sums are float32.
    real = at_least_float32(x.dtype)

    padding = (0, 0), (_BEFORE, _AFTER), (_BEFORE, _AFTER), (0, 0)
    row = w + _BEFORE + _AFTER  # pixels in a row of the padded map
    pixels = jnp.pad(x, padding)
    pixels = pixels.reshape(n, (h + _BEFORE + _AFTER) * row, group, width)  # (N, H' W', G, D)
    offset = offset.reshape(n, out_h, out_w, group, len(points), 2)
    offset = jnp.moveaxis(offset, 4, 0)  # (P, N, Ho, Wo, G, 2)
    mask = mask.reshape(n, out_h, out_w, group, len(points))
    mask = jnp.moveaxis(mask, 4, 0)  # (P, N, Ho, Wo, G)

    def grid(extent: int, axis: int) -> jax.Array:
        start = geometry.radius[axis] - geometry.pad[axis]
        return (jnp.arange(extent) * geometry.stride[axis] + start).astype(real)

    grid_h, grid_w = grid(out_h, 0)[None, :, None, None], grid(out_w, 1)[None, None, :, None]

    def step(axis: int) -> jax.Array:
        steps = [p[axis] * geometry.dilation[axis] - geometry.radius[axis] for p in points]
        return jnp.asarray(steps, real)

    # Recomputed in the backward pass: what a step keeps otherwise is many times its inputs.
    @jax.checkpoint
    def contribution(pixels, step_h, step_w, offset, mask):  # offset (N, Ho, Wo, G, 2)
        offset = offset.astype(real)
        loc_h = grid_h + (step_h + offset[..., 1]) * geometry.offset_scale  # (N, Ho, Wo, G)
        loc_w = grid_w + (step_w + offset[..., 0]) * geometry.offset_scale
        # NaN fails every comparison, so it counts as outside.
        inside = (loc_h > -1) & (loc_h < h) & (loc_w > -1) & (loc_w < w)
        loc_h, loc_w = jnp.where(inside, loc_h, h), jnp.where(inside, loc_w, w)
        low_h, low_w = jnp.floor(loc_h), jnp.floor(loc_w)
        frac_h, frac_w = (loc_h - low_h)[..., None], (loc_w - low_w)[..., None]
        index = (low_h.astype(jnp.int32) + _BEFORE) * row + low_w.astype(jnp.int32) + _BEFORE
        upper = _lerp(_take(pixels, index), _take(pixels, index + 1), frac_w, real)
        lower = _lerp(_take(pixels, index + row), _take(pixels, index + row + 1), frac_w, real)
        return mask.astype(real)[..., None] * _lerp(upper, lower, frac_h, real)

    def body(y, point):
        return y + contribution(pixels, *point), None

    zeros = jnp.zeros((n, out_h, out_w, group, width), real)
    start = varying_alike(zeros, x, offset, mask)[0]
    y, _ = lax.scan(body, start, (step(0), step(1), offset, mask))
    return y.reshape(n, out_h, out_w, channels).astype(x.dtype)


def dcnv3_fused_gather(x: jax.Array, record: jax.Array, geometry: Geometry) -> jax.Array:
    """Computes `xla_ops.dcnv3_fused` from checked arguments; see there for the arguments."""
    n, out_h, out_w, _ = record.shape
    group, points = geometry.group, len(geometry.points)
    width = x.shape[-1] // group
    real = at_least_float32(x.dtype)
    each = geometry.record.each
    record = record[..., : group * each].reshape(n, out_h, out_w, group, each).astype(real)
    offset, logits, center = jnp.split(
        record[..., : 3 * points + 1], (2 * points, 3 * points), axis=-1
    )
    mask = jax.nn.softmax(logits, axis=-1)
    offset = offset.reshape(n, out_h, out_w, group * points * 2)
    mask = mask.reshape(n, out_h, out_w, group * points)
    y = dcnv3_gather(x.astype(real), offset, mask, geometry)
    if geometry.center_feature_scale:
        share = jnp.repeat(jax.nn.sigmoid(center[..., 0]), width, axis=-1)  # (N, H, W, G * D)
        y = y * (1 - share) + x.astype(real) * share
    return y.astype(x.dtype)


def _lerp(a: jax.Array, b: jax.Array, t: jax.Array, dtype: jnp.dtype) -> jax.Array:
    a, b = a.astype(dtype), b.astype(dtype)
    return a + (b - a) * t


def _take(pixels: jax.Array, index: jax.Array) -> jax.Array:
    """Picks, in each image and group of `pixels` (N, H' W', G, D), pixels `index` (N, Ho, Wo, G).

    N and G are batch axes of the gather, so an index never leaves its plane and 32 bits are enough.
    """
    dims = lax.GatherDimensionNumbers(
        offset_dims=(4,),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0, 2),
        start_indices_batching_dims=(0, 3),
    )
    sizes = (1, 1, 1, pixels.shape[-1])
    return lax.gather(pixels, index[..., None], dims, sizes, mode="promise_in_bounds")

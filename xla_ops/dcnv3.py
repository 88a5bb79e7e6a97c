"""DCNv3, deformable convolution version 3: the public operator, its checks and its dispatch."""

from __future__ import annotations

import math
import numbers
from typing import Literal

import jax
import jax.numpy as jnp

from xla_ops.custom_call import call
from xla_ops.dcnv3_kernel import DCNv3
from xla_ops.geometry import Geometry
from xla_ops.operands import arrays, at_least_float32, check_dtype, check_integer

Implementation = Literal["kernel", "gather"]
LARGEST_SIDE = 1 << 24  # of a map, whose pixels float32 tells apart


def dcnv3(
    x: jax.Array,
    offset: jax.Array,
    mask: jax.Array,
    *,
    group: int,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    pad: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Samples `x` bilinearly at P learned points per position and group, and sums them weighted.

    For each output position (i, j) and group g, with P = kernel_h * kernel_w points (one less with
    `remove_center`)

        y[n, i, j, g] = sum over p of mask[n, i, j, g, p] * bilinear(x[n, :, :, g], loc_h, loc_w)
        loc_w = j * stride_w - pad_w + r_w + (a * dilation_w - r_w + offset_x) * offset_scale

    and loc_h likewise from i, b and offset_y, in pixels of the unpadded input, with
    r = dilation * (kernel - 1) // 2 and p = a * kernel_h + b, so that x varies slowest. A neighbour
    outside the map counts as zero, and so does a point one pixel or more outside, at infinity or at
    NaN. The derivative with respect to an offset at an integer location is that of the cell to the
    right.

    Args:
        x: Features (N, H, W, G * D), float32, bfloat16, float16 or float64.
        offset: (N, Ho, Wo, G * P * 2) in pixels, pairs (x, y), of x's dtype.
        mask: Weight of each point (N, Ho, Wo, G * P), used as it is (InternImage passes a softmax
            over the P points), of x's dtype.
        group: Number of groups G; each has offsets and weights of its own.
        kernel_size: Points along (h, w); like stride, pad and dilation, an int serves both axes.
        stride: Pixels between output positions along (h, w).
        pad: Pixels of zeros around the input along (h, w).
        dilation: Pixels between points along (h, w).
        offset_scale: Factor on both the offsets and the grid of points itself.
        remove_center: Leaves out the middle point; square odd kernels only.
        implementation: "gather" is jnp: it runs anywhere, and has forward mode; "kernel" is the
            custom call of the platform that the program is compiled for, whose second derivatives
            are those of the jnp form; None takes the kernel where `xla_ops.status()` has one, and
            the jnp form elsewhere. `jax.export` takes the jnp form as it is, and the kernel with
            `xla_ops.export_checks()`.

    Returns:
        (N, Ho, Wo, G * D) of x's dtype, where
        Ho = (H + 2 * pad_h - (dilation_h * (kernel_h - 1) + 1)) // stride_h + 1. Locations,
        bilinear weights and sums are float32 for bfloat16 and float16, and of x's dtype otherwise.

    Raises:
        ValueError: A shape, dtype or setting does not fit; the message names it.

    Reference: Wang et al., InternImage (CVPR 2023, arXiv 2211.05778), section 3.1, equation 2.
    """
    points = kernel_size, stride, pad, dilation
    geometry = _geometry(*points, group, offset_scale, remove_center)
    x, offset, mask = arrays(x=x, offset=offset, mask=mask)
    _check(geometry, x, offset=offset, mask=mask)
    return call(DCNv3(geometry, fused=False), implementation, x, offset, mask)


def dcnv3_fused(
    x: jax.Array,
    record: jax.Array,
    *,
    group: int,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    pad: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    center_feature_scale: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes `dcnv3` from what one matrix product makes: offsets and logits of all groups.

    The mask is the softmax of a group's P logits. With `center_feature_scale` a group's result is
    blended with the features at its position, s the sigmoid of its centre-scale logit:

        y[n, i, j, g] = (1 - s) * dcnv3(x, offset, softmax(logits))[n, i, j, g] + s * x[n, i, j, g]

    Args:
        x: Features (N, H, W, G * D), float32, bfloat16, float16 or float64.
        record: (N, Ho, Wo, R); `xla_ops.Record(group, P)` says which column holds what, and the
            width R. Of x's dtype, or float32 where x is bfloat16 or float16.
        center_feature_scale: Blends with x at the position; the output is then of x's size.

    The other arguments, the result and its errors are those of `dcnv3`.

    Reference: Wang et al., InternImage (CVPR 2023, arXiv 2211.05778), section 3.1; the blend is
    that of the released models H and G.
    """
    points = kernel_size, stride, pad, dilation
    geometry = _geometry(*points, group, offset_scale, remove_center, center_feature_scale)
    x, record = arrays(x=x, record=record)
    _check(geometry, x, record=record)
    return call(DCNv3(geometry, fused=True), implementation, x, record)


def _geometry(
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    pad: int | tuple[int, int],
    dilation: int | tuple[int, int],
    group: int,
    offset_scale: float,
    remove_center: bool,
    center_feature_scale: bool = False,
) -> Geometry:
    if not isinstance(offset_scale, numbers.Real) or not math.isfinite(offset_scale):
        raise ValueError(f"offset_scale: expected a finite number, got {offset_scale!r}")
    return Geometry(
        kernel_size=_pair("kernel_size", kernel_size, at_least=1),
        stride=_pair("stride", stride, at_least=1),
        pad=_pair("pad", pad, at_least=0),
        dilation=_pair("dilation", dilation, at_least=1),
        group=check_integer("group", group, at_least=1),
        offset_scale=float(offset_scale),
        remove_center=bool(remove_center),
        center_feature_scale=bool(center_feature_scale),
    )


def _pair(name: str, value: int | tuple[int, int], *, at_least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected an integer or a pair (h, w), got {value!r}")
    height, width = (check_integer(name, one, at_least=at_least) for one in pair)
    return height, width


def _check(geometry: Geometry, x: jax.Array, **points: jax.Array) -> None:
    """Raises unless x and its points, offset and mask or a record, fit together."""
    for name, array in {"x": x, **points}.items():
        if array.ndim != 4:
            raise ValueError(
                f"{name}: expected four axes (N, H, W, channels), got shape {array.shape}"
            )
    check_dtype(x)
    for name, array in points.items():
        real = at_least_float32(x.dtype)
        if array.dtype != x.dtype and (name != "record" or array.dtype != real):
            also = f" or {real}" if name == "record" and real != x.dtype else ""
            raise ValueError(f"{name}: expected the dtype of x, {x.dtype}{also}, got {array.dtype}")

    kernel_h, kernel_w = geometry.kernel_size
    if geometry.remove_center and (kernel_h != kernel_w or kernel_h % 2 == 0):
        raise ValueError(
            f"remove_center: expected a square odd kernel, got kernel_size {geometry.kernel_size}"
        )
    n, h, w, channels = x.shape
    longest = max((side for side in (h, w) if isinstance(side, int)), default=0)
    if longest > LARGEST_SIDE and x.dtype != jnp.float64:
        raise ValueError(
            f"x: expected sides of at most {LARGEST_SIDE} pixels in {x.dtype}, since locations are "
            f"float32, got {h}x{w}"
        )
    if channels == 0 or channels % geometry.group:
        raise ValueError(
            f"x: expected channels that {geometry.group} groups divide, got {channels} channels"
        )
    out_h, out_w = geometry.output_size((h, w))
    if h < 1 or w < 1 or out_h < 1 or out_w < 1:
        raise ValueError(
            f"x: a map of {h}x{w} is too small for kernel_size {geometry.kernel_size}, "
            f"dilation {geometry.dilation} and pad {geometry.pad}"
        )
    if geometry.center_feature_scale and (out_h, out_w) != (h, w):
        raise ValueError(
            f"center_feature_scale: expected an output of x's size {h}x{w}, got {out_h}x{out_w}"
        )
    count = len(geometry.points)
    record = geometry.record
    widths = {
        "offset": geometry.group * count * 2,
        "mask": geometry.group * count,
        "record": record.width,
    }
    for name, array in points.items():
        expected = (n, out_h, out_w, widths[name])
        if array.shape != expected:
            raise ValueError(
                f"{name}: expected shape {expected} for x of shape {x.shape}, {geometry.group} "
                f"groups, {count} points, stride {geometry.stride}, pad {geometry.pad} and "
                f"dilation {geometry.dilation}, got {array.shape}"
            )

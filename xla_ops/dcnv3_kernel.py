"""DCNv3 as custom calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from xla_ops import _targets
from xla_ops.custom_call import Arrays, Operator, Shapes, Target, run
from xla_ops.dcnv3_gather import dcnv3_fused_gather, dcnv3_gather
from xla_ops.geometry import Geometry


@dataclass(frozen=True)
class DCNv3(Operator):
    """`xla_ops.dcnv3` as `xla_ops.custom_call` takes it: of x, offset and mask, or x and record."""

    geometry: Geometry
    fused: bool

    plain = "gather"

    @property
    def forward(self) -> Target:
        name = _targets.DCNV3_FUSED_FORWARD if self.fused else _targets.DCNV3_FORWARD
        operands = (3,) * (2 if self.fused else 3)
        return Target(name, operands, (3,), _like_output, self._attributes)

    def backward(self, platform: str) -> Target:
        name = _targets.DCNV3_FUSED_BACKWARD if self.fused else _targets.DCNV3_BACKWARD
        results = (3,) * (2 if self.fused else 3)
        operands, shapes = (*results, 3), _like_operands
        if platform == "cuda":
            points = len(self.geometry.points)
            results, shapes = (*results, 3), _with_scratch(points)
        return Target(name, operands, results, shapes, self._attributes)

    def definition(self, *operands: jax.Array) -> jax.Array:
        if self.fused:
            x, record = operands
            return dcnv3_fused_gather(x, record, self.geometry)
        x, offset, mask = operands
        return dcnv3_gather(x, offset, mask, self.geometry)

    def gradients(self, platform: str, kept: Arrays, dys: Arrays) -> Arrays:
        return run(self.backward(platform), *kept, *dys)[: len(kept)]

    @property
    def _attributes(self) -> tuple:
        g = self.geometry
        numbers = (*g.kernel_size, *g.stride, *g.pad, *g.dilation, g.group, int(g.remove_center))
        shared = (
            ("geometry", (*numbers, _targets.VERSION)),
            ("offset_scale", np.float64(g.offset_scale)),
        )
        blend = ("center_feature_scale", g.center_feature_scale)
        return (*shared, blend) if self.fused else shared


def _like_output(x: jax.Array, points: jax.Array, *_: jax.Array) -> Shapes:
    return [((*points.shape[:-1], x.shape[-1]), x.dtype)]


def _like_operands(*operands: jax.Array) -> Shapes:
    return [(a.shape, a.dtype) for a in operands[:-1]]


@functools.cache  # the same function each time: what was traced is found by it
def _with_scratch(points: int) -> Callable[..., Shapes]:
    return lambda *operands: [
        *_like_operands(*operands),
        scratch(operands[0], operands[-1], points),
    ]


def scratch(x: jax.Array, dy: jax.Array, points: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one result more of CUDA's backward, which it works in and nobody reads.

    It has 64 bits for each pixel and channel, and one row more; hardly anything where every GPU has
    the shared memory to sum the gradient of x in. dcnv3_cuda_spread.cu has the same rule.
    """
    *batch, h, w, channels = x.shape
    terms = dy.shape[-3] * dy.shape[-2] * (points + 1)  # at most, of the sum that is a pixel's
    word, most = {2: (4, 2**30), 4: (8, 2**16), 8: (8, 0)}[x.dtype.itemsize]
    if h * w * word <= 48 * 1024 and terms < most:
        return (*batch, 1, 1, 1), np.dtype(np.uint32)
    return (*batch, 1, h * w + 1, 2 * channels), np.dtype(np.uint32)

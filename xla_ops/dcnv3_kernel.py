"""DCNv3 as custom calls."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from xla_ops import _ffi
from xla_ops.custom_call import Arrays, Shapes, Target
from xla_ops.dcnv3_gather import dcnv3_fused_gather, dcnv3_gather
from xla_ops.geometry import Geometry


class DCNv3(NamedTuple):
    """`xla_ops.dcnv3` as `xla_ops.custom_call` takes it: of x, offset and mask, or x and record."""

    geometry: Geometry
    fused: bool

    plain = "gather"

    @property
    def forward(self) -> Target:
        name = _ffi.FUSED_FORWARD if self.fused else _ffi.FORWARD
        operands = (3,) * (2 if self.fused else 3)
        return Target(name, operands, (3,), _like_output, self._attributes)

    @property
    def backward(self) -> Target:
        name = _ffi.FUSED_BACKWARD if self.fused else _ffi.BACKWARD
        results = (3,) * (2 if self.fused else 3)
        return Target(name, (*results, 3), results, _like_operands, self._attributes)

    def definition(self, *operands: jax.Array) -> jax.Array:
        if self.fused:
            x, record = operands
            return dcnv3_fused_gather(x, record, self.geometry)
        x, offset, mask = operands
        return dcnv3_gather(x, offset, mask, self.geometry)

    def gradients(self, operands: Arrays, results: Arrays) -> Arrays:
        return results

    @property
    def _attributes(self) -> tuple:
        g = self.geometry
        numbers = (*g.kernel_size, *g.stride, *g.pad, *g.dilation, g.group, int(g.remove_center))
        shared = (
            ("geometry", (*numbers, _ffi.VERSION)),
            ("offset_scale", np.float64(g.offset_scale)),
        )
        blend = ("center_feature_scale", g.center_feature_scale)
        return (*shared, blend) if self.fused else shared


def _like_output(x: jax.Array, points: jax.Array, *_: jax.Array) -> Shapes:
    return [((*points.shape[:-1], x.shape[-1]), x.dtype)]


def _like_operands(*operands: jax.Array) -> Shapes:
    return [(a.shape, a.dtype) for a in operands[:-1]]

"""The shape arithmetic of DCNv3."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class Geometry(NamedTuple):
    """The static settings of a DCNv3 call; pairs are (h, w)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    group: int
    offset_scale: float
    remove_center: bool
    center_feature_scale: bool = False  # fused form only

    @property
    def radius(self) -> tuple[int, int]:
        """Distance from the first point of the kernel to its anchor, in pixels; rounded down."""
        (kernel_h, kernel_w), (dilation_h, dilation_w) = self.kernel_size, self.dilation
        return dilation_h * (kernel_h - 1) // 2, dilation_w * (kernel_w - 1) // 2

    @property
    def points(self) -> list[tuple[int, int]]:
        """The (row, column) of each sampling point within the kernel, in the order of the offsets.

        Columns are the slow axis, as in the released weights; the other order swaps the offsets
        of a trained model.
        """
        kernel_h, kernel_w = self.kernel_size
        points = [(row, column) for column in range(kernel_w) for row in range(kernel_h)]
        if self.remove_center:
            points.remove((kernel_h // 2, kernel_w // 2))
        return points

    @property
    def record(self) -> Record:
        """Where the fused form has the learned numbers."""
        return Record(self.group, len(self.points))

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for an input of `size` (h, w); below 1 where none fits."""

        def out(extent: int, axis: int) -> int:
            span = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            return (extent + 2 * self.pad[axis] - span) // self.stride[axis] + 1

        return out(size[0], 0), out(size[1], 1)


class Record(NamedTuple):
    """Columns of the fused form's rows, which hold all learned numbers of an output position.

    The numbers of a group lie together, 3P + 1 of them padded to a multiple of 4 (28 for the nine
    points of 3x3, without padding): P pairs (x, y) of offsets, P mask logits, the centre-scale
    logit. The row is padded to a multiple of 8. So a thread that owns a (position, group) reads its
    numbers in aligned pieces of four, and a model without centre-feature scale has the same layout:
    what is padding, or a centre logit unused, does not count, and its gradient is zero.
    """

    group: int
    points: int

    @property
    def each(self) -> int:
        """Numbers of a group, with padding."""
        return -(-(3 * self.points + 1) // 4) * 4

    @property
    def width(self) -> int:
        """Numbers of a row, with padding."""
        return -(-self.group * self.each // 8) * 8

    @property
    def offset(self) -> np.ndarray:
        """Columns of the offsets, in the order of `dcnv3`'s argument (G * P * 2)."""
        return self._columns(0, 2 * self.points)

    @property
    def mask(self) -> np.ndarray:
        """Columns of the mask logits, in the order of `dcnv3`'s argument (G * P)."""
        return self._columns(2 * self.points, 3 * self.points)

    @property
    def center(self) -> np.ndarray:
        """Columns of the centre-scale logits (G)."""
        return self._columns(3 * self.points, 3 * self.points + 1)

    def join(self, offset: Array, mask: Array, center: Array | None = None) -> Array:
        """Puts columns that were made apart into rows of the fused form.

        Args:
            offset: (..., G * P * 2) in the order of `dcnv3`'s argument: offsets, or the kernel or
                bias of the product that makes them.
            mask: (..., G * P) likewise for the mask logits.
            center: (..., G) likewise for the centre-scale logits; None for zeros.

        Returns:
            (..., width); padding is zero. A NumPy array if all of them are.
        """
        parts = [a for a in (offset, mask, center) if a is not None]
        if all(isinstance(a, np.ndarray) for a in parts):  # nothing to compile
            return self._join(np, parts)
        return self._join_compiled(parts)

    @functools.partial(jax.jit, static_argnums=0)  # one small program for each shape
    def _join_compiled(self, parts: list[Array]) -> Array:
        return self._join(jnp, parts)

    def _join(self, xp: Any, parts: list[Array]) -> Array:
        def padded(a: Array, width: int) -> Array:
            return xp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])])

        split = [a.reshape(*a.shape[:-1], self.group, -1) for a in parts]
        row = padded(xp.concatenate(split, axis=-1), self.each)  # (..., G, each)
        return padded(row.reshape(*row.shape[:-2], -1), self.width)

    def _columns(self, begin: int, end: int) -> np.ndarray:
        return (np.arange(self.group)[:, None] * self.each + np.arange(begin, end)).ravel()

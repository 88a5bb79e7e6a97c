"""The shape arithmetic of DCNv3, shared by every implementation of it."""

from __future__ import annotations

from typing import NamedTuple


class Geometry(NamedTuple):
    """What of a DCNv3 call is known before any array is; pairs are (h, w)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    group: int
    offset_scale: float
    remove_center: bool

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

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for an input of `size` (h, w); below 1 where none fits."""

        def out(extent: int, axis: int) -> int:
            span = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            return (extent + 2 * self.pad[axis] - span) // self.stride[axis] + 1

        return out(size[0], 0), out(size[1], 1)

"""Moves PyTorch's first axis, the output channels, to the end, and back.

NumPy's own transposed copy of a large matrix reads a column at a time and is bound by cache misses;
a few rows at a time it is ten times as fast.
"""

from __future__ import annotations

import numpy as np

_ROWS = 8  # the best of 4 to 256 for matrices of 1,000 to 16,000 a side


def flax_layout(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """Returns a PyTorch array in its Flax shape, contiguous; see `convert.rules.Rule`."""
    if axes is None:
        return array
    array = array.reshape(array.shape[: len(axes)])  # drops the two axes of a pointwise convolution
    outputs, *others = array.shape
    moved = _transposed(array.reshape(outputs, -1)).reshape(*others, outputs)
    # Output channels are last on either side now, so whole rows of them are copied.
    return np.ascontiguousarray(moved.transpose([axis - 1 for axis in axes[:-1]] + [len(others)]))


def torch_layout(
    array: np.ndarray, axes: tuple[int, ...] | None, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns a Flax array in its PyTorch `shape`, contiguous."""
    if axes is None:
        return array
    moved = array.transpose([*np.argsort(axes)[1:], len(axes) - 1])  # (inputs..., outputs)
    return _transposed(np.ascontiguousarray(moved).reshape(-1, array.shape[-1])).reshape(shape)


def _transposed(matrix: np.ndarray) -> np.ndarray:
    rows, columns = matrix.shape
    result = np.empty((columns, rows), matrix.dtype)
    for start in range(0, rows, _ROWS):
        result[:, start : start + _ROWS] = matrix[start : start + _ROWS].T
    return result

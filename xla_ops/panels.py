"""The layout of kernels that products on a CPU read fastest: in panels of 32 columns.

A product takes 32 columns of its kernel at a time. Of a (C, K) array in rows they are C pieces, a
page of memory apart where K is 1024; in panels they are one piece, read as fast as memory gives it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from xla_ops import _ffi, _targets

COLUMNS = 32  # kPanelColumns in linear_call.h


def in_panels(kernel: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Returns a kernel in the layout that `linear`, `mlp` and `convolution` also take.

    Args:
        kernel: (..., K), its other axes C, or (3, 3, C) for `convolution`.

    Returns:
        (ceil(K / 32), C, 32), or 9 C in place of C, with zeros for the columns beyond K; a NumPy
        array if `kernel` is one.
    """
    xp = np if isinstance(kernel, np.ndarray) else jnp
    *inputs, columns = kernel.shape
    kernel = kernel.reshape(math.prod(inputs), columns)
    missing = -columns % COLUMNS
    if missing:
        kernel = xp.pad(kernel, ((0, 0), (0, missing)))
    panels = kernel.reshape(len(kernel), -1, COLUMNS).transpose(1, 0, 2)
    return np.ascontiguousarray(panels) if xp is np else panels


def reads_panels(platform: str | None) -> bool:
    """Whether the products' kernels serve on this platform and read panels as they are."""
    return platform == "cpu" and platform in _ffi.serving(_targets.LINEAR_FORWARD)


def from_panels(kernel: jax.Array, columns: int) -> jax.Array:
    """Returns the (C, columns) kernel that is in panels."""
    return kernel.transpose(1, 0, 2).reshape(kernel.shape[1], -1)[:, :columns]


def panels_shape(inputs: int, columns: int) -> tuple[int, int, int]:
    """The shape of a kernel in panels."""
    return (-(-columns // COLUMNS), inputs, COLUMNS)

"""What the kernels' handlers refuse: calls that no operator here makes, but another program may."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers import kernel_serves, needs_kernel
from xla_ops import _targets
from xla_ops.bias_gelu import BiasGelu
from xla_ops.convolution import KERNEL_GRADIENT as CONVOLUTION_GRADIENT
from xla_ops.convolution import Convolution
from xla_ops.custom_call import Target
from xla_ops.dcnv3_kernel import DCNv3
from xla_ops.dwconv import DwconvNormGelu
from xla_ops.geometry import Geometry
from xla_ops.layer_norm import AddNorm, LayerNorm, NormAdd
from xla_ops.linear import KERNEL_GRADIENT, Linear
from xla_ops.mlp import MLP

GEOMETRY = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2, 1.0, False, True)
X, POINTS, RECORD = (2, 4, 5, 8), (2, 4, 5, 36), (2, 4, 5, GEOMETRY.record.width)
VECTOR, DWCONV = (8,), (X, (3, 3, 8), (8,), (8,), (8,))
CALLS: dict[str, tuple[Target, tuple[tuple[int, ...], ...]]] = {
    "dcnv3": (DCNv3(GEOMETRY, False).forward, (X, POINTS, (2, 4, 5, 18))),
    "dcnv3 back": (DCNv3(GEOMETRY, False).backward("cpu"), (X, POINTS, (2, 4, 5, 18), X)),
    "fused": (DCNv3(GEOMETRY, True).forward, (X, RECORD)),
    "fused back": (DCNv3(GEOMETRY, True).backward("cpu"), (X, RECORD, X)),
    "dwconv": (DwconvNormGelu(1e-6).forward, DWCONV),
    "dwconv back": (DwconvNormGelu(1e-6).backward("cpu"), (*DWCONV, X)),
    "gelu": (BiasGelu().forward, (X, VECTOR)),
    "gelu back": (BiasGelu().backward("cpu"), (X, VECTOR, X)),
    "norm": (LayerNorm(1e-6).forward, (X, VECTOR, VECTOR)),
    "norm back": (LayerNorm(1e-6).backward("cpu"), (X, VECTOR, X)),
    "add_norm": (AddNorm(1e-6).forward, (X, X, VECTOR, VECTOR)),
    "add_norm back": (AddNorm(1e-6).backward("cpu"), (X, VECTOR, X, X)),
    "norm_add": (NormAdd(1e-6).forward, (X, X, VECTOR, VECTOR)),
    "linear": (Linear(False).forward, (X, (8, 24), (24,))),
    "linear gelu": (Linear(True).forward, (X, (8, 24), (24,))),
    "linear back": (KERNEL_GRADIENT, (X, (2, 4, 5, 24))),
    "linear panels": (Linear(False, True).forward, (X, (2, 8, 32), (40,))),
    "convolution": (Convolution(0).forward, (X, (3, 3, 8, 24), (24,))),
    "convolution back": (CONVOLUTION_GRADIENT, (X, (2, 2, 3, 24))),
    "convolution panels": (Convolution(0, True).forward, (X, (1, 72, 32), (24,))),
    "mlp": (MLP().forward, (X, (8, 24), (24,), (24, 8), (8,))),
}
NAMES = [
    pytest.param(name, marks=kernel_serves if name[:3] in ("lin", "con", "mlp") else needs_kernel)
    for name in CALLS
]
Result = jax.ShapeDtypeStruct
Buffers = Sequence[np.ndarray]


def call(target: Target, operands: Buffers, results: Sequence[Result], version: int) -> None:
    attributes = dict(target.attributes)
    if "geometry" in attributes:
        attributes["geometry"] = np.array((*attributes["geometry"][:-1], version), np.int64)
    else:
        attributes["version"] = np.int64(version)
    jax.block_until_ready(jax.ffi.ffi_call(target.name, results)(*operands, **attributes))


def results_of(target: Target, operands: Buffers) -> list[Result]:
    return [Result(*a) for a in target.shapes(*operands)]


def changed(values: Sequence, i: int, value: object) -> list:
    return [*values[:i], value, *values[i + 1 :]]


@pytest.mark.parametrize("sets", [(), (3,)], ids=["", "sets"])  # as `vmap` over all operands makes
@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name: str, sets: tuple[int, ...]) -> None:
    target, shapes = CALLS[name]
    operands = [np.ones((*sets, *shape), jnp.bfloat16) for shape in shapes]
    results = results_of(target, operands)
    call(target, operands, results, _targets.VERSION)

    def refused(operands: Buffers, results: Sequence[Result], version=_targets.VERSION) -> None:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: internimage"):
            call(target, operands, results, version)

    refused(operands, results, _targets.VERSION + 1)
    for i, a in enumerate(operands):
        of_any_type = name.startswith("fused") and i == 1  # a record: of any but integers
        other = changed(operands, i, a.astype("int16" if of_any_type else "float16"))
        refused(other, results)
        for axis in range(a.ndim):
            more = changed(operands, i, np.concatenate([a, a], axis))
            if name == "dcnv3" and i == 0 and axis - len(sets) in (1, 2):
                continue  # a map of any size has a result of any other
            refused(more, results)
            if axis < len(sets):
                refused(more, results_of(target, more))
        if i == 0 and name in ("dcnv3", "fused"):
            continue  # a group may have more channels, and points be of another dtype
        refused(other, results_of(target, other))
        if name not in ("linear back", "convolution back"):  # where either may have more channels
            refused(more, results_of(target, more))
    for i, a in enumerate(results):
        refused(operands, changed(results, i, Result(a.shape, "float16")))
        more = (*a.shape[:-1], a.shape[-1] + 1)
        refused(operands, changed(results, i, Result(more, a.dtype)))


@needs_kernel
def test_sides_whose_pixels_float32_does_not_tell_apart_are_refused() -> None:
    side, stride = (1 << 24) + 5, 1 << 23
    target = DCNv3(Geometry((1, 1), (1, stride), (0, 0), (1, 1), 1, 1.0, False), False).forward
    shapes = (side, 1), (3, 2), (3, 1)
    operands = [np.zeros((1, 1, *shape), jnp.bfloat16) for shape in shapes]
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"a side of more than 2\^24 pixels"):
        call(target, operands, results_of(target, operands), _targets.VERSION)

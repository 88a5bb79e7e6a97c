"""What all operators take for an array: JAX's, NumPy's, and a Flax variable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import xla_ops

STREAM = np.random.RandomState(0)


def array(*shape: int) -> np.ndarray:
    return STREAM.standard_normal(shape)  # float64, which JAX has as float32


X, C = array(1, 4, 5, 16), 16
LAYER = dict.fromkeys(xla_ops.LayerParameters._fields) | {
    **{name: array(C) for name in xla_ops.LayerParameters._fields},
    "depthwise_kernel": array(3, 3, C),
    **{name: array(C, C) for name in ("input_kernel", "output_kernel", "fc1_kernel", "fc2_kernel")},
    "record_kernel": array(C, xla_ops.Record(2, 9).width),
    "record_bias": array(xla_ops.Record(2, 9).width),
}
CASES: dict[str, tuple[Callable[..., Any], dict[str, np.ndarray]]] = {
    "dcnv3": (
        lambda **a: xla_ops.dcnv3(**a, group=2),
        {"x": X, "offset": array(1, 4, 5, 36), "mask": array(1, 4, 5, 18)},
    ),
    "dcnv3_fused": (
        lambda **a: xla_ops.dcnv3_fused(**a, group=np.int64(2)),
        {"x": X, "record": array(1, 4, 5, xla_ops.Record(2, 9).width)},
    ),
    "dwconv_norm_gelu": (
        xla_ops.dwconv_norm_gelu,
        {"x": X, "kernel": array(3, 3, C), "bias": array(C), "scale": array(C), "offset": array(C)},
    ),
    "bias_gelu": (xla_ops.bias_gelu, {"x": X, "bias": array(C)}),
    "linear": (xla_ops.linear, {"x": X, "kernel": array(C, 8), "bias": array(8)}),
    "mlp": (
        xla_ops.mlp,
        {
            "x": X,
            "kernel1": array(C, 8),
            "bias1": array(8),
            "kernel2": array(8, C),
            "bias2": array(C),
        },
    ),
    "convolution": (
        xla_ops.convolution,
        {"x": X, "kernel": array(3, 3, C, 8), "bias": array(8)},
    ),
    "layer_norm": (xla_ops.layer_norm, {"x": X, "scale": array(C), "bias": array(C)}),
    "add_norm": (
        lambda **a: xla_ops.add_norm(**a)[1],
        {"x": X, "residual": X, "scale": array(C), "bias": array(C)},
    ),
    "norm_add": (
        xla_ops.norm_add,
        {"x": X, "residual": X, "scale": array(C), "bias": array(C)},
    ),
    "layers": (
        lambda x, **layer: xla_ops.layers(
            x, [xla_ops.LayerParameters(**layer)], group=np.int64(2), implementation="jnp"
        ),
        {"x": X, **LAYER},
    ),
}


@pytest.mark.parametrize(("operator", "operands"), CASES.values(), ids=CASES)
def test_numpys_arrays_and_variables_are_operands(
    operator: Callable[..., Any], operands: dict[str, np.ndarray]
) -> None:
    in_jax = {name: jax.numpy.asarray(value) for name, value in operands.items()}
    wanted = operator(**in_jax)
    variables = {name: nnx.Param(value) for name, value in in_jax.items()}
    for given in (operands, variables):
        y = operator(**given)
        assert isinstance(y, jax.Array) and y.dtype == np.float32
        np.testing.assert_array_equal(y, wanted)
    y = operator(x=operands["x"], **{name: a for name, a in in_jax.items() if name != "x"})
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize(("operator", "operands"), CASES.values(), ids=CASES)
def test_what_is_no_array_is_named(
    operator: Callable[..., Any], operands: dict[str, np.ndarray]
) -> None:
    for name in operands:
        with pytest.raises(ValueError, match=f"^{name}: expected an array, got list$"):
            operator(**operands | {name: [1.0]})


def test_both_vectors_of_a_norm_are_of_one_dtype() -> None:
    half = {name: jax.numpy.asarray(a, "bfloat16") for name, a in ({"x": X} | LAYER).items()}
    x = half.pop("x")
    for name in ("norm1_bias", "depthwise_bias", "norm2_bias"):
        layer = xla_ops.LayerParameters(**half | {name: half[name].astype("float32")})
        with pytest.raises(ValueError, match=f"^{name}: .* dtype bfloat16, got .* float32$"):
            xla_ops.layers(x, [layer], group=2)

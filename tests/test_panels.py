"""Kernels in panels: the operators that take them compute what they do with rows."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import xla_ops
from internimage_jax.model import InternImage
from tests import test_convolution, test_linear, test_mlp
from tests.layers import for_cuda, kernel_serves, mesh
from tests.support import SMALLEST
from tests.transforms import check_transforms
from xla_ops import _ffi, _targets, convolution, in_panels, linear, mlp, reads_panels
from xla_ops.panels import from_panels

# Whole panels and parts of one, one and several depths, few rows and many.
SHAPES = [
    ((4, 5, 3, 16), 24),
    ((2, 9, 13, 300), 290),
    ((1, 15, 15, 256), 64),
    ((1, 2, 3, 1024), 17),
    ((1, 8, 8, 600), 112),
    ((1, 1, 1, 1), 1),
    ((0, 2, 2, 8), 40),
]


def each_in_panels(arrays: list[jax.Array]) -> list[jax.Array]:
    """Operands whose kernels, the second and fourth, are in panels."""
    host = [np.asarray(a) for a in arrays]
    return [jax.device_put(in_panels(a) if i in (1, 3) else a) for i, a in enumerate(host)]


def cases(dtype: str) -> list[tuple[Callable[..., jax.Array], list[jax.Array]]]:
    """Operators with operands in rows."""
    return [
        *(
            (functools.partial(linear, gelu=gelu), test_linear.operands(*shape, dtype))
            for shape in SHAPES
            for gelu in (False, True)
        ),
        *((mlp, test_mlp.operands(*shape, dtype)) for shape in test_mlp.SHAPES),
        *(
            (convolution, test_convolution.operands((2, 9, 11, channels), outputs, dtype))
            for channels, outputs in ((5, 37), (16, 64), (80, 40))
        ),
    ]


@kernel_serves
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_same_bits_as_rows(dtype: str) -> None:
    for operator, arrays in cases(dtype):
        got = operator(*each_in_panels(arrays), implementation="kernel")
        wanted = operator(*arrays, implementation="kernel")
        shapes = str([a.shape for a in arrays])
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted), shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_jnp_form_takes_them_too(dtype: str) -> None:
    for operator, arrays in cases(dtype):
        got = operator(*each_in_panels(arrays), implementation="jnp")
        np.testing.assert_array_equal(got, operator(*arrays, implementation="jnp"))


@kernel_serves
def test_what_is_not_finite() -> None:
    x, kernel, bias = test_linear.operands((1, 9, 9, 96), 72, "float32")
    x = x.at[0, 3, 4, 2].set(jnp.nan).at[0, 8, 8, 95].set(jnp.inf)
    kernel = kernel.at[5, 40].set(-jnp.inf)
    got = linear(x, jnp.asarray(in_panels(kernel)), bias, implementation="kernel")
    np.testing.assert_array_equal(got, linear(x, kernel, bias, implementation="kernel"))


@kernel_serves
def test_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["xla_ops.mlp"], "_pays", lambda *_: True)
    product = each_in_panels(test_linear.operands(dtype="float32"))
    check_transforms(linear, product, _targets.LINEAR_FORWARD)
    check_transforms(mlp, each_in_panels(test_mlp.operands()), _targets.MLP_FORWARD, shared=4)
    one_kernel = test_mlp.operands()
    one_kernel[1] = jnp.asarray(in_panels(one_kernel[1]))
    check_transforms(mlp, one_kernel, _targets.MLP_FORWARD, shared=4)
    check_transforms(
        convolution, each_in_panels(test_convolution.operands()), _targets.CONVOLUTION_FORWARD
    )


@pytest.mark.parametrize("shape", [(16, 64), (3, 33), (1, 1), (3, 3, 5, 40)])
def test_there_and_back(shape: tuple[int, ...]) -> None:
    kernel = np.random.RandomState(0).standard_normal(shape).astype("float32")
    panels = in_panels(kernel)
    assert isinstance(panels, np.ndarray) and panels.flags.c_contiguous
    matrix = kernel.reshape(-1, shape[-1])
    assert panels.shape == (-(-shape[-1] // 32), len(matrix), 32)
    np.testing.assert_array_equal(panels, in_panels(jnp.asarray(kernel)))
    np.testing.assert_array_equal(from_panels(jnp.asarray(panels), shape[-1]), matrix)
    np.testing.assert_array_equal(panels[-1, :, 31], matrix[:, -1] if shape[-1] % 32 == 0 else 0)


def test_a_program_for_cuda_has_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))
    arrays = each_in_panels(test_linear.operands((1, 4, 4, 64), 64, "bfloat16"))
    text = for_cuda(functools.partial(linear, gelu=True), *arrays)
    assert "@internimage_linear_gelu_forward" not in text and "stablehlo.dot_general" in text
    with pytest.raises(ValueError, match="the kernel not in panels"):
        linear(*arrays, gelu=True, implementation="kernel")
    assert not reads_panels("cuda") and not reads_panels("cpu")


def test_what_does_not_fit_is_named() -> None:
    x, kernel, bias = test_linear.operands((1, 2, 2, 16), 40, "float32")
    panels = jnp.asarray(in_panels(kernel))
    for wrong in (panels[:1], panels[:, :8], panels[..., :16]):
        with pytest.raises(ValueError, match=r"kernel: .* \(16, K\), .* panels, .* got \("):
            linear(x, wrong, bias)
    with pytest.raises(ValueError, match=r"bias: expected shape \(K,\)"):
        linear(x, panels, bias[None])
    x, kernel, bias = test_convolution.operands()
    with pytest.raises(ValueError, match="bias: expected one beside a kernel in panels"):
        convolution(x, jnp.asarray(in_panels(kernel)), None)


@kernel_serves
def test_columns_that_fill_no_vector_are_rounded_alike() -> None:
    x, kernel, bias = test_linear.operands((1, 2, 8, 40), 64, "float32")
    whole = linear(x, kernel, bias, gelu=True, implementation="kernel")
    for columns in (1, 15, 17, 33, 63):
        part = linear(x, kernel[:, :columns], bias[:columns], gelu=True, implementation="kernel")
        np.testing.assert_array_equal(part, whole[..., :columns])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fused_model_has_them_where_one_cpu_has_its_parameters(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xla_ops, "reads_panels", lambda platform: platform == "cpu")
    model = InternImage(SMALLEST, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    fc1 = model.levels[1].blocks[0].mlp.fc1.kernel[...]
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(nnx.state(model))]

    def fused_fc1() -> nnx.Param:
        return model.fused().levels[1].blocks[0].mlp.fc1.kernel

    assert fused_fc1().dtype == dtype
    np.testing.assert_array_equal(fused_fc1()[...], in_panels(fc1))
    for path, value in nnx.to_flat_state(nnx.state(model.fused())):
        if value.ndim == 3 and path[-1] == "kernel":
            assert value[...].unsafe_buffer_pointer() not in pointers, path
    nnx.update(model, jax.tree.map(np.asarray, nnx.state(model)))
    np.testing.assert_array_equal(fused_fc1()[...], in_panels(fc1))
    everywhere = NamedSharding(mesh(), P())
    nnx.update(model, jax.device_put(nnx.state(model), everywhere))
    np.testing.assert_array_equal(fused_fc1()[...], fc1)

"""The layers besides DCNv3 on CUDA, without a GPU: kernels on the host, and lowered programs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xla_ops
from internimage_jax.config import InternImageConfig
from internimage_jax.model import InternImage
from tests.native import cuda_program, needs_compiler, run
from xla_ops import _ffi, _targets

N, H, W, C, K = 4, 5, 6, 16, 3


@needs_compiler
def test_random_shapes_agree_with_the_definition() -> None:
    assert "40 shapes" in run(cuda_program("fuzz_layers_cuda.cc"), "40")


def operands(dtype: str = "bfloat16") -> list[jax.Array]:
    shapes = (N, H, W, C), (K, K, C), (C,), (C,), (C,)
    return [jnp.zeros(shape, dtype) for shape in shapes]


def gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    def loss(x: jax.Array, kernel: jax.Array, *vectors: jax.Array) -> jax.Array:
        y = xla_ops.dwconv_norm_gelu(x, kernel, *vectors)
        return xla_ops.bias_gelu(y, vectors[0]).astype("float32").sum()

    return jax.grad(loss, (0, 1, 2, 3, 4))(*arrays)


# What CUDA has no kernels of.
OF_CPU = {
    *(_targets.CONVOLUTION_FORWARD, _targets.CONVOLUTION_BACKWARD, _targets.LINEAR_BACKWARD),
    *(_targets.NORM_BACKWARD, _targets.ADD_NORM_BACKWARD),
}


@pytest.fixture
def cuda_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    of_cpu = {*OF_CPU, _targets.LINEAR_FORWARD}  # a GPU of before compute capability 9.0
    serving = lambda target: ("cpu",) if target in of_cpu else ("cpu", "cuda")  # noqa: E731
    monkeypatch.setattr(_ffi, "serving", serving)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_program_for_cuda_has_the_custom_calls(dtype: str, cuda_serves: None) -> None:
    traced = jax.jit(gradients).trace(*operands(dtype))
    lines = [
        line
        for line in traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
        if "custom_call @internimage" in line
    ]
    assert {re.search(r"@internimage_(\w+)", line)[1] for line in lines} == {
        "dwconv_norm_gelu_forward",
        "dwconv_norm_gelu_backward",
        "bias_gelu_backward",
    }
    (backward,) = (line for line in lines if "dwconv_norm_gelu_backward" in line)
    given = re.findall(r"tensor<([^>]*)>", backward.rpartition("->")[2])
    short = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    # dx; a part of the parameters' gradients for each row; v's gradient, to work in
    assert given == [f"4x5x6x16x{short}", f"4x{H}x{3 + K * K}x16xf32", "4x5x6x16xf32"]


def test_a_sharded_batch_divides_each_result(cuda_serves: None) -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, *parameters = operands()
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    parameters = [jax.device_put(a, NamedSharding(mesh, P())) for a in parameters]
    traced = jax.jit(gradients).trace(x, *parameters)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    rules = [r for r in re.findall(r"op_sharding_rule<\((.*?)\) \{", text) if r.count("->") == 1]
    (backward,) = (r for r in rules if r.partition("->")[2].count("[") == 3)
    results = re.findall(r"\[(\w)", backward.partition("->")[2])
    assert results == ["i"] * 3  # the batch's axis comes first in all three


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of small maps are kernels on CUDA too."""
    monkeypatch.setattr(importlib.import_module("xla_ops.layer_norm"), "FEWEST_ON_CUDA", 0)


def test_norms_of_small_maps_are_those_of_xla_on_cuda(cuda_serves: None) -> None:
    for side, taken in ((64, True), (32, False)):
        x = jax.ShapeDtypeStruct((1, side, side, 256), "bfloat16")
        vector = jax.ShapeDtypeStruct((256,), "bfloat16")
        traced = jax.jit(xla_ops.layer_norm).trace(x, vector, vector)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert ("@internimage_layer_norm_forward" in text) == taken


@pytest.mark.parametrize("vectors", ["bfloat16", "float32"])
def test_layer_norm_is_a_custom_call_outside_differentiation(
    vectors: str, cuda_serves: None, of_any_size: None
) -> None:
    x, *_, scale, bias = operands()
    arrays = x, scale.astype(vectors), bias.astype(vectors)

    def program(function: Callable[..., Any]) -> str:
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()

    text = program(xla_ops.layer_norm)
    (line,) = (line for line in text.splitlines() if "@internimage_layer_norm_forward" in line)
    short = {"bfloat16": "bf16", "float32": "f32"}[vectors]
    vector, row = f"tensor<16x{short}>", "tensor<4x5x6x16xbf16>"
    assert f"({row}, {vector}, {vector}) -> {row}" in line
    assert "epsilon = " in line and "version = 4" in line
    assert "stablehlo.convert" not in text
    loss = lambda *a: xla_ops.layer_norm(*a).astype("float32").sum()  # noqa: E731
    assert "@internimage" not in program(jax.grad(loss, (0, 1, 2)))
    text = program(lambda x, *vectors: xla_ops.add_norm(x, x, *vectors))
    (line,) = (line for line in text.splitlines() if "@internimage_add_norm_forward" in line)
    assert f"({row}, {row}, {vector}, {vector}) -> ({row}, {row})" in line
    assert "stablehlo.add" not in text and "stablehlo.convert" not in text
    text = program(lambda x, *vectors: xla_ops.norm_add(x, x, *vectors))
    (line,) = (line for line in text.splitlines() if "@internimage_norm_add_forward" in line)
    assert f"({row}, {row}, {vector}, {vector}) -> {row}" in line
    assert "stablehlo.add" not in text and "stablehlo.convert" not in text
    loss = lambda x, *vectors: sum(  # noqa: E731
        y.astype("float32").sum() for y in xla_ops.add_norm(x, x, *vectors)
    )
    assert "@internimage" not in program(jax.grad(loss, (0, 1, 2)))


def model_for_cuda(batch: int) -> str:
    """The program of a small bfloat16 model, before XLA compiles it."""
    config = InternImageConfig(channels=16, depths=(1,) * 4, groups=(1, 2, 4, 8), num_classes=3)
    model = InternImage(config, dtype="bfloat16", param_dtype="bfloat16")
    graphdef, state = nnx.split(nnx.eval_shape(InternImage.fused, model))
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), "bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes dtypes
        traced = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).trace(state, images)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("batch", "convolutions"), [(2, 0), (128, 1), (512, 3)])
def test_small_convolutions_are_products(batch: int, convolutions: int, cuda_serves: None) -> None:
    assert model_for_cuda(batch).count("stablehlo.convolution(") == convolutions


def test_operators_take_half_precision_parameters_as_they_are(
    cuda_serves: None, of_any_size: None
) -> None:
    calls = [line for line in model_for_cuda(1).splitlines() if "@internimage_" in line]
    # Norms of one shape are one function; additions are two, since nobody reads a level's last sum.
    assert len(calls) == 4 * (3 + 2) + 5 + 1
    assert not [call for call in calls if "xf32>" in call]  # each conversion would be a launch


def test_extension_has_every_target() -> None:
    extension = pytest.importorskip("xla_ops._cuda", reason="xla_ops._cuda is not built")
    cpu = pytest.importorskip("xla_ops._cpu", reason="xla_ops._cpu is not built")
    of_cuda = {_targets.LINEAR_GELU_FORWARD, _targets.LAYERS_FORWARD}
    assert set(extension.targets()) == {*cpu.targets(), *of_cuda} - OF_CPU


def test_a_kernel_can_serve_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xla_ops._cuda", reason="xla_ops._cuda is not built")
    monkeypatch.setattr(_ffi, "_untried", {})
    try:
        _ffi.serve_untried("cuda")
        assert _ffi.serving(_targets.DCNV3_FORWARD)[-1] == "cuda"
        assert xla_ops.status()["cuda"].detail.startswith("not tried; built for sm_")
        _ffi.serve_untried("cuda", frozenset([_targets.MLP_FORWARD]))
        assert "cuda" not in _ffi.serving(_targets.MLP_FORWARD)
        assert _ffi.serving(_targets.DCNV3_FORWARD)[-1] == "cuda"
    finally:
        _ffi._load_once.cache_clear()

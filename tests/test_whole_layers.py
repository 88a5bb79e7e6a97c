"""Whole layers as one operator: what it is made of, where it is one call, and its errors.

tests/test_whole_layers_gpu.py has the values of the call.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import xla_ops
from internimage_jax.common import Context
from internimage_jax.config import InternImageConfig
from internimage_jax.layers import InternImageLayer
from internimage_jax.model import InternImage
from tests.layers import assert_close, for_cuda, mesh
from xla_ops import LayerParameters, _ffi, layers
from xla_ops.layers import _shapes

module = importlib.import_module("xla_ops.layers")  # as a name of the package it is the operator

CALL = "@internimage_layers_forward"
CONFIG = InternImageConfig(channels=16, depths=(2, 1, 2, 1), groups=(1, 2, 2, 4), num_classes=8)
AFTER = dataclasses.replace(CONFIG, post_norm=True, layer_scale=0.5)


def operands(
    shape: tuple[int, ...] = (4, 5, 3, 16),
    group: int = 2,
    hidden: int = 32,
    dtype: str = "float32",
    vectors: str | None = None,
    count: int = 2,
) -> tuple[jax.Array, list[LayerParameters]]:
    """x, and parameters of so many layers, of which each counts."""
    normal = np.random.RandomState(0).standard_normal
    parameters = []
    for _ in range(count):
        own = {}
        for name, size in _shapes(shape[-1], group, 3, hidden).items():
            value = normal(size) / 2
            if "scale" in name:
                value = 1 + value / 4
            product = name.endswith("kernel") and len(size) == 2
            if product:
                value *= 2 / np.sqrt(size[0])
            own[name] = jnp.asarray(value, dtype if product else vectors or dtype)
        parameters.append(LayerParameters(**own))
    return jnp.asarray(normal(shape), dtype), parameters


def with_values(config: InternImageConfig) -> InternImageLayer:
    """The layer of a model, with random values and what `fuse` makes of them."""
    own = InternImageLayer(Context(config, jnp.float32, jnp.float32, "gather"), 16, 2)
    normal = np.random.RandomState(1).standard_normal
    values = jax.tree.map(lambda a: jnp.asarray(normal(a.shape) / 2, a.dtype), nnx.state(own))
    nnx.update(own, values)
    own.fuse()
    return own


@pytest.mark.parametrize("config", [CONFIG, AFTER], ids=["before", "after"])
def test_are_the_layers_of_a_model(config: InternImageConfig) -> None:
    own = with_values(config)
    x, _ = operands()
    wanted = x
    for _ in range(2):
        wanted, _ = own(wanted)
    parameters = [own._parameters(x)] * 2
    assert_close(layers(x, parameters, group=2, post_norm=config.post_norm), wanted, 1e-6)


def test_differentiates_by_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))
    monkeypatch.setattr(module, "MOST_NUMBERS", 1 << 19)
    x, parameters = operands(dtype="bfloat16")
    run = functools.partial(layers, group=2)

    def gradients(implementation: str | None, *arrays: Any) -> Any:
        loss = lambda *a: run(*a, implementation=implementation).astype("float32").sum()  # noqa: E731
        return jax.grad(loss, (0, 1))(*arrays)

    assert CALL in for_cuda(run, x, parameters)
    assert CALL not in for_cuda(functools.partial(gradients, "kernel"), x, parameters)
    wanted = jax.jit(functools.partial(gradients, "jnp"))(x, parameters)
    got = jax.jit(functools.partial(gradients, None))(x, parameters)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_close(a.astype("float32"), b.astype("float32"), 0.05)


def test_a_program_for_cuda_has_it_where_it_serves_and_pays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))

    def has_it(*sizes: Any, implementation: str | None = None, **settings: Any) -> bool:
        x, parameters = jax.eval_shape(lambda: operands(*sizes, **settings))
        run = functools.partial(layers, group=sizes[1], implementation=implementation)
        return CALL in for_cuda(run, x, parameters)

    half: dict[str, Any] = {"dtype": "bfloat16"}
    assert not has_it((1, 8, 8, 64), 4, 256, **half)  # until a GPU has timed it
    assert has_it((1, 8, 8, 64), 4, 256, implementation="kernel", **half)
    monkeypatch.setattr(module, "MOST_NUMBERS", 64 * 64)
    assert has_it((1, 8, 8, 64), 4, 256, **half) and has_it((1, 8, 8, 64), 4, 256, dtype="float16")
    assert has_it((1, 8, 8, 64), 4, 256, vectors="float32", **half)
    assert not has_it((1, 13, 5, 64), 4, 256, **half)  # a pixel too many
    assert not has_it((1, 8, 8, 64), 4, 256)  # float32
    assert not has_it((1, 7, 8, 72), 9, 256, **half)  # not in sixteens
    assert not has_it((1, 8, 8, 64), 16, 256, **half)  # four channels a group
    assert not has_it((1, 8, 8, 64), 4, 1032 + 1024, **half)
    monkeypatch.setattr(_ffi, "serving", lambda target: ())
    assert not has_it((1, 8, 8, 64), 4, 256, **half)


@pytest.mark.parametrize("config", [CONFIG, AFTER], ids=["before", "after"])
def test_a_fused_model_of_half_precision_has_it(
    config: InternImageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))
    monkeypatch.setattr(xla_ops, "reads_panels", lambda platform: False)
    monkeypatch.setattr(module, "MOST_NUMBERS", 1 << 19)

    def program(
        dtype: str,
        *,
        parameters: str | None = None,
        fused: bool = True,
        **settings: Any,
    ) -> str:
        kind = {"dtype": dtype, "param_dtype": parameters or dtype, "rngs": nnx.Rngs(0)}
        model = InternImage(dataclasses.replace(config, **settings), **kind)
        model = model.fused() if fused else model
        images = jnp.zeros((1, 32, 32, 3), dtype)
        return for_cuda(lambda model, images: model(images), model, images)

    text = program("bfloat16")
    assert CALL in text and "@internimage_dcnv3" not in text and "@internimage_dwconv" not in text
    if config is AFTER:
        return
    for other in (
        program("float32"),
        program("bfloat16", parameters="float32"),
        program("bfloat16", fused=False),
        program("bfloat16", layer_scale=0.5),
        program("bfloat16", center_feature_scale=True),
        program("bfloat16", act_layer="SiLU"),
        program("bfloat16", norm_layer="BN"),
    ):
        assert CALL not in other and "@internimage_dcnv3" in other


def test_a_batch_that_is_sharded_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))
    x, parameters = operands(dtype="bfloat16")
    x = jax.device_put(x, NamedSharding(mesh(), P("data")))
    parameters = jax.device_put(parameters, NamedSharding(mesh(), P()))
    text = for_cuda(functools.partial(layers, group=2, implementation="kernel"), x, parameters)
    (rule,) = re.findall(r"op_sharding_rule<\((.*?)\) \{", text)
    operand, *others = re.findall(r"\[([^\]]*)\]", rule)
    *shared, y, scratch = others
    batch = operand.split(", ")[0]
    assert len(shared) == 2 * len(LayerParameters._fields)
    assert y.split(", ")[0] == scratch.split(", ")[0] == batch
    assert all(batch not in axes.split(", ") for axes in shared)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", jnp.zeros((2, 3, 16)), r"x: expected shape \(N, H, W, C\)"),
        ("x", jnp.zeros((1, 2, 0, 16)), "x: .* a map not empty"),
        ("x", jnp.zeros((1, 2, 2, 16), int), "x: expected one of float32"),
        ("group", 3, "group: expected an integer that divides 16, got 3"),
        ("epsilon", -1.0, "epsilon: expected a number of at least 0"),
        (
            "depthwise_kernel",
            jnp.zeros((2, 2, 16)),
            r"depthwise_kernel: .* K odd, got \(2, 2, 16\)",
        ),
        (
            "depthwise_kernel",
            jnp.zeros((3, 3, 8)),
            r"depthwise_kernel: .* K odd, got \(3, 3, 8\)",
        ),
        ("depthwise_kernel", jnp.zeros((3, 3, 16), int), "depthwise_kernel: .* got .* int32"),
        ("depthwise_bias", jnp.zeros(16, "bfloat16"), "depthwise_bias: .* and bfloat16"),
        ("norm1_scale", jnp.zeros(8), r"norm1_scale: expected shape \(16,\)"),
        ("record_kernel", jnp.zeros((16, 54)), r"record_kernel: expected shape \(16, 56\)"),
        ("fc1_kernel", jnp.zeros((32, 16)), r"fc1_kernel: expected shape \(16, 32\)"),
        ("fc2_kernel", jnp.zeros((32, 16), "bfloat16"), "fc2_kernel: .* dtype float32, got"),
        ("parameters", [], "parameters: expected those of one layer at least, got none"),
        ("implementation", "gather", "expected 'kernel', 'jnp' or None, got 'gather'"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, message: str) -> None:
    x, parameters = operands()
    arguments: dict[str, Any] = {"x": x, "parameters": parameters, "group": 2}
    if name in LayerParameters._fields:
        changed = [layer._replace(**{name: value}) for layer in parameters]
        # Of all layers, or of one that is not like the first.
        arguments["parameters"] = changed if "K odd" in message else [parameters[0], changed[1]]
    else:
        arguments[name] = value
    with pytest.raises(ValueError, match=message):
        layers(**arguments)


def test_a_kernel_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ())
    with pytest.raises(ValueError, match="no 'kernel' to serve here"):
        layers(*operands(), group=2, implementation="kernel")
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))
    with pytest.raises(ValueError, match=r"no 'kernel' to serve here \(on CUDA, from compute cap"):
        layers(*operands(), group=2, implementation="kernel")

"""Programs for CUDA, lowered on a machine without a GPU: the custom call that a GPU would get."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xla_ops
from xla_ops import _ffi, _targets
from xla_ops.dcnv3_kernel import scratch

GROUP, DEPTH, POINTS = 2, 16, 9
RECORD = xla_ops.Record(GROUP, POINTS).width
FORMS = ("separate", "fused")


@pytest.fixture(autouse=True)
def cuda_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    # Asked in one place, and the answer is part of what a traced call is kept by.
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cpu", "cuda"))


def operands(form: str, *leading: int, dtype: str = "bfloat16") -> list[jax.Array]:
    widths = {"separate": (GROUP * POINTS * 2, GROUP * POINTS), "fused": (RECORD,)}[form]
    return [jnp.zeros((*leading, 5, 6, w), dtype) for w in (GROUP * DEPTH, *widths)]


def operator(form: str) -> Callable[..., jax.Array]:
    function = xla_ops.dcnv3 if form == "separate" else xla_ops.dcnv3_fused
    return functools.partial(function, group=GROUP, dilation=2, pad=2, offset_scale=2.0)


def gradient(function: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    def gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        loss = lambda *a: function(*a).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss, tuple(range(len(arrays))))(*arrays)

    return gradients


def calls(function: Callable, *arrays: jax.Array, platforms: tuple[str, ...] = ("cuda",)) -> list:
    """The custom calls of a lowered program: target, attributes, types of operands and results."""
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=platforms).as_text()
    assert "stablehlo.gather" not in text or len(platforms) > 1
    lines = [line for line in text.splitlines() if "custom_call @internimage" in line]
    found = []
    for line in lines:
        types = re.search(r" : \((.*)\) -> (.*)$", line)
        each = [re.findall(r"tensor<([^>]*)>", part) for part in types.groups()]
        found.append((re.search(r"@(\w+)", line)[1], line, *each))
    return found


FORWARD = {"separate": _targets.DCNV3_FORWARD, "fused": _targets.DCNV3_FUSED_FORWARD}
BACKWARD = {"separate": _targets.DCNV3_BACKWARD, "fused": _targets.DCNV3_FUSED_BACKWARD}
TARGETS = (*FORWARD.values(), *BACKWARD.values())
GEOMETRY = f"geometry = dense<[3, 3, 1, 1, 2, 2, 2, 2, {GROUP}, 0, {_targets.VERSION}]>"


@pytest.mark.parametrize("form", FORMS)
def test_forward_is_one_call_with_its_attributes(form: str) -> None:
    ((target, line, taken, given),) = calls(operator(form), *operands(form, 3))
    assert target == FORWARD[form]
    widths = {"separate": (32, 36, 18), "fused": (32, RECORD)}[form]
    assert taken == [f"3x5x6x{width}xbf16" for width in widths]
    assert given == ["3x5x6x32xbf16"]
    assert GEOMETRY in line and "offset_scale = 2.000000e+00 : f64" in line
    assert ("center_feature_scale = false" in line) == (form == "fused")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_one_call_with_scratch(form: str, dtype: str) -> None:
    kind = {"float32": "f32", "float16": "f16"}[dtype]
    arrays = operands(form, 3, dtype=dtype)
    ((target, line, taken, given),) = calls(gradient(operator(form)), *arrays)
    assert target == BACKWARD[form]
    like = ["x".join(map(str, a.shape)) + f"x{kind}" for a in arrays]
    assert taken == [*like, f"3x5x6x32x{kind}"]
    assert given == [*like, "3x1x1x1xui32"]
    assert GEOMETRY in line


@pytest.mark.parametrize(
    ("size", "dtype", "small"),
    [
        ((64, 95), "float32", True),  # 2^16 terms of a sum are too many
        ((64, 103), "float32", False),
        ((96, 128), "bfloat16", True),  # 48 KiB
        ((96, 129), "bfloat16", False),
        ((4, 4), "float64", False),
    ],
)
def test_scratch_is_there_for_maps_that_do_not_fit_shared_memory(
    size: tuple[int, int], dtype: str, small: bool
) -> None:
    x = jax.ShapeDtypeStruct((2, *size, 32), jnp.dtype(dtype))
    whole = (2, 1, size[0] * size[1] + 1, 64)  # the pixels and the bounds, 64 bits a channel
    assert scratch(x, x, 9)[0] == ((2, 1, 1, 1) if small else whole)


def test_vmap_adds_an_axis_to_the_one_call() -> None:
    arrays = operands("separate", 4, 3)
    ((_, _, taken, given),) = calls(gradient(jax.vmap(operator("separate"))), *arrays)
    assert [t.split("x")[:2] for t in (*taken, *given)] == [["4", "3"]] * 8


@pytest.mark.parametrize("form", FORMS)
def test_shard_map_calls_it_on_each_device_for_its_part(form: str) -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    arrays = operands(form, 4)
    specs = tuple([P("data")] * len(arrays))
    local = jax.shard_map(gradient(operator(form)), mesh=mesh, in_specs=specs, out_specs=specs)
    ((_, _, taken, given),) = calls(local, *arrays)
    assert {t.split("x")[0] for t in (*taken, *given)} == {"2"}


@pytest.mark.parametrize("form", FORMS)
def test_jit_over_a_sharded_batch_may_divide_each_result(form: str) -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    arrays = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in operands(form, 4)]
    lowered = jax.jit(gradient(operator(form))).trace(*arrays).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "internimage" not in text  # the partitioner asks for the call of one device's part
    (rule,) = re.findall(r"op_sharding_rule<\((.*?)\) \{", text)
    first = [axes.split(",")[0].strip("[") for axes in re.findall(r"\[.*?\]", rule)]
    assert len(first) == 2 * len(arrays) + 2 and set(first) == {"i"}  # the scratch among them


def test_one_program_for_both_platforms_has_the_call_of_each() -> None:
    arrays = operands("fused", 1)
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]
    function = jax.jit(gradient(operator("fused")))
    exported = jax.export.export(function, platforms=["cpu", "cuda"], disabled_checks=checks)
    text = exported(*arrays).mlir_module()
    lines = [line for line in text.splitlines() if "custom_call @internimage" in line]
    assert sorted("ui32" in line for line in lines) == [False, True]


def test_what_serves_is_asked_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = operands("separate", 2)
    assert calls(operator("separate"), *arrays)
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cpu",))
    lowered = jax.jit(operator("separate")).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "internimage" not in lowered.as_text()


def test_extension_names_what_it_was_built_for() -> None:
    extension = pytest.importorskip("xla_ops._cuda", reason="xla_ops._cuda is not built")
    assert re.fullmatch(r"(sm_\d+a? ?)+", extension.instruction_set())
    assert extension.version == _targets.VERSION
    assert set(extension.targets()) >= set(TARGETS)

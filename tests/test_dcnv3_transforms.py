"""JAX's transforms pass through the kernel and give what the jnp form gives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xla_ops
from tests.layers import needs_kernel

GROUP, DEPTH, POINTS = 2, 4, 9
FORMS = ("separate", "fused")

pytestmark = needs_kernel


def operands(form: str, *, leading: tuple[int, ...] = (2,), seed: int = 0) -> tuple[jax.Array, ...]:
    random = np.random.RandomState(seed)
    normal = lambda width: random.standard_normal((*leading, 5, 6, width)).astype(np.float32)  # noqa: E731
    x = normal(GROUP * DEPTH)
    if form == "fused":
        return jnp.asarray(x), jnp.asarray(normal(xla_ops.Record(GROUP, POINTS).width))
    mask = np.abs(normal(GROUP * POINTS)) / POINTS
    return jnp.asarray(x), jnp.asarray(normal(GROUP * POINTS * 2)), jnp.asarray(mask)


def operator(form: str, implementation: str | None) -> Callable[..., jax.Array]:
    if form == "fused":
        function = functools.partial(xla_ops.dcnv3_fused, center_feature_scale=True)
    else:
        function = xla_ops.dcnv3
    return functools.partial(function, group=GROUP, implementation=implementation)


def gradient(function: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    def gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        loss = lambda *a: jnp.sum(jnp.sin(function(*a)))  # noqa: E731
        return jax.grad(loss, tuple(range(len(arrays))))(*arrays)

    return gradients


def three_times(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def scanned(x: jax.Array, *points: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (function(carry, *points), None), x, length=3)[0]

    return scanned


def expected(form: str, transform: Callable, *arrays: jax.Array) -> object:
    return jax.jit(transform(operator(form, "gather")))(*arrays)  # one program, not an op at a time


def assert_close(got: object, expected: object) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        gradient,
        lambda f: jax.jit(gradient(jax.checkpoint(f))),
        lambda f: jax.jit(gradient(three_times(f))),
    ],
    ids=["eager", "grad", "jit-remat", "jit-scan"],
)
def test_transform_gives_what_the_gather_form_gives(form: str, transform: Callable) -> None:
    arrays = operands(form)
    assert_close(transform(operator(form, "kernel"))(*arrays), expected(form, transform, *arrays))


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_any_axis_and_over_some_operands(form: str) -> None:
    kernel = operator(form, "kernel")
    x, *points = operands(form, leading=(3, 2))
    whole = lambda f: gradient(jax.vmap(f))  # noqa: E731
    assert_close(jax.jit(whole(kernel))(x, *points), expected(form, whole, x, *points))
    each = lambda f: jax.vmap(gradient(f))  # noqa: E731
    assert_close(jax.jit(each(kernel))(x, *points), expected(form, each, x, *points))
    one, x_last = [a[0] for a in points], jnp.moveaxis(x, 0, 1)
    only_x = lambda f: gradient(jax.vmap(f, (1, *[None] * len(one)), 2))  # noqa: E731
    assert_close(jax.jit(only_x(kernel))(x_last, *one), expected(form, only_x, x_last, *one))


def test_vmap_of_vmap() -> None:
    arrays = operands("separate", leading=(2, 3, 1))
    twice = lambda f: jax.vmap(jax.vmap(f))  # noqa: E731
    kernel = jax.jit(twice(operator("separate", "kernel")))
    assert_close(kernel(*arrays), expected("separate", twice, *arrays))


@functools.cache
def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("data",), axis_types=(kind,))


def sharded(
    arrays: tuple[jax.Array, ...], spec: P, kind: AxisType = AxisType.Auto
) -> list[jax.Array]:
    return [jax.device_put(a, NamedSharding(mesh(kind), spec)) for a in arrays]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("implementation", ["kernel", None])
@pytest.mark.parametrize("form", FORMS)
def test_jit_over_a_sharded_batch_moves_nothing(
    form: str, implementation: str | None, kind: AxisType
) -> None:
    arrays = operands(form)
    local = sharded(arrays, P("data"), kind)
    both = lambda f: lambda *a: (f(*a), gradient(f)(*a))  # noqa: E731
    with jax.set_mesh(mesh(kind)):
        compiled = jax.jit(both(operator(form, implementation))).lower(*local).compile()
        got = compiled(*local)
    text = compiled.as_text()
    assert "internimage_dcnv3" in text
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in text
    assert got[0].sharding.is_equivalent_to(local[0].sharding, 4)
    assert_close(got, expected(form, both, *arrays))


@pytest.mark.parametrize("spec", [P(None, "data"), P("data")], ids=["inner", "mapped"])
def test_vmap_over_sharded_operands_moves_nothing(spec: P) -> None:
    arrays = operands("separate", leading=(2, 2))
    local = sharded(arrays, spec)
    kernel = jax.jit(jax.vmap(operator("separate", "kernel"))).lower(*local).compile()
    assert "all-gather" not in kernel.as_text()
    assert_close(kernel(*local), expected("separate", jax.vmap, *arrays))


def test_operands_sharded_in_other_ways_still_give_the_right_answer() -> None:
    arrays = operands("separate")
    gather = expected("separate", gradient, *arrays)
    kernel = jax.jit(gradient(operator("separate", "kernel")))
    assert_close(kernel(*sharded(arrays, P(None, None, "data"))), gather)
    assert_close(kernel(*sharded(arrays, P(None, None, None, "data"))), gather)
    assert_close(kernel(*sharded(arrays[:1], P("data")), *arrays[1:]), gather)


def over_devices(function: Callable, *specs: P, out: object) -> Callable:
    return jax.shard_map(function, mesh=mesh(), in_specs=specs, out_specs=out)  # its checks are on


@pytest.mark.parametrize("form", FORMS)
def test_shard_map_with_its_checks(form: str) -> None:
    arrays = operands(form)
    kernel = operator(form, None)  # traces both the kernel and the jnp form
    specs = [P("data")] * len(arrays)
    outside = lambda f: gradient(over_devices(f, *specs, out=P("data")))  # noqa: E731
    assert_close(jax.jit(outside(kernel))(*arrays), expected(form, gradient, *arrays))
    looped = lambda f: gradient(three_times(f))  # noqa: E731
    inside = over_devices(looped(kernel), *specs, out=tuple(specs))
    assert_close(jax.jit(inside)(*arrays), expected(form, looped, *arrays))


def test_shard_map_sums_the_gradient_of_what_all_devices_share() -> None:
    x, *points = operands("separate")
    one = [a[:1] for a in points]
    specs = (P("data"), P(), P())
    kernel = over_devices(gradient(operator("separate", "kernel")), *specs, out=specs)
    shared = lambda f: gradient(lambda x, *a: f(x, *(jnp.repeat(b, 2, 0) for b in a)))  # noqa: E731
    assert_close(jax.jit(kernel)(x, *one), expected("separate", shared, x, *one))


@pytest.mark.parametrize("form", FORMS)
def test_pmap(form: str) -> None:
    arrays = operands(form, leading=(2, 1))
    each = lambda f: jax.vmap(gradient(f))  # noqa: E731
    kernel = jax.pmap(gradient(operator(form, "kernel")))
    assert_close(kernel(*arrays), expected(form, each, *arrays))


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_is_refused_with_what_to_use(form: str) -> None:
    arrays = operands(form)
    with pytest.raises(ValueError, match=r"no forward mode .* use 'gather'"):
        jax.jvp(operator(form, None), arrays, arrays)
    gather = operator(form, "gather")
    jax.jit(lambda *a: jax.jvp(gather, a, a))(*arrays)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_are_those_of_the_gather_form(form: str) -> None:
    arrays = operands(form)

    def second(implementation: str | None) -> Callable:
        squares = lambda *a: (operator(form, implementation)(*a) ** 2).sum()  # noqa: E731
        return jax.grad(lambda *a: (jax.grad(squares)(*a) ** 2).sum())

    got, wanted = (jax.jit(second(form))(*arrays) for form in (None, "gather"))
    assert_close(got, wanted)


def test_lowering_for_another_platform_takes_the_gather_form() -> None:
    arrays = operands("separate")
    lower = lambda f: jax.jit(f).trace(*arrays).lower(lowering_platforms=("tpu",))  # noqa: E731
    assert "internimage" not in lower(operator("separate", None)).as_text()
    with pytest.raises(NotImplementedError, match="platform tpu"):  # by JAX, which names it
        lower(operator("separate", "kernel"))


def test_export_needs_the_gather_form_or_the_targets_named() -> None:
    arrays = operands("separate")
    export, check = jax.export.export, jax.export.DisabledSafetyCheck
    both = ("cpu", "tpu")
    gather = export(jax.jit(operator("separate", "gather")), platforms=both)(*arrays)
    plain = gather.call(*arrays)
    with pytest.raises(ValueError, match="internimage_dcnv3_forward"):
        export(jax.jit(operator("separate", None)))(*arrays)
    allowed = [check.custom_call("internimage_dcnv3_forward")]
    kernel = export(jax.jit(operator("separate", None)), platforms=both, disabled_checks=allowed)
    assert_close(kernel(*arrays).call(*arrays), plain)

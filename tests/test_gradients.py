"""Gradients of products, norms and GELU by a CPU's kernels, against float64 and the jnp forms."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import test_bias_gelu, test_convolution, test_layer_norm, test_linear
from tests.layers import TOLERANCE, assert_close, for_cuda, kernel_serves, mesh, needs_kernel
from xla_ops import (
    _targets,
    add_norm,
    bias_gelu,
    convolution,
    in_panels,
    layer_norm,
    linear,
    norm_add,
)

NORMS = {"layer_norm": layer_norm, "add_norm": add_norm, "norm_add": norm_add}


def norm_operands(name: str, *arguments: object) -> list[jax.Array]:
    of_add = test_layer_norm.operands_of_add
    return (test_layer_norm.operands if name == "layer_norm" else of_add)(*arguments)  # type: ignore[arg-type]


def gradients(operator: Callable, *arrays: jax.Array, slopes: str = "sin") -> list[jax.Array]:
    """Of a sum of the results, each times a slope, by all operands."""

    def pullback(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        results, back = jax.vjp(operator, *arrays)
        like = getattr(jnp, slopes)
        slope = lambda y: like(jnp.arange(y.size, dtype="float32")).reshape(y.shape)  # noqa: E731
        return back(jax.tree.map(lambda y: slope(y).astype(y.dtype), results))

    return list(jax.jit(pullback)(*arrays))


def in_float64(operator: Callable, *arrays: jax.Array) -> list[np.ndarray]:
    """Those of the jnp form; of slopes as the operands' dtype rounds them."""
    dtype = arrays[0].dtype

    def rounded(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        results, back = jax.vjp(functools.partial(operator, implementation="jnp"), *arrays)
        slope = lambda y: jnp.sin(jnp.arange(y.size, dtype="float32")).reshape(y.shape)  # noqa: E731
        return back(jax.tree.map(lambda y: slope(y).astype(dtype).astype(y.dtype), results))

    return list(map(np.asarray, jax.jit(rounded)(*(a.astype("float64") for a in arrays))))


# Of products: more inputs than outputs and fewer, several tiles and depths, none full, pixels in no
# pairs. Of convolutions odd sides and even ones. No images and no pixels.
PRODUCTS = [
    ((4, 5, 3, 16), 24),
    ((2, 9, 13, 300), 290),
    ((1, 15, 15, 256), 64),
    ((3, 19, 9, 17), 33),
]
PRODUCTS += [((1, 1, 1, 1), 1), ((0, 2, 2, 8), 40), ((2, 0, 3, 40), 8)]
CONVOLUTIONS = [((2, 9, 13, 3), 8), ((1, 8, 6, 40), 70), ((3, 32, 31, 9), 33), ((3, 1, 1, 5), 7)]
CONVOLUTIONS += [((0, 4, 4, 3), 8)]


@kernel_serves
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("operator", "operands", "shapes"),
    [
        pytest.param(linear, test_linear.operands, PRODUCTS, id="product"),
        pytest.param(convolution, test_convolution.operands, CONVOLUTIONS, id="convolution"),
    ],
)
def test_of_a_product(operator: Callable, operands: Callable, shapes: list, dtype: str) -> None:
    for shape, outputs in shapes:
        with jax.enable_x64(True):
            arrays = operands(shape, outputs, dtype)
            got = gradients(functools.partial(operator, implementation="kernel"), *arrays)
            assert [g.dtype for g in got] == [dtype] * 3
            assert_close(got, in_float64(operator, *arrays), 4 * TOLERANCE[dtype])


@kernel_serves
def test_of_a_product_whose_bias_is_float32() -> None:
    x, kernel, bias = test_linear.operands()
    got = gradients(linear, x, kernel, bias.astype("float32"))
    assert [g.dtype for g in got] == ["bfloat16", "bfloat16", "float32"]
    with jax.enable_x64(True):
        assert_close(got[2], in_float64(linear, x, kernel, bias)[2], 1e-5)


@kernel_serves
@pytest.mark.parametrize("gelu", [False, True])
def test_of_a_product_in_panels(gelu: bool) -> None:
    x, kernel, bias = test_linear.operands(dtype="float32")
    run = functools.partial(linear, gelu=gelu)
    dx, dkernel, dbias = gradients(run, x, kernel, bias)
    assert_close(gradients(run, x, in_panels(kernel), bias), [dx, in_panels(dkernel), dbias], 2e-6)


@needs_kernel
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_of_a_norm(dtype: str, name: str) -> None:
    operator = functools.partial(NORMS[name], epsilon=1e-3)
    for shape in (*test_layer_norm.SHAPES, (1, 17, 11, 40)):
        if shape[-1] == 1:
            continue  # dx of one channel is zero, and what is left of it rounding
        with jax.enable_x64(True):
            arrays = norm_operands(name, shape, dtype)
            if name == "add_norm":  # so that the sum is not rounded
                arrays[0], arrays[1] = (jnp.round(4 * a) / 4 for a in arrays[:2])
            got = gradients(functools.partial(operator, implementation="kernel"), *arrays)
            assert [g.dtype for g in got] == [dtype] * len(arrays)
            assert_close(got, in_float64(operator, *arrays), 4 * TOLERANCE[dtype])
            if dtype in ("bfloat16", "float16"):
                vectors = [a.astype("float32") for a in arrays[-2:]]
                mixed = gradients(operator, *arrays[:-2], *vectors)
                assert [g.dtype for g in mixed[-2:]] == ["float32", "float32"]
                assert_close(mixed, got, 2 * TOLERANCE[dtype])


@needs_kernel
def test_of_a_norm_where_the_mean_is_large() -> None:
    normal = np.random.RandomState(0).standard_normal
    x = jnp.asarray(normal((1, 4, 4, 64)) + 3000, "float32")
    arrays = x, jnp.ones(64), jnp.zeros(64)
    with jax.enable_x64(True):
        assert_close(gradients(layer_norm, *arrays), in_float64(layer_norm, *arrays), 1e-3)


def cases() -> list:
    products = [
        pytest.param(f, test_linear.operands(dtype="float32"), 2, id=name, marks=kernel_serves)
        for name, f in (("linear", linear), ("linear gelu", functools.partial(linear, gelu=True)))
    ]
    arrays = test_convolution.operands()
    products.append(pytest.param(convolution, arrays, 2, id="convolution", marks=kernel_serves))
    norms = [
        pytest.param(f, norm_operands(name), 2, id=name, marks=needs_kernel)
        for name, f in NORMS.items()
    ]
    arrays = test_bias_gelu.operands((4, 5, 3, 24))[:2]
    return [*products, *norms, pytest.param(bias_gelu, arrays, 1, id="gelu", marks=needs_kernel)]


@pytest.mark.parametrize(("operator", "arrays", "shared"), cases())
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_sharded_batch_is_summed_over_and_not_moved(
    kind: AxisType, operator: Callable, arrays: list[jax.Array], shared: int
) -> None:
    specs = [P("data")] * (len(arrays) - shared) + [P()] * shared
    local = [
        jax.device_put(a, NamedSharding(mesh(kind), s)) for a, s in zip(arrays, specs, strict=True)
    ]

    run = jax.jit(functools.partial(of_squares, operator))
    compiled = run.lower(*local).compile()
    assert "all-gather" not in compiled.as_text() and "all-reduce" in compiled.as_text()
    assert "_backward" in compiled.as_text()
    wanted = run(*arrays)
    assert_close(compiled(*local), wanted, 2e-6)
    everywhere = jax.device_put(arrays, NamedSharding(mesh(kind), P()))
    assert_close(run(*everywhere), wanted, 2e-6)


@pytest.mark.parametrize(("operator", "arrays", "shared"), cases())
def test_second_derivatives_are_those_of_the_jnp_form(
    operator: Callable, arrays: list[jax.Array], shared: int
) -> None:
    del shared

    def second(implementation: str | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        def squares(*arrays: jax.Array) -> jax.Array:
            ys = jax.tree.leaves(operator(*arrays, implementation=implementation))
            return sum((y**2).sum() for y in ys)

        return jax.grad(lambda *a: (jax.grad(squares)(*a) ** 2).sum(), 0)(*arrays)

    by_kernel, by_jnp = (jax.jit(functools.partial(second, form)) for form in (None, "jnp"))
    assert_close(by_kernel(*arrays), by_jnp(*arrays), 1e-4)


def of_squares(operator: Callable, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    def loss(*arrays: jax.Array) -> jax.Array:
        return sum(((y**2).sum() for y in jax.tree.leaves(operator(*arrays))), jnp.zeros(()))

    return jax.grad(loss, tuple(range(len(arrays))))(*arrays)


def mesh_of_two_axes(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)


@needs_kernel
@pytest.mark.parametrize("name", ["add_norm", "norm_add"])
@pytest.mark.parametrize(
    "specs",
    [
        (P("data", "model"), P("data", "model")),
        (P(("data", "model")), P(("data", "model"))),
        (P("data"), P()),
        (P(), P("data")),
        (P("data"), P("data", None, None, "model")),
    ],
    ids=str,
)
def test_maps_that_are_sharded_in_other_ways(specs: tuple[P, P], name: str) -> None:
    """On a mesh of explicit axes each gradient has the type of its operand."""
    arrays = norm_operands(name, (4, 6, 3, 24))
    whole = mesh_of_two_axes(AxisType.Explicit)
    local = [
        jax.device_put(a, NamedSharding(whole, s))
        for a, s in zip(arrays, (*specs, P(), P()), strict=True)
    ]
    run = jax.jit(functools.partial(of_squares, NORMS[name]))
    got = run(*local)
    for gradient, a in zip(got, local, strict=True):
        assert gradient.sharding.is_equivalent_to(a.sharding, a.ndim)
    assert_close(got, run(*arrays), 2e-6)


@pytest.mark.parametrize(("operator", "arrays", "shared"), cases())
def test_in_a_shard_map_over_some_of_the_axes(
    operator: Callable, arrays: list[jax.Array], shared: int
) -> None:
    specs = (*[P("model")] * (len(arrays) - shared), *[P()] * shared)
    run = functools.partial(of_squares, operator)
    mapped = jax.shard_map(
        run,
        mesh=mesh_of_two_axes(AxisType.Auto),
        in_specs=specs,
        out_specs=specs,
        axis_names={"model"},
    )
    assert_close(jax.jit(mapped)(*arrays), jax.jit(run)(*arrays), 2e-6)


@kernel_serves
@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=["mapped", "inner"])
def test_vmap_over_a_sharded_batch(spec: P) -> None:
    x, kernel, bias = test_linear.operands((2, 4, 5, 3, 16), dtype="float32")
    run = jax.jit(jax.vmap(functools.partial(of_squares, linear), (0, None, None)))
    local = jax.device_put(x, NamedSharding(mesh(), spec))
    compiled = run.lower(local, kernel, bias).compile()
    assert "all-gather" not in compiled.as_text()
    assert_close(compiled(local, kernel, bias), run(x, kernel, bias), 2e-6)


def test_elsewhere_the_jnp_form_keeps_a_maps_axes() -> None:
    """Each may be sharded."""
    text = for_cuda(functools.partial(linear, implementation="jnp"), *test_linear.operands())
    assert "tensor<4x5x3x16xbf16>, tensor<16x24xbf16>) -> tensor<4x5x3x24xbf16>" in text


@kernel_serves
def test_a_kernels_gradient_is_in_the_order_of_the_pixels() -> None:
    """Whatever the tiles are: columns alone have the same bits."""
    x, kernel, bias = test_linear.operands((3, 20, 20, 72), 300, "float32")
    whole = gradients(linear, x, kernel, bias, slopes="ones_like")[1]
    np.testing.assert_array_equal(gradients(linear, x, kernel, bias, slopes="ones_like")[1], whole)
    part = gradients(linear, x, kernel[:, :96], bias[:96], slopes="ones_like")[1]
    np.testing.assert_array_equal(part, whole[:, :96])


@kernel_serves
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_goes_where_it_is_read(dtype: str) -> None:
    x, kernel, bias = test_linear.operands((2, 9, 9, 40), 72, dtype)
    x = x.at[0, 3, 4, 7].set(jnp.inf)
    dx, dkernel, dbias = gradients(linear, x, kernel, bias)
    assert jnp.isfinite(dx).all() and jnp.isfinite(dbias).all()
    assert not jnp.isfinite(dkernel[7]).any()
    assert jnp.isfinite(jnp.delete(dkernel, 7, 0)).all()


@kernel_serves
def test_what_a_thread_has_from_the_call_before_is_not_read() -> None:
    """Of an odd number of pixels one number more is copied."""
    arrays = test_linear.operands((1, 7, 7, 40), 72)
    with jax.enable_x64(True):
        wanted = in_float64(linear, *arrays)
    for _ in range(4):
        nothing = test_linear.operands((1, 9, 9, 40), 72)
        gradients(linear, nothing[0] * jnp.nan, *nothing[1:])
        assert_close(gradients(linear, *arrays), wanted, 4 * TOLERANCE["bfloat16"])


@needs_kernel
def test_of_a_sum_no_operand_is_kept_but_the_sum() -> None:
    x, residual, scale, bias = norm_operands("add_norm")
    total = x + residual
    _, back = jax.vjp(add_norm, x, residual, scale, bias)
    maps = [a for a in jax.tree.leaves(back) if getattr(a, "shape", ()) == x.shape]
    assert len(maps) == 1
    np.testing.assert_array_equal(maps[0], total)


@kernel_serves
def test_a_training_program_has_the_kernels() -> None:
    text = (
        jax.jit(jax.grad(lambda *a: linear(*a).sum(), (0, 1)))
        .lower(*test_linear.operands())
        .as_text()
    )
    assert f"@{_targets.LINEAR_FORWARD}" in text and f"@{_targets.LINEAR_BACKWARD}" in text
    assert "dot_general" not in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("operator", "arrays", "shared"), cases())
def test_what_is_not_finite_is_where_the_jnp_form_has_it(
    operator: Callable, arrays: list[jax.Array], shared: int, value: float
) -> None:
    del shared
    arrays = [arrays[0].at[1, 2, 1, 0].set(value), *arrays[1:]]
    by_kernel, by_jnp = (
        gradients(functools.partial(operator, implementation=form), *arrays)
        for form in ("kernel", "jnp")
    )
    assert np.isfinite(by_jnp[0]).any()  # other pixels of x
    for one, other in zip(by_kernel, by_jnp, strict=True):
        finite = np.isfinite(other)
        np.testing.assert_array_equal(np.isfinite(one), finite)
        assert_close(np.asarray(one)[finite], np.asarray(other)[finite])

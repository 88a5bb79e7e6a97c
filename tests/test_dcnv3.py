"""DCNv3 in its gather form, which is the definition that kernels are held against."""

from __future__ import annotations

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.layers import on_device
from tests.support import SMALL, assert_close, error
from xla_ops import dcnv3
from xla_ops.geometry import Geometry

CASES = {case["name"]: case for case in json.loads((SMALL / "goldens/dcnv3_op.json").read_text())}
GOLDENS = np.load(SMALL / "goldens/dcnv3_op.npz")
HALVES = (jnp.bfloat16, jnp.float16)


def arguments(case: dict) -> dict:
    keys = ("stride", "pad", "dilation", "group", "offset_scale", "remove_center")
    kernel_size = (case["kernel_h"], case["kernel_w"])
    return {key: case[key] for key in keys} | {
        "kernel_size": kernel_size,
        "implementation": "gather",
    }


def golden(name: str, dtype, *keys: str) -> list[jax.Array]:
    return on_device([GOLDENS[f"{name}/{key}"] for key in keys], dtype)


def small_inputs(n=2, h=5, w=6, group=2, width=4, points=9, dtype=jnp.float32, seed=0):
    """Inputs whose locations keep away from integers, where the derivative jumps."""
    stream = np.random.RandomState(seed)
    x = stream.standard_normal((n, h, w, group * width))
    whole = stream.randint(-2, 3, (n, h, w, group * points * 2))
    offset = whole + stream.uniform(0.05, 0.95, whole.shape)
    mask = stream.uniform(0, 1, (n, h, w, group * points))
    return on_device((x, offset, mask), dtype)


def definition(x, offset, mask, g: Geometry) -> np.ndarray:
    """The sum of DCNv3, term by term."""
    n, h, w, channels = x.shape
    out_h, out_w = g.output_size((h, w))
    width = channels // g.group
    points = g.points
    x = x.reshape(n, h, w, g.group, width)
    offset = offset.reshape(n, out_h, out_w, g.group, len(points), 2)
    mask = mask.reshape(n, out_h, out_w, g.group, len(points))
    y = np.zeros((n, out_h, out_w, g.group, width))
    r_h, r_w = ((d * (k - 1)) // 2 for d, k in zip(g.dilation, g.kernel_size, strict=True))
    for image, i, j, group, p in np.ndindex(*mask.shape):
        b, a = points[p]
        o_x, o_y = offset[image, i, j, group, p]
        scale = g.offset_scale
        loc_w = j * g.stride[1] - g.pad[1] + r_w - r_w * scale + (a * g.dilation[1] + o_x) * scale
        loc_h = i * g.stride[0] - g.pad[0] + r_h - r_h * scale + (b * g.dilation[0] + o_y) * scale
        if not (-1 < loc_w < w and -1 < loc_h < h):
            continue
        for row in (math.floor(loc_h), math.floor(loc_h) + 1):
            for column in (math.floor(loc_w), math.floor(loc_w) + 1):
                if 0 <= row < h and 0 <= column < w:
                    weight = (1 - abs(loc_h - row)) * (1 - abs(loc_w - column))
                    value = mask[image, i, j, group, p] * weight * x[image, row, column, group]
                    y[image, i, j, group] += value
    return y.reshape(n, out_h, out_w, channels)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_match_the_official_operator(name, dtype, x64):
    inputs = golden(name, dtype, "x", "offset", "mask")

    @jax.jit
    def run(inputs, slope):
        y, backward = jax.vjp(lambda *a: dcnv3(*a, **arguments(CASES[name])), *inputs)
        return y, backward(slope)

    if name == "integer_offsets":  # no gradients are recorded: the derivative jumps there
        y, gradients = jax.jit(lambda a: dcnv3(*a, **arguments(CASES[name])))(inputs), ()
    else:
        y, gradients = run(inputs, *golden(name, dtype, "grad_output"))
    assert y.dtype == dtype
    assert_close(y, GOLDENS[f"{name}/output"], f"operator, {dtype}")
    for key, gradient in zip(("x", "offset", "mask"), gradients, strict=False):
        assert_close(gradient, GOLDENS[f"{name}/grad_{key}"], f"operator, {dtype}")


@settings(max_examples=25, deadline=None)
@given(
    kernel_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    group=st.integers(1, 3),
    width=st.integers(1, 5),
    offset_scale=st.sampled_from([0.5, 1.0, 2.0, 1.25]),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 10),
)
def test_any_geometry_matches_the_definition(
    kernel_size, stride, pad, dilation, group, width, offset_scale, size, seed
):
    geometry = Geometry(kernel_size, stride, pad, dilation, group, offset_scale, False)
    out_h, out_w = geometry.output_size(size)
    if min(out_h, out_w) < 1:
        return
    stream = np.random.RandomState(seed)
    points = len(geometry.points)
    x = stream.standard_normal((1, *size, group * width))
    offset = 2 * stream.standard_normal((1, out_h, out_w, group * points * 2))
    mask = stream.uniform(0, 1, (1, out_h, out_w, group * points))
    settings = {k: v for k, v in geometry._asdict().items() if k != "center_feature_scale"}
    call = functools.partial(dcnv3, **settings, implementation="gather")
    y = jax.jit(call)(*on_device((x, offset, mask), "float32"))
    wanted = definition(x, offset, mask, geometry)
    np.testing.assert_allclose(y, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_as_good_as_rounding_inputs_and_output(dtype):
    inputs = golden("plain", jnp.float32, "x", "offset", "mask")
    exact = GOLDENS["plain/output"]
    rounded = [array.astype(dtype) for array in inputs]
    run = jax.jit(lambda *a: dcnv3(*a, **arguments(CASES["plain"])))
    best = run(*(array.astype(jnp.float32) for array in rounded)).astype(dtype)
    y = run(*rounded)
    assert y.dtype == dtype
    assert error(y.astype(jnp.float32), exact) <= 2 * error(best.astype(jnp.float32), exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_in_half_precision_have_its_dtype_and_accuracy(dtype):
    inputs = [a.astype(dtype) for a in golden("plain", jnp.float32, "x", "offset", "mask")]

    def loss(*inputs):
        return dcnv3(*inputs, **arguments(CASES["plain"])).astype(jnp.float32).sum()

    slopes = jax.jit(jax.grad(loss, (0, 1, 2)))
    gradients = slopes(*inputs)
    wanted = slopes(*(a.astype(jnp.float32) for a in inputs))
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype
        # A pixel's gradient is a sum over the points that touch it, rounded as they come.
        bound = 16 * float(jnp.finfo(dtype).eps)
        assert error(gradient.astype(jnp.float32), np.asarray(exact)) <= bound


def test_forward_mode_agrees_with_finite_differences(x64):
    inputs = small_inputs(dtype=jnp.float64)
    stream = np.random.RandomState(1)
    tangents = [jnp.asarray(stream.standard_normal(a.shape)) for a in inputs]

    @jax.jit
    def run(x, offset, mask):
        return dcnv3(x, offset, mask, group=2, implementation="gather")

    _, tangent = jax.jvp(run, tuple(inputs), tuple(tangents))
    step = 1e-6
    plus = run(*(a + step * t for a, t in zip(inputs, tangents, strict=True)))
    minus = run(*(a - step * t for a, t in zip(inputs, tangents, strict=True)))
    assert error(tangent, np.asarray((plus - minus) / (2 * step))) < 1e-7


def test_derivative_at_an_integer_location_is_that_of_the_next_cell():
    x = jnp.asarray([0.0, 1.0, 10.0]).reshape(1, 1, 3, 1)
    mask = jnp.ones((1, 1, 3, 1))

    def run(offset):
        settings = {"group": 1, "kernel_size": 1, "pad": 0, "implementation": "gather"}
        return dcnv3(x, offset, mask, **settings)[0, 0, 1, 0]

    slope = jax.grad(run)(jnp.zeros((1, 1, 3, 2)))[0, 0, 1]
    assert slope[0] == 9  # along x: from 1 to 10, not from 0 to 1
    assert slope[1] == -1  # along y: from 1 to the zero below the map


def test_transforms_agree_with_the_plain_call():
    inputs = small_inputs()

    def run(x, offset, mask):
        return dcnv3(x, offset, mask, group=2, implementation="gather")

    def loss(*inputs):
        return jnp.sin(run(*inputs)).sum()

    y, slopes = run(*inputs), jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)
    np.testing.assert_allclose(jax.jit(run)(*inputs), y, atol=1e-6)
    one_by_one = [a[:, None] for a in inputs]
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(*one_by_one)[:, 0], y, atol=1e-6)
    _, scanned = jax.lax.scan(lambda carry, a: (carry, run(*a)), None, one_by_one)
    np.testing.assert_allclose(scanned[:, 0], y, atol=1e-6)
    for transformed in (
        jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*inputs),
        [s[:, 0] for s in jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*one_by_one)],
    ):
        for slope, wanted in zip(transformed, slopes, strict=True):
            np.testing.assert_allclose(slope, wanted, atol=1e-5)


def test_shard_map_with_its_checks_agrees_with_the_plain_call():
    inputs = small_inputs(n=4)
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))

    def loss(x, offset, mask):
        y = dcnv3(x, offset, mask, group=2, implementation="gather")
        return y, jnp.sin(y).sum(axis=(1, 2, 3))

    def slopes(*inputs):
        return jax.grad(lambda *a: loss(*a)[1].sum(), (0, 1, 2))(*inputs)

    for run in (lambda *a: loss(*a)[0], slopes):
        sharded = jax.shard_map(run, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))
        for got, wanted in zip(
            jax.tree.leaves(jax.jit(sharded)(*inputs)),
            jax.tree.leaves(jax.jit(run)(*inputs)),
            strict=True,
        ):
            np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_sharded_batch_is_not_gathered():
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    inputs = jax.device_put(small_inputs(n=4), NamedSharding(mesh, P("batch")))

    def loss(x, offset, mask):
        return dcnv3(x, offset, mask, group=2, implementation="gather")

    compiled = jax.jit(loss).lower(*inputs).compile()
    assert "all-gather" not in compiled.as_text()
    assert compiled(*inputs).sharding.spec[0] == "batch"


def test_samples_of_all_points_are_never_held_at_once():
    inputs = small_inputs(n=8, h=56, w=56, group=4, width=16)

    def run(x, offset, mask):
        return dcnv3(x, offset, mask, group=4, implementation="gather")

    held = sum(a.nbytes for a in inputs) + inputs[0].nbytes  # inputs and output
    forward = jax.jit(run).lower(*inputs).compile().memory_analysis()
    assert forward.temp_size_in_bytes <= 3 * held
    slopes = jax.jit(jax.grad(lambda *a: run(*a).sum(), (0, 1, 2)))
    both = slopes.lower(*inputs).compile().memory_analysis()
    assert both.temp_size_in_bytes <= 6 * held


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e5])
def test_a_point_nowhere_counts_as_zero(value):
    x, offset, mask = small_inputs()
    x = x.at[0, 0, 0].set(math.inf)  # not to be multiplied by a weight of zero
    away = offset.at[:, 2, 3].set(value)
    y = dcnv3(x, away, mask, group=2, implementation="gather")
    assert (y[:, 2, 3] == 0).all()

    @jax.jit
    def loss(offset):
        return dcnv3(x, offset, mask, group=2, implementation="gather")[:, 2, 3].sum()

    assert (jax.grad(loss)(away)[:, 2, 3] == 0).all()


def test_an_empty_batch_gives_an_empty_output():
    x, offset, mask = small_inputs(n=2)
    y = dcnv3(x[:0], offset[:0], mask[:0], group=2, implementation="gather")
    assert y.shape == (0, 5, 6, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((5, 6, 8))}, "x: expected four axes"),
        ({"offset": jnp.zeros((2, 5, 6, 35))}, r"offset: expected shape \(2, 5, 6, 36\)"),
        ({"mask": jnp.zeros((2, 4, 6, 18))}, r"mask: expected shape \(2, 5, 6, 18\)"),
        (
            {"mask": jnp.zeros((2, 5, 6, 18), jnp.bfloat16)},
            "mask: expected the dtype of x, float32",
        ),
        (
            {"x": jnp.zeros((2, 5, 6, 8), jnp.bfloat16)},  # float32 beside it is for records alone
            "offset: expected the dtype of x, bfloat16, got float32",
        ),
        ({"x": jnp.zeros((2, 0, 6, 8)), "pad": 2}, "x: a map of 0x6 is too small"),
        ({"x": jnp.zeros((2, 5, 6, 8), jnp.int32)}, "x: expected one of float32, .* got int32"),
        ({"group": 3}, "x: expected channels that 3 groups divide, got 8"),
        ({"group": 0}, "group: expected an integer of at least 1, got 0"),
        ({"stride": 0}, "stride: expected an integer of at least 1, got 0"),
        ({"pad": (1, -1)}, "pad: expected an integer of at least 0, got -1"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size: expected an integer or a pair \(h, w\)"),
        ({"kernel_size": 9, "pad": 0}, r"x: a map of 5x6 is too small for kernel_size \(9, 9\)"),
        ({"kernel_size": 2, "remove_center": True}, "remove_center: expected a square odd kernel"),
        ({"implementation": "cuda"}, "implementation: expected 'kernel', 'gather' or None"),
        ({"mask": [1.0]}, "mask: expected an array, got list"),
        ({"offset_scale": "1"}, "offset_scale: expected a finite number, got '1'"),
        ({"offset_scale": math.nan}, "offset_scale: expected a finite number, got nan"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    x, offset, mask = small_inputs()
    call = {"x": x, "offset": offset, "mask": mask, "group": 2} | change
    with pytest.raises(ValueError, match=message):
        dcnv3(**call)


def test_numbers_may_be_numpys():
    plain, given = ({"group": n(2), "pad": (n(1), n(1))} for n in (int, np.int64))
    y, wanted = (dcnv3(*small_inputs(), **settings) for settings in (given, plain))
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("implementation", ["gather", None])
def test_sides_whose_pixels_float32_does_not_tell_apart_are_refused(implementation):
    def shape_for(side: int) -> tuple[int, ...]:
        shapes = ((1, 1, side, 1), (1, 1, side // 4096, 2), (1, 1, side // 4096, 1))
        options = {"kernel_size": 1, "stride": 4096, "pad": 0, "group": 1}
        call = functools.partial(dcnv3, **options, implementation=implementation)
        return jax.eval_shape(call, *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)).shape

    assert shape_for(1 << 24) == (1, 1, 4096, 1)
    with pytest.raises(ValueError, match="x: expected sides of at most 16777216 pixels"):
        shape_for((1 << 24) + 4096)

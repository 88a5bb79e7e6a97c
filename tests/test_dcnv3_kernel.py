"""The kernel against recorded outputs of the official code, and against the jnp form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from tests.dcnv3_cases import (
    CASES,
    GRADIENTS,
    HALF,
    TOLERANCE,
    difference,
    fused_problem,
    problem,
    recorded,
    settings_of,
    value_and_gradients,
)
from tests.layers import needs_kernel, on_device

pytestmark = needs_kernel


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_kernel_gives_the_recorded_outputs_and_gradients(name: str, dtype: str) -> None:
    operands, wanted = recorded(name)
    with jax.enable_x64(dtype == "float64"):
        arrays = on_device(operands, dtype)
        got = value_and_gradients("kernel", *arrays, **settings_of(CASES[name]))
        for key, array in zip(("output", *GRADIENTS), got, strict=True):
            if key in wanted:
                assert difference(array, wanted[key]) < TOLERANCE[dtype], key


@st.composite
def geometries(draw) -> tuple[dict, tuple[int, int, int], int]:
    small = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    kernel = (small(1, 5), small(1, 5))
    remove = kernel[0] == kernel[1] and kernel[0] in (3, 5) and draw(st.booleans())
    geometry = {
        "group": small(1, 4),
        "kernel_size": kernel,
        "stride": small(1, 3),
        "pad": small(0, 3),
        "dilation": small(1, 3),
        "offset_scale": draw(st.sampled_from([1.0, 2.0, 0.5])),
        "remove_center": remove,
    }
    span = [geometry["dilation"] * (k - 1) + 1 - 2 * geometry["pad"] for k in kernel]
    size = (small(0, 3), *(small(max(1, s), max(1, s) + 8) for s in span))
    return geometry, size, draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 19, 32, 33]))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(geometries(), st.sampled_from(["float32", "float64", "bfloat16", "float16"]))
def test_any_geometry_and_dtype_agrees_with_the_gather_form(case: tuple, dtype: str) -> None:
    # A few, through JAX; fuzz_dcnv3_cpu.cc runs many.
    geometry, size, depth = case
    with jax.enable_x64(True):
        arrays = problem(0, dtype, geometry, size, depth)
        exact = [np.asarray(a, np.float64) for a in arrays]
        got = value_and_gradients("kernel", *arrays, **geometry)
        # In float64, of the same rounded inputs; the kernel itself serves, held to 1e-11 above.
        form = "gather" if dtype == "float64" else "kernel"
        expected = value_and_gradients(form, *exact, **geometry)
        tolerance = TOLERANCE.get(dtype) or 2 * HALF[dtype]
        for name, a, b in zip(("y", *GRADIENTS), got, expected, strict=True):
            assert a.dtype == arrays[0].dtype and a.shape == b.shape
            assert a.size == 0 or difference(a, b) < tolerance, name


DEPTHS = (5, 16, 32)


@pytest.mark.parametrize(
    "dtypes", [("float32",) * 2, ("float64",) * 2, ("bfloat16", "float32"), ("float16",) * 2]
)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("center", [False, True], ids=["", "center"])
def test_fused_kernel_agrees_with_its_definition(
    depth: int, dtypes: tuple[str, str], center: bool
) -> None:
    record = xla_ops.Record(3, 9)
    with jax.enable_x64(True):
        arrays, options = fused_problem(dtypes, (2, 5, 6), 3, depth)
        options["center_feature_scale"] = center
        got = value_and_gradients("kernel", *arrays, **options)
        exact = [np.asarray(a, np.float64) for a in arrays]
        expected = value_and_gradients("gather", *exact, **options)
        tolerance = TOLERANCE.get(dtypes[0]) or 2 * HALF[dtypes[0]]
        for name, a, b in zip(("y", "grad_x", "grad_record"), got, expected, strict=True):
            assert difference(a, b) < tolerance, name
        padding = np.ones(record.width, bool)
        used = [record.offset, record.mask] + [record.center] * center
        padding[np.concatenate(used)] = False
        assert not np.asarray(got[2])[..., padding].any()


def test_fused_form_is_softmax_then_the_operator() -> None:
    record = xla_ops.Record(2, 9)
    random = np.random.RandomState(3)
    x = jnp.asarray(random.standard_normal((1, 4, 5, 32)), "float32")
    rows = jnp.asarray(random.standard_normal((1, 4, 5, record.width)), "float32")
    mask = jax.nn.softmax(rows[..., record.mask].reshape(1, 4, 5, 2, 9)).reshape(1, 4, 5, 18)
    y = xla_ops.dcnv3(x, rows[..., record.offset], mask, group=2)
    share = jnp.repeat(jax.nn.sigmoid(rows[..., record.center]), 16, axis=-1)
    assert difference(xla_ops.dcnv3_fused(x, rows, group=2), y) < 1e-6
    blended = xla_ops.dcnv3_fused(x, rows, group=2, center_feature_scale=True)
    assert difference(blended, y * (1 - share) + x * share) < 1e-6


def test_logits_of_any_size_give_a_softmax() -> None:
    record = xla_ops.Record(1, 9)
    x = jnp.ones((1, 6, 6, 16))
    for scale in (1e4, 1e30, 3e38):
        rows = scale * np.sign(np.random.RandomState(4).standard_normal((1, 6, 6, record.width)))
        rows[..., record.offset] = 0
        y = xla_ops.dcnv3_fused(x, jnp.asarray(rows, "float32"), group=1, implementation="kernel")
        assert float(jnp.abs(y[:, 1:-1, 1:-1] - 1).max()) < 1e-6


def test_logits_whose_exponentials_are_next_to_nothing_give_a_softmax() -> None:
    record = xla_ops.Record(1, 9)
    rows = np.zeros((1, 6, 6, record.width), np.float32)
    rows[..., record.mask] = np.random.RandomState(4).uniform(-110, -80, (1, 6, 6, 9))
    rows[..., record.mask[4]] = 0  # the middle one, at the pixel itself
    x = jnp.asarray(np.random.RandomState(5).standard_normal((1, 6, 6, 16)), "float32")
    y = xla_ops.dcnv3_fused(x, jnp.asarray(rows), group=1, implementation="kernel")
    assert difference(y, x) < 1e-6


@pytest.mark.parametrize("extreme", [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e9, -(2.0**31)])
def test_extreme_offsets_count_as_outside(extreme: float) -> None:
    geometry = settings_of(CASES["plain"])
    x, offset, mask, dy = problem(5, "float32", geometry, (2, 6, 7), 16)
    hit = np.random.RandomState(6).uniform(size=offset.shape) < 0.2
    offset = jnp.where(hit, extreme, offset)
    got = value_and_gradients("kernel", x, offset, mask, dy, **geometry)
    expected = value_and_gradients("gather", x, offset, mask, dy, **geometry)
    for a, b in zip(got, expected, strict=True):
        assert np.isfinite(a).all() and difference(a, b) < 1e-5


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("operand", [0, 2, 3], ids=["x", "mask", "dy"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_no_further_than_in_the_gather_form(
    value: float, operand: int, depth: int
) -> None:
    geometry = settings_of(CASES["plain"])
    arrays = problem(7, "float32", geometry, (1, 6, 7), depth)
    # The corners are what a clamped index would read for points outside.
    arrays[operand] = arrays[operand].at[0, 0, 0, 0].set(value).at[0, -1, -1, -1].set(value)
    got = value_and_gradients("kernel", *arrays, **geometry)
    expected = value_and_gradients("gather", *arrays, **geometry)
    for name, a, b in zip(("y", *GRADIENTS), got, expected, strict=True):
        spoilt = ~np.isfinite(b)
        assert not (~np.isfinite(a) & ~spoilt).any(), name
        np.testing.assert_allclose(np.where(spoilt, 0, a), np.where(spoilt, 0, b), atol=1e-4)
    assert not np.isfinite(got[0] if operand != 3 else got[1]).all()


@pytest.mark.parametrize("operand", [0, 3], ids=["x", "dy"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nor_where_points_are_at_pixels_and_just_outside(value: float, operand: int) -> None:
    geometry = settings_of(CASES["plain"])
    arrays = problem(7, "float32", geometry, (1, 6, 7), 5)
    arrays[1] = jnp.zeros_like(arrays[1])  # the outermost points are at -1 and at the map's sides
    arrays[operand] = arrays[operand].at[0, ::5, ::6, 0].set(value)  # the corners
    got = value_and_gradients("kernel", *arrays, **geometry)
    expected = value_and_gradients("gather", *arrays, **geometry)
    for name, a, b in zip(("y", *GRADIENTS), got, expected, strict=True):
        spoilt = ~np.isfinite(b)
        assert not (~np.isfinite(a) & ~spoilt).any(), name
        np.testing.assert_allclose(np.where(spoilt, 0, a), np.where(spoilt, 0, b), atol=1e-5)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("operand", [0, 1, 2], ids=["x", "record", "dy"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nor_in_the_fused_form_with_a_share_of_the_centre(
    value: float, operand: int, depth: int
) -> None:
    record, random = xla_ops.Record(2, 9), np.random.RandomState(10)
    sizes = 2 * depth, record.width, 2 * depth
    arrays = on_device([random.standard_normal((1, 6, 7, n)) for n in sizes], "float32")
    places = [(0, 0, 0, 0)]  # a corner, some of whose points are outside
    if operand == 1:
        places = [(0, 0, 0, record.center[0]), (0, 5, 6, record.mask[-1])]
    for place in places:
        arrays[operand] = arrays[operand].at[place].set(value)
    options = {"group": 2, "center_feature_scale": True}
    got = value_and_gradients("kernel", *arrays, **options)
    expected = value_and_gradients("gather", *arrays, **options)
    for name, a, b in zip(("y", "grad_x", "grad_record"), got, expected, strict=True):
        spoilt = ~np.isfinite(b)
        np.testing.assert_array_equal(~np.isfinite(a), spoilt, name)
        np.testing.assert_allclose(np.where(spoilt, 0, a), np.where(spoilt, 0, b), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_changes_no_bit_of_another_image(value: float, dtype: str) -> None:
    geometry = settings_of(CASES["plain"])
    arrays = problem(7, dtype, geometry, (4, 5, 7), 16)  # several images in a block of pairs
    clean = value_and_gradients("kernel", *arrays, **geometry)
    arrays[0] = arrays[0].at[1, 2, 3].set(value)
    others = np.array([0, 2, 3])
    for a, b in zip(value_and_gradients("kernel", *arrays, **geometry), clean, strict=True):
        np.testing.assert_array_equal(a[others], b[others])


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 4096), (1, 4096, 1), (0, 4, 4), (1, 2, 2)])
def test_maps_of_extreme_shapes(size: tuple[int, int, int]) -> None:
    geometry = settings_of(CASES["plain"])
    arrays = problem(8, "float32", geometry, size, 16)
    got = value_and_gradients("kernel", *arrays, **geometry)
    expected = value_and_gradients("gather", *arrays, **geometry)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.size == 0 or difference(a, b) < 1e-5


def test_pairs_that_threads_do_not_share_evenly() -> None:
    geometry = settings_of(CASES["plain"]) | {"group": 1}
    arrays = problem(
        9, "float32", geometry, (1, 5, 77), 16
    )  # two pieces, of 12 blocks and one pair
    got = value_and_gradients("kernel", *arrays, **geometry)
    expected = value_and_gradients("gather", *arrays, **geometry)
    for a, b in zip(got, expected, strict=True):
        assert difference(a, b) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(1, 28, 28), (3, 12, 61)])
def test_groups_that_the_parts_of_a_backward_do_not_divide(
    size: tuple[int, int, int], dtype: str
) -> None:
    geometry = settings_of(CASES["plain"]) | {"group": 7}
    arrays = problem(9, dtype, geometry, size, 16)
    got = value_and_gradients("kernel", *arrays, **geometry)
    expected = value_and_gradients("gather", *arrays, **geometry)
    for a, b in zip(got, expected, strict=True):
        assert difference(a, b) < (1e-5 if dtype == "float32" else 1e-2)


PROGRAM = """
import hashlib, jax, numpy as np, xla_ops
random = np.random.RandomState(9)
n, h, w, group = 2, 20, 61, 7
record = xla_ops.Record(group, 9)
for depth, dtype in ((16, "float32"), (5, "float32"), (32, "bfloat16")):
    x, dy = (random.standard_normal((n, h, w, group * depth)).astype(dtype) for _ in range(2))
    rows = random.standard_normal((n, h, w, record.width)).astype("float32")
    function = lambda *a: xla_ops.dcnv3_fused(*a, group=group, implementation="kernel")
    y, pullback = jax.vjp(function, x, rows)
    for array in (y, *pullback(dy)):
        print(hashlib.sha256(np.asarray(array).tobytes()).hexdigest())
print(xla_ops.status()["cpu"].detail)
"""


# A kernel for half precision sums dx in float32 in an array of its own, here of 64 MB for an image.
# The results have room, and no such array.
OUT_OF_MEMORY = """
import resource
import jax
import jax.numpy as jnp
from xla_ops import dcnv3

shapes = (2, 4096, 64, 64), (2, 4096, 64, 2), (2, 4096, 64, 1)
arrays = [jax.block_until_ready(jnp.ones(shape, jnp.bfloat16)) for shape in shapes]
def gradients(*arrays):
    y, vjp = jax.vjp(lambda *arrays: dcnv3(*arrays, group=1, kernel_size=1, pad=0), *arrays)
    return vjp(y)
program = jax.jit(gradients).lower(*arrays).compile()
size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = 1024 * int(size.split()[1]) + 2 * sum(array.nbytes for array in arrays) + (32 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    jax.block_until_ready(program(*arrays))
except jax.errors.JaxRuntimeError as error:
    print(error)
"""


def run_program(program: str = PROGRAM, **environment: str) -> list[str]:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_no_memory_is_an_error() -> None:
    assert run_program(OUT_OF_MEMORY)[-1] == "scratch"  # not the memory for the results


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    # XLA's pool has as many threads as the process may use processors, or as this variable says.
    one, many = (run_program(NPROC=count) for count in ("1", "7"))
    assert one == many


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets_compute_the_same(name: str) -> None:
    best = xla_ops.status()["cpu"].detail
    lesser = {"avx2": 1, "avx512": 2, "avx512bf16": 3, "avx512 and amx": 3}.get(best, 0)
    if name not in ("baseline", "avx2", "avx512")[:lesser]:
        pytest.skip(f"this processor has no {name}, or nothing better")
    tests = [
        f"{Path(__file__).parent / file}::test_{test}"
        for file, test in (
            ("test_dcnv3_kernel.py", "kernel_gives_the_recorded_outputs_and_gradients"),
            ("test_dwconv.py", "gelu_is_exact_over_the_whole_line"),
            ("test_bias_gelu.py", "what_is_not_finite"),
            ("test_layer_norm.py", "a_sum_in_half_precision_is_the_nearest_number"),
        )
    ]
    environment = {**os.environ, "INTERNIMAGE_CPU_ISA": name}
    chosen = "plain or odd or wide or gelu or finite or nearest"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_missing_kernel_is_an_error_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from xla_ops import _ffi

    reason = _ffi.Status("gather", "not built: no compiler")
    monkeypatch.setattr(_ffi, "_load", lambda platform: _ffi._Loaded(reason))
    x, offset, mask, _ = problem(0, "float32", settings_of(CASES["plain"]), (1, 3, 3), 4)
    with pytest.raises(
        ValueError, match=r"no 'kernel' to serve here \(cpu: not built: no compiler; cuda: "
    ):
        xla_ops.dcnv3(x, offset, mask, group=2, implementation="kernel")
    xla_ops.dcnv3(x, offset, mask, group=2)
    assert xla_ops.status()["cpu"] == reason

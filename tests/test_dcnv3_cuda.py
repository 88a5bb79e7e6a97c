"""The CUDA kernels' code, run on the host: every thread of it, under sanitizers, without a GPU.

The .cu files are compiled as C++ against `cuda_on_host`, which runs blocks and threads in random
order; each backward runs twice so, and has to give the same bits. What only a GPU has this cannot
show: test_dcnv3_gpu.py runs there.
"""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from tests import native
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
from xla_ops.geometry import Geometry

TYPES = ["float32", "float64", "bfloat16", "float16"]  # in the order of dcnv3::Type
PLAIN = settings_of(CASES["plain"])

pytestmark = [
    native.needs_compiler,
    pytest.mark.skipif(
        xla_ops.status()["cpu"].implementation != "kernel",
        reason=f"no kernel for CPU to compare with: {xla_ops.status()['cpu'].detail}",
    ),
]


@pytest.fixture(scope="module")
def program() -> Path:
    """Either of the two things that fuzz_dcnv3_cuda.cc does."""
    return native.cuda_program("fuzz_dcnv3_cuda.cc")


LARGE, NONE = 227 * 1024, 0  # shared memory of a block: of an H100; too little to use


def on_host(
    program: Path, *arrays: jax.Array, center: bool = False, shared: int = LARGE, **geometry: object
) -> list[np.ndarray]:
    """Output and gradients for x, offset, mask and dy, or for x, record and dy."""
    x, *points, dy = arrays
    g = Geometry(**geometry)  # type: ignore[arg-type]
    fused = len(points) == 1
    pairs = [p if isinstance(p, tuple) else (p, p) for p in (g.stride, g.pad, g.dilation)]
    header = [*x.shape[:3], *dy.shape[1:3], g.group, x.shape[-1] // g.group]
    header += [*g.kernel_size, *itertools.chain(*pairs), g.remove_center]
    header += [TYPES.index(x.dtype), TYPES.index(points[0].dtype), fused, center]
    sent = np.array(header, np.int64).tobytes() + np.float64(g.offset_scale).tobytes()
    sent += b"".join(np.asarray(a).tobytes() for a in arrays)
    done = subprocess.run([program, "call", str(shared)], input=sent, capture_output=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    results, start = [], 0
    for like in (dy, x, *points):
        results.append(np.frombuffer(done.stdout, like.dtype, like.size, start).reshape(like.shape))
        start += like.nbytes
    assert start == len(done.stdout)
    return results


def test_random_geometries_agree_with_the_definition(program: Path) -> None:
    assert "30 geometries" in native.run(program, "fuzz", "30")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_kernels_give_the_recorded_outputs_and_gradients(
    program: Path, name: str, dtype: str
) -> None:
    operands, wanted = recorded(name)
    arrays = [a.astype(dtype) for a in operands]
    for shared in (LARGE, NONE) if dtype == "float32" else (LARGE,):
        got = on_host(program, *arrays, shared=shared, **settings_of(CASES[name]))
        for key, array in zip(("output", *GRADIENTS), got, strict=True):
            if key in wanted:
                assert difference(array, wanted[key]) < TOLERANCE[dtype], (key, shared)


@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("bfloat16", "float32"), ("float16",) * 2])
@pytest.mark.parametrize("depth", [8, 48])
def test_half_precision_rounds_once(program: Path, dtypes: tuple[str, str], depth: int) -> None:
    arrays, geometry = fused_problem(dtypes, (2, 5, 6), 3, depth)
    got = on_host(program, *arrays, center=True, **geometry)
    exact = [np.asarray(a, np.float64) for a in arrays]
    expected = on_host(program, *exact, center=True, **geometry)  # held to 1e-11 above
    for name, a, b in zip(("y", "grad_x", "grad_record"), got, expected, strict=True):
        assert difference(a, b) < 2 * HALF[dtypes[0]], name


@pytest.mark.parametrize("operand", [0, 2, 3], ids=["x", "mask", "dy"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("depth", "shared"), [(5, LARGE), (16, LARGE), (16, NONE)])
def test_what_is_not_finite_reaches_as_far_as_in_the_cpu_kernel(
    program: Path, value: float, operand: int, depth: int, shared: int
) -> None:
    arrays = problem(7, "float32", PLAIN, (1, 6, 7), depth)
    arrays[operand] = arrays[operand].at[0, 0, 0, 0].set(value).at[0, -1, -1, -1].set(value)
    got = on_host(program, *arrays, shared=shared, **PLAIN)
    expected = value_and_gradients("kernel", *arrays, **PLAIN)  # itself held to the gather form
    for name, a, b in zip(("y", *GRADIENTS), got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4, err_msg=name)  # NaN and infinity alike
    assert not np.isfinite(got[0] if operand != 3 else got[1]).all()


def test_extreme_offsets_count_as_outside(program: Path) -> None:
    x, offset, mask, dy = problem(5, "float32", PLAIN, (2, 6, 7), 16)
    extremes = [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e9, -(2.0**31)]
    random = np.random.RandomState(6)
    hit = random.uniform(size=offset.shape) < 0.2
    offset = jnp.where(hit, random.choice(extremes, offset.shape).astype("float32"), offset)
    got = on_host(program, x, offset, mask, dy, **PLAIN)
    expected = value_and_gradients("kernel", x, offset, mask, dy, **PLAIN)
    for a, b in zip(got, expected, strict=True):
        assert np.isfinite(a).all() and difference(a, b) < 1e-5


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 4096), (1, 4096, 1), (0, 4, 4), (1, 2, 2)])
def test_maps_of_extreme_shapes(program: Path, size: tuple[int, int, int]) -> None:
    arrays = problem(8, "float32", PLAIN, size, 2 if max(size) > 16 else 16)
    got = on_host(program, *arrays, **PLAIN)
    expected = value_and_gradients("kernel", *arrays, **PLAIN)
    for a, b in zip(got, expected, strict=True):
        assert a.size == 0 or difference(a, b) < 1e-5


MAGNITUDES = [
    (1e-20, 1),
    (1e20, 1),
    (1e37, 1),
    (1, 1e-22),
    (1e-30, 1e30),
    (1, 1e-35),
    (1e30, 1e-30),
]


@pytest.mark.parametrize("shared", [LARGE, NONE])
@pytest.mark.parametrize(
    ("dtype", "of_dy", "of_mask"),
    [("float32", *pair) for pair in MAGNITUDES] + [("bfloat16", *pair) for pair in MAGNITUDES[-3:]],
)
def test_gradients_of_any_magnitude_keep_their_precision(
    program: Path, dtype: str, of_dy: float, of_mask: float, shared: int
) -> None:
    # The gradient of x is summed in fixed point, whose scale follows products of dy and the mask.
    arrays = problem(9, dtype, PLAIN, (1, 5, 5), 4)
    arrays[2] = arrays[2] * of_mask
    arrays[3] = arrays[3].at[..., 0].multiply(1e-6) * of_dy  # a channel much below the others
    exact = [np.asarray(a, np.float64) for a in arrays]
    got, expected = (on_host(program, *a, shared=shared, **PLAIN)[1] for a in (arrays, exact))
    for channel in (0, 1):
        error = difference(got[..., channel], expected[..., channel])
        assert error < (1e-5 if dtype == "float32" else 2 * HALF[dtype])


def test_mask_that_is_not_finite_in_one_image_leaves_the_others(program: Path) -> None:
    arrays = problem(10, "float32", PLAIN, (2, 5, 5), 4)
    clean = on_host(program, *arrays, **PLAIN)
    arrays[2] = arrays[2].at[0, 2, 2, 0].set(np.nan)
    got = on_host(program, *arrays, **PLAIN)
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_array_equal(a[1], b[1])


HALVES = [(a, b) for a in ("bfloat16", "float16") for b in (a, "float32")]


# What has whole maps in shared memory: the forward and the gradients of the records on tensor cores
# (dcnv3_cuda_tensor.h, dcnv3_cuda_dots.h), the gradient of x by channels (dcnv3_cuda_channels.h).
MAPS = [
    ((3, 5, 7), 2, 16, {}),
    ((2, 9, 11), 5, 16, {}),  # blocks of three groups and of two; rows have padding
    ((1, 13, 19), 4, 32, {"offset_scale": 2.0}),
    ((4, 9, 6), 1, 32, {"stride": 2}),
    ((2, 9, 6), 1, 64, {"stride": 2}),  # of these the gradient of x alone
    ((2, 8, 9), 2, 16, {"dilation": 2, "pad": 0}),
    ((3, 6, 5), 1, 32, {"stride": 2, "dilation": 3, "pad": 4}),
    ((4, 1, 1), 1, 16, {}),
    ((4, 1, 23), 1, 32, {}),
    ((4, 23, 1), 1, 16, {}),
    ((4, 23, 1), 1, 32, {}),
    ((3, 2, 2), 1, 32, {}),
    ((1, 52, 50), 1, 16, {}),  # blocks share a map, or the last of several
    ((9, 26, 25), 1, 16, {}),
]
# All dtypes with the first, one with each other.
OF_MAPS = [(*MAPS[0], dtypes) for dtypes in HALVES]
OF_MAPS += [(*maps, HALVES[i % len(HALVES)]) for i, maps in enumerate(MAPS[1:])]


@pytest.mark.parametrize(("size", "group", "depth", "changes", "dtypes"), OF_MAPS, ids=str)
def test_maps_in_shared_memory(
    program: Path,
    size: tuple[int, int, int],
    group: int,
    depth: int,
    changes: dict,
    dtypes: tuple[str, str],
) -> None:
    arrays, geometry = fused_problem(dtypes, size, group, depth, **changes)
    exact = [np.asarray(a, np.float64) for a in arrays]
    for center in (False, True) if arrays[0].shape == arrays[2].shape else (False,):
        got = on_host(program, *arrays, center=center, **geometry)
        expected = on_host(program, *exact, center=center, **geometry)  # held to 1e-11 above
        for name, a, b in zip(("y", "grad_x", "grad_record"), got, expected, strict=True):
            assert difference(a, b) < 2 * HALF[dtypes[0]], (name, center)


@pytest.mark.parametrize("dtypes", HALVES, ids="-".join)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["x", "dy", "offset", "mask", "centre"])
def test_maps_with_what_is_not_finite(
    program: Path, place: str, value: float, dtypes: tuple[str, str]
) -> None:
    arrays, geometry = fused_problem(dtypes, (3, 5, 6), 2, 16)
    if place in ("x", "dy"):
        which = 0 if place == "x" else 2
        arrays[which] = arrays[which].at[0, 2, 3, 5].set(value).at[0, 4, 5, 17].set(value)
    else:
        arrays[1] = arrays[1].at[0, 2, 3, {"offset": 0, "mask": 18, "centre": 27}[place]].set(value)
    got = on_host(program, *arrays, center=True, **geometry)
    exact = [np.asarray(a, np.float64) for a in arrays]
    expected = on_host(program, *exact, center=True, **geometry)
    tolerance = 4 * HALF[dtypes[0]]
    for name, a, b in zip(("y", "grad_x", "grad_record"), got, expected, strict=True):
        a = np.asarray(a, np.float64)
        np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=name)
        assert np.isfinite(a[1:]).all(), name


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("bfloat16", [3.3e38, -1.7e38, 1e-38, 1e-40]), ("float16", [65504, -6e-8])],
)
def test_a_slice_with_one_large_term_is_exact(
    program: Path, dtype: str, values: list[float]
) -> None:
    # One point of one position has all the weight, and is on a pixel.
    arrays, geometry = fused_problem((dtype, dtype), (2, 4, 5), 1, 16)
    x, rows, dy = (np.zeros(a.shape) for a in arrays)
    rows[..., 18:27] = -1e4
    rows[..., 18 + 4] = 1e4
    dy[:, 2, 3, : len(values)] = values
    arrays = [jnp.asarray(a, dtype) for a in (x, rows, dy)]
    np.testing.assert_array_equal(on_host(program, *arrays, **geometry)[1], arrays[2])

"""The CUDA kernels, on a GPU if there is one: every dtype and geometry, the same bits each time.

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_dcnv3_gpu.py

Without a GPU a CPU runs the same code (gpu.py); test_dcnv3_cuda.py does under sanitizers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from tests import gpu
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

PLAIN = settings_of(CASES["plain"])
DTYPES = ("float32", "float64", "bfloat16", "float16")

pytestmark = [gpu.needs_it(), needs_kernel]


def by_cuda(*arrays: jax.Array, **options: object) -> list[np.ndarray]:
    """Output and gradients of the CUDA kernels."""
    (results,) = often_by_cuda(1, *arrays, **options)
    return results


def often_by_cuda(times: int, *arrays: jax.Array, **options: object) -> list[list[np.ndarray]]:
    with gpu.kernels():
        return [_on(gpu.device(), *arrays, **options) for _ in range(times)]


def by_cpu(*arrays: jax.Array | np.ndarray, **options: object) -> list[np.ndarray]:
    """Output and gradients of the CPU's kernels."""
    return _on(jax.local_devices(backend="cpu")[0], *arrays, **options)


def _on(device: jax.Device, *arrays: jax.Array | np.ndarray, **options: object) -> list[np.ndarray]:
    local = [jax.device_put(a, device) for a in arrays]
    with jax.default_device(device):
        results = value_and_gradients("kernel", *local, **options)
    assert all(r.devices() == {device} for r in results)
    return [np.asarray(r) for r in results]


def assert_as_exact(arrays: list[jax.Array], dtype: str, **options: object) -> None:
    """Holds the CUDA kernels to the CPU's in float64, of the same inputs."""
    got = by_cuda(*arrays, **options)
    expected = by_cpu(*(np.asarray(a, np.float64) for a in arrays), **options)
    for array, exact in zip(got, expected, strict=True):
        assert array.shape == exact.shape
        assert array.size == 0 or difference(array, exact) < (
            TOLERANCE.get(dtype) or 2 * HALF[dtype]
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_recorded_outputs_and_gradients(name: str, dtype: str) -> None:
    operands, wanted = recorded(name)
    with jax.enable_x64(dtype == "float64"):
        got = by_cuda(*on_device(operands, dtype), **settings_of(CASES[name]))
    for key, array in zip(("output", *GRADIENTS), got, strict=True):
        if key in wanted:
            assert difference(array, wanted[key]) < TOLERANCE[dtype], key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 3, 8, 16, 32, 48])
def test_any_depth(depth: int, dtype: str) -> None:
    with jax.enable_x64(True):
        assert_as_exact(problem(0, dtype, PLAIN, (2, 9, 7), depth), dtype, **PLAIN)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(2, 9, 7), (1, 130, 101)])
def test_masks_much_below_the_gradient(size: tuple[int, int, int], dtype: str) -> None:
    # The gradient of x is summed in fixed point, in shared memory and in scratch memory.
    with jax.enable_x64(True):
        x, offset, mask, dy = problem(0, dtype, PLAIN, size, 8)
        assert_as_exact([x, offset, mask * 1e-30, dy], dtype, **PLAIN)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(0, 4, 4), (1, 1, 1), (1, 1, 2048), (2, 130, 101)])
def test_extreme_and_large_maps(size: tuple[int, int, int], dtype: str) -> None:
    arrays = problem(1, dtype, PLAIN, size, 8)
    got = by_cuda(*arrays, **PLAIN)
    expected = by_cpu(*arrays, **PLAIN)
    tolerance = TOLERANCE.get(dtype) or 4 * HALF[dtype]
    for array, other in zip(got, expected, strict=True):
        assert array.size == 0 or difference(array, other) < tolerance


@pytest.mark.parametrize(
    "dtypes", [("float32",) * 2, ("float64",) * 2, ("bfloat16", "float32"), ("float16",) * 2]
)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_fused_form(
    dtypes: tuple[str, str], center: bool, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setenv("INTERNIMAGE_CUDA_FORM", "global")
        jax.clear_caches()  # a program that has run may be a CUDA graph by now
    with jax.enable_x64(True):
        arrays, options = fused_problem(dtypes, (2, 14, 14), 4, 32)
        assert_as_exact(arrays, dtypes[0], **options, center_feature_scale=center)


@pytest.mark.parametrize(
    "dtypes", [("bfloat16",) * 2, ("float16",) * 2, ("bfloat16", "float32"), ("float16", "float32")]
)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    ("size", "group", "depth"),
    [
        ((3, 5, 7), 2, 16),
        ((2, 6, 1), 3, 32),
        # As many blocks as it takes there.
        gpu.large((140, 9, 11), 3, 16),
        gpu.large((140, 8, 10), 2, 32),
        gpu.large((64, 14, 14), 16, 16),
        gpu.large((40, 56, 56), 4, 32),
        # Blocks share maps, or the last of them.
        gpu.large((16, 56, 56), 4, 16),
        gpu.large((280, 26, 25), 1, 16),
    ],
    ids=str,
)
def test_maps_in_shared_memory(
    size: tuple[int, int, int], group: int, depth: int, center: bool, dtypes: tuple[str, str]
) -> None:
    with jax.enable_x64(True):
        arrays, options = fused_problem(dtypes, size, group, depth)
        assert_as_exact(arrays, dtypes[0], **options, center_feature_scale=center)


@pytest.mark.parametrize("array", [0, 1, 2], ids=["x", "record", "dy"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("size", [(4, 6, 7), gpu.large((140, 6, 7))], ids=str)
def test_maps_in_shared_memory_that_are_not_finite(
    size: tuple[int, int, int], value: float, array: int
) -> None:
    arrays, options = fused_problem(("bfloat16", "bfloat16"), size, 2, 16)
    arrays[array] = arrays[array].at[0, 2, 3, 5].set(value)
    options["center_feature_scale"] = True
    got, expected = by_cuda(*arrays, **options), by_cpu(*arrays, **options)
    for name, a, b in zip(("y", "grad_x", "grad_record"), got, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2, err_msg=name)


@pytest.mark.parametrize("column", [0, 18, 27], ids=["offset", "mask", "centre"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_records_that_are_not_finite(value: float, column: int) -> None:
    geometry = {"group": 2, "kernel_size": (3, 3), "stride": 1, "pad": 1, "dilation": 1}
    geometry |= {"offset_scale": 1.0, "remove_center": False}
    x, _, _, dy = problem(9, "float32", geometry, (2, 6, 7), 16)
    rows = np.random.RandomState(4).standard_normal((2, 6, 7, xla_ops.Record(2, 9).width))
    rows[0, 2, 3, column] = value  # of one group of one image
    arrays = [x, *on_device([rows], "float32"), dy]
    options = {"group": 2, "center_feature_scale": True}
    got, expected = by_cuda(*arrays, **options), by_cpu(*arrays, **options)
    for name, a, b in zip(("y", "grad_x", "grad_record"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)
    assert np.isfinite(got[1][1]).all() and np.isfinite(got[1][..., 16:]).all()


@pytest.mark.parametrize("operand", [0, 1, 2, 3], ids=["x", "offset", "mask", "dy"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_operands_that_are_not_finite(value: float, operand: int) -> None:
    arrays = problem(7, "float32", PLAIN, (1, 6, 7), 16)
    arrays[operand] = arrays[operand].at[0, 0, 0, 0].set(value).at[0, -1, -1, -1].set(value)
    got = by_cuda(*arrays, **PLAIN)
    expected = by_cpu(*arrays, **PLAIN)
    for name, a, b in zip(("y", *GRADIENTS), got, expected, strict=True):
        # A channel's sums have one scale, 46 bits below what they cannot exceed.
        unit = 1e30 / 2**40 if name == "grad_x" and value == 1e30 and operand >= 2 else 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 + unit, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("size", "group"),
    [((2, 28, 28), 4), gpu.large((64, 28, 28), 8), gpu.large((16, 56, 56), 4)],
    ids=str,
)
def test_sums_in_shared_memory(size: tuple[int, int, int], group: int, dtype: str) -> None:
    options = PLAIN | {"group": group}
    with jax.enable_x64(True):
        assert_as_exact(problem(8, dtype, options, size, 16), dtype, **options)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((4, 56, 56), "bfloat16"), ((4, 56, 56), "float32"), ((1, 130, 130), "float32")],
)
def test_gradients_are_the_same_bits_each_time(size: tuple[int, int, int], dtype: str) -> None:
    arrays = problem(4, dtype, PLAIN, size, 16, spread=4)
    first, *others = often_by_cuda(6, *arrays, **PLAIN)
    for other in others:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, other, strict=True))


def test_a_call_within_a_larger_program_and_under_vmap() -> None:
    arrays = problem(5, "float32", PLAIN, (4, 8, 8), 16)
    x, offset, mask, _ = (jax.device_put(a, gpu.device()) for a in arrays)

    @jax.jit
    def run(x: jax.Array, offset: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = lambda *a: xla_ops.dcnv3(*(b[None] for b in a), **PLAIN, implementation="kernel")  # noqa: E731
        y = jnp.tanh(x @ jnp.eye(x.shape[-1]))
        plain = xla_ops.dcnv3(y, offset, mask, **PLAIN, implementation="kernel")
        return plain, jax.vmap(one)(y, offset, mask)[:, 0]

    with gpu.kernels():
        plain, mapped = run(x, offset, mask)
    np.testing.assert_array_equal(plain, mapped)

"""LayerNorm, alone and beside an addition: kernel, definition, and flax's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.layers import TOLERANCE, assert_close, needs_kernel, on_device
from tests.transforms import check_transforms
from xla_ops import _ffi, add_norm, layer_norm, norm_add

SHAPES = [(2, 3, 5, 37), (1, 2, 2, 64), (3, 1, 1, 1), (1, 7, 1, 112), (1, 1, 2, 2560), (0, 2, 2, 8)]
KERNEL = pytest.param("kernel", marks=needs_kernel)


def operands(shape: tuple[int, ...] = (4, 5, 3, 24), dtype: str = "float32") -> list[jax.Array]:
    """x, scale and bias."""
    normal = np.random.RandomState(0).standard_normal
    arrays = 2 * normal(shape) + 3, 1 + 0.2 * normal(shape[-1]), normal(shape[-1])
    return on_device(arrays, dtype)


def operands_of_add(
    shape: tuple[int, ...] = (4, 5, 3, 24), dtype: str = "float32"
) -> list[jax.Array]:
    """x, residual, scale and bias."""
    x, *vectors = operands(shape, dtype)
    return [x, *on_device([np.random.RandomState(1).standard_normal(shape)], dtype), *vectors]


def in_float64(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> np.ndarray:
    x, scale, bias = (np.asarray(a, np.float64) for a in (x, scale, bias))
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return y * scale + bias


@pytest.mark.parametrize("implementation", ["jnp", KERNEL, None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_agrees_with_float64(dtype: str, implementation) -> None:
    run = jax.jit(functools.partial(layer_norm, epsilon=1e-3, implementation=implementation))
    for shape in SHAPES:
        with jax.enable_x64(True):
            x, scale, bias = operands(shape, dtype)
            got = run(x, scale, bias)
            assert got.dtype == dtype
            assert_close(got, in_float64(x, scale, bias, 1e-3), 2 * TOLERANCE[dtype])
            if dtype in ("bfloat16", "float16"):
                vectors = (a.astype("float32") + 2.0**-20 for a in (scale, bias))
                assert_close(run(x, *vectors), got, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["jnp", KERNEL, None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_norm_agrees_with_float64(dtype: str, implementation) -> None:
    run = jax.jit(functools.partial(add_norm, epsilon=1e-3, implementation=implementation))
    for shape in SHAPES:
        with jax.enable_x64(True):
            x, residual, scale, bias = operands_of_add(shape, dtype)
            total, got = run(x, residual, scale, bias)
            assert total.dtype == got.dtype == dtype
            np.testing.assert_array_equal(total, x + residual)
            # Compiled by XLA, the jnp form may normalise the sum before it is rounded.
            exact = in_float64(total, scale, bias, 1e-3)
            assert_close(got, exact, (4 if implementation == "jnp" else 2) * TOLERANCE[dtype])
            if dtype in ("bfloat16", "float16"):
                vectors = (a.astype("float32") + 2.0**-20 for a in (scale, bias))
                assert_close(run(x, residual, *vectors)[1], got, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["jnp", KERNEL, None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_add_agrees_with_float64(dtype: str, implementation) -> None:
    run = jax.jit(functools.partial(norm_add, epsilon=1e-3, implementation=implementation))
    for shape in SHAPES:
        with jax.enable_x64(True):
            x, residual, scale, bias = operands_of_add(shape, dtype)
            got = run(x, residual, scale, bias)
            assert got.dtype == dtype
            exact = in_float64(x, scale, bias, 1e-3) + np.asarray(residual, np.float64)
            assert_close(got, exact, 2 * TOLERANCE[dtype])
            if dtype in ("bfloat16", "float16"):
                vectors = (a.astype("float32") + 2.0**-20 for a in (scale, bias))
                assert_close(run(x, residual, *vectors), got, 2 * TOLERANCE[dtype])


@needs_kernel
def test_rows_that_threads_do_not_share_evenly() -> None:
    arrays = operands((1, 41, 41, 64))
    by_kernel, by_jnp = (layer_norm(*arrays, implementation=form) for form in ("kernel", "jnp"))
    assert_close(by_kernel, by_jnp, 2e-6)


@needs_kernel
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_in_half_precision_is_the_nearest_number(dtype: str) -> None:
    """Ties go to even, and that to infinity; in whole vectors and in the channels left over."""
    info = jnp.finfo(dtype)
    largest, eps = float(info.max), float(info.eps)
    last = largest * eps / (2 - eps)  # step of the numbers before `largest`
    # A CPU's threads have no subnormal numbers in float32, and so none in bfloat16.
    small = float(info.smallest_subnormal if dtype == "float16" else info.tiny)
    terms = [(largest, last / 2), (largest, last / 4), (largest, largest), (-largest, -last / 2)]
    terms += [(1, eps / 2), (1 + eps, eps / 2), (1, eps * 0.75), (-1, -eps / 2), (-0.0, -0.0)]
    terms += [(small, 0), (small, small), (-small, -2 * small), (np.inf, -1), (np.nan, 1)]
    exact = np.resize(np.array(terms), (64 + len(terms), 2)).T[:, None, None, None]
    x, residual = (jnp.asarray(a, dtype) for a in exact)
    unit = jnp.ones(x.shape[-1], dtype)
    total, _ = add_norm(x, residual, unit, unit, implementation="kernel")
    with np.errstate(over="ignore"):
        wanted = exact.sum(0).astype(total.dtype)
    np.testing.assert_array_equal(np.asarray(total, "float64"), wanted.astype("float64"))


@needs_kernel
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_nan_of_any_bits_stays_one_in_half_precision(dtype: str) -> None:
    nan = np.resize(np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], "uint32"), 75).view("float32")
    x = operands((1, 2, 3, 75), dtype)[0]
    assert jnp.isnan(layer_norm(x, jnp.ones(75), jnp.asarray(nan), implementation="kernel")).all()


def test_operators_alike_are_not_taken_for_each_other() -> None:
    """What was traced is found by operator and operands, and these have equal operands."""
    arrays = operands_of_add()
    total, normalized = add_norm(*arrays)
    assert_close(norm_add(*arrays), layer_norm(arrays[0], *arrays[2:]) + arrays[1], 2e-6)
    assert_close(add_norm(*arrays), (total, normalized), 0)


@pytest.mark.parametrize("implementation", ["jnp", KERNEL])
def test_is_exact_where_the_mean_is_large(implementation) -> None:
    x = jnp.asarray(np.random.RandomState(0).standard_normal((1, 1, 1, 16)) * 1e-2 + 300, "float32")
    # The mean is rounded: 300 has steps of 3e-5.
    got = layer_norm(x, jnp.ones(16), jnp.zeros(16), implementation=implementation)
    np.testing.assert_allclose(got, in_float64(x, np.ones(16), np.zeros(16), 1e-6), atol=1e-2)


def test_agrees_with_flax() -> None:
    x, scale, bias = operands()
    norm = nnx.LayerNorm(24, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = scale, bias
    assert_close(layer_norm(x, scale, bias), norm(x), 2e-6)


@pytest.mark.parametrize("implementation", ["jnp", KERNEL])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_not_finite_stays_in_its_row(dtype: str, implementation) -> None:
    x, scale, bias = operands((1, 3, 7, 20), dtype)
    spoilt = x.at[0, 0, 2, 3].set(jnp.nan).at[0, 1, 1, 19].set(jnp.inf)
    got, wanted = (layer_norm(a, scale, bias, implementation=implementation) for a in (spoilt, x))
    rows = np.zeros((1, 3, 7), bool)
    rows[0, 0, 2] = rows[0, 1, 1] = True
    assert np.isnan(got[rows]).all()
    np.testing.assert_array_equal(got[~rows], wanted[~rows])


@needs_kernel
def test_transforms() -> None:
    check_transforms(layer_norm, operands(), "internimage_layer_norm_forward")
    check_transforms(add_norm, operands_of_add(), "internimage_add_norm_forward")
    check_transforms(norm_add, operands_of_add(), "internimage_norm_add_forward")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: jnp.zeros((2, 24))}, r"x: expected shape \(N, H, W, C\)"),
        ({0: jnp.zeros((1, 1, 1, 24), int)}, "x: expected one of float32"),
        ({1: jnp.zeros(8)}, r"scale: expected shape \(24,\) and dtype float32, got \(8,\)"),
        ({1: jnp.zeros(24, "bfloat16")}, "scale: .* and bfloat16"),
        ({2: jnp.zeros(24, "float16")}, "bias: .* dtype float32, got .* and float16"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[int, jax.Array], message: str) -> None:
    arrays = [changes.get(i, a) for i, a in enumerate(operands())]
    with pytest.raises(ValueError, match=message):
        layer_norm(*arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: jnp.zeros((2, 24))}, r"x: expected shape \(N, H, W, C\)"),
        ({1: jnp.zeros(24)}, r"residual: expected shape \(4, 5, 3, 24\) .*, got \(24,\)"),
        ({1: jnp.zeros((4, 5, 3, 24), "bfloat16")}, "residual: .* dtype float32, got .* bfloat16"),
        ({3: jnp.zeros(8)}, r"bias: expected shape \(24,\)"),
    ],
)
def test_what_does_not_fit_an_addition_is_named(
    changes: dict[int, jax.Array], message: str
) -> None:
    arrays = [changes.get(i, a) for i, a in enumerate(operands_of_add())]
    for operator in (add_norm, norm_add):
        with pytest.raises(ValueError, match=message):
            operator(*arrays)


def test_settings_that_are_none_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"epsilon: expected a number of at least 0, got -1"):
        layer_norm(*operands(), epsilon=-1)
    with pytest.raises(ValueError, match="expected 'kernel', 'jnp' or None, got 'fast'"):
        layer_norm(*operands(), implementation="fast")  # type: ignore[arg-type]
    monkeypatch.setattr(_ffi, "serving", lambda target: ())
    with pytest.raises(ValueError, match="no 'kernel' to serve here"):
        layer_norm(*operands(), implementation="kernel")
    with pytest.raises(ValueError, match="no 'kernel' to serve here"):
        add_norm(*operands_of_add(), implementation="kernel")
    with pytest.raises(ValueError, match="no 'kernel' to serve here"):
        norm_add(*operands_of_add(), implementation="kernel")

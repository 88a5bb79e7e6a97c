"""The convolution of stem and downsampling: kernel, XLA's, patches, and torch's."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers import TOLERANCE, assert_close, for_cuda, kernel, kernel_serves, on_device
from tests.transforms import check_transforms
from xla_ops import _ffi, convolution
from xla_ops.convolution import by_patches, by_xla

SIDES = [(1, 1), (1, 2), (2, 1), (5, 8), (14, 7), (3, 3)]


def operands(
    shape: tuple[int, ...] = (4, 6, 5, 3), outputs: int = 8, dtype: str = "float32"
) -> list[jax.Array]:
    """x, kernel and bias."""
    normal = np.random.RandomState(0).standard_normal
    arrays = normal(shape), normal((3, 3, shape[-1], outputs)) / 3, normal(outputs)
    return on_device(arrays, dtype)


def in_float64(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> np.ndarray:
    """The sum over taps, written out."""
    x, kernel, bias = (np.asarray(a, np.float64) for a in (x, kernel, bias))
    n, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((n, (h + 1) // 2, (w + 1) // 2, kernel.shape[-1])) + bias
    for i in range(3):
        for j in range(3):
            y += padded[:, i : i + h : 2, j : j + w : 2] @ kernel[i, j]
    return y


@pytest.mark.parametrize("implementation", ["jnp", kernel(), None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_agrees_with_float64(dtype: str, implementation) -> None:
    if implementation == "kernel" and dtype == "float64":
        pytest.skip("the kernel does not take float64")
    shapes = [((2, *sides, 3), 8) for sides in SIDES]
    shapes += [
        ((3, 33, 17, 40), 72),
        ((1, 20, 14, 64), 40),  # more than one depth
        ((0, 4, 4, 8), 8),
    ]  # nothing is full
    for shape, outputs in shapes:
        with jax.enable_x64(True):
            arrays = operands(shape, outputs, dtype)
            run = jax.jit(functools.partial(convolution, implementation=implementation))
            got = run(*arrays)
            assert got.dtype == dtype
            assert_close(got, in_float64(*arrays), 4 * TOLERANCE[dtype])
            without = run(*arrays[:2])
        assert_close(without, in_float64(*arrays[:2], jnp.zeros(outputs)), 4 * TOLERANCE[dtype])


def test_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    x, kernel, bias = operands((2, 9, 12, 5), 7)
    nchw, oihw = np.transpose(x, (0, 3, 1, 2)), np.transpose(kernel, (3, 2, 0, 1))
    tensors = [torch.tensor(np.array(a)) for a in (nchw, oihw, bias)]
    wanted = torch.nn.functional.conv2d(*tensors, stride=2, padding=1)
    assert_close(convolution(x, kernel, bias), wanted.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("sides", SIDES)
def test_a_product_over_patches_is_the_convolution(sides: tuple[int, int]) -> None:
    x, kernel, _ = operands((2, *sides, 6))
    for of in (
        lambda f: f(x, kernel),
        lambda f: jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1))(x, kernel),
    ):
        assert_close(of(jax.jit(by_patches)), of(jax.jit(by_xla)))


def test_a_small_one_is_a_product_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = operands()
    program = functools.partial(convolution, implementation=None)
    assert "stablehlo.convolution" not in for_cuda(program, *arrays)
    monkeypatch.setattr(sys.modules["xla_ops.convolution"], "LARGEST_PATCHES", 0)
    assert "stablehlo.convolution" in for_cuda(lambda *a: program(*a), *arrays)


@kernel_serves
def test_transforms() -> None:
    check_transforms(convolution, operands(), "internimage_convolution_forward")


@kernel_serves
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_stays_where_it_is(dtype: str) -> None:
    x, kernel, bias = operands((2, 9, 11, 5), 37, dtype)
    x = x.at[0, 3, 4, 2].set(jnp.nan).at[1, 8, 10, 4].set(jnp.inf)
    got, wanted = (convolution(x, kernel, bias, implementation=i) for i in ("kernel", "jnp"))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(wanted))
    finite = np.isfinite(wanted)
    assert_close(got[finite], wanted[finite], 4 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: jnp.zeros((2, 3))}, r"x: expected shape \(N, H, W, C\)"),
        ({0: jnp.zeros((2, 0, 5, 3))}, r"x: .* H, W and C at least 1, got \(2, 0, 5, 3\)"),
        ({0: jnp.zeros((1, 1, 1, 3), int)}, "x: expected one of float32"),
        ({1: jnp.zeros((3, 3, 4, 8))}, r"kernel: expected shape \(3, 3, 3, K\)"),
        ({1: jnp.zeros((5, 5, 3, 8))}, r"kernel: expected shape \(3, 3, 3, K\)"),
        ({1: jnp.zeros((3, 3, 3, 0))}, "kernel: .* K at least 1"),
        ({1: jnp.zeros((3, 3, 3, 8), "bfloat16")}, "kernel: .* and bfloat16"),
        ({2: jnp.zeros(4)}, r"bias: expected shape \(8,\)"),
        ({2: jnp.zeros(8, "float16")}, "bias: .* and float16"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[int, jax.Array], message: str) -> None:
    arrays = [changes.get(i, a) for i, a in enumerate(operands())]
    with pytest.raises(ValueError, match=message):
        convolution(*arrays)


def test_an_implementation_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected 'kernel', 'jnp' or None, got 'fast'"):
        convolution(*operands(), implementation="fast")  # type: ignore[arg-type]
    with jax.enable_x64(True), pytest.raises(ValueError, match="it does not take float64"):
        convolution(*operands(dtype="float64"), implementation="kernel")
    monkeypatch.setattr(_ffi, "serving", lambda target: ())
    with pytest.raises(ValueError, match="no 'kernel' to serve here"):
        convolution(*operands(), implementation="kernel")

"""Two products with GELU between them: the kernel on a CPU, and what serves elsewhere."""

from __future__ import annotations

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers import TOLERANCE, assert_close, for_cuda, kernel, kernel_serves, on_device
from tests.transforms import check_transforms
from xla_ops import _ffi, _targets, linear, mlp
from xla_ops.mlp import LEAST_PIXELS

mlp_module = sys.modules["xla_ops.mlp"]  # as a name of the package it is the operator

CALL = "@internimage_mlp_forward"
# Channels, and those between the products and of the result.
SHAPES = [
    ((4, 5, 3, 16), 24, 8),
    ((1, 21, 23, 64), 270, 64),  # tiles, strips and parts, some not full
    ((2, 7, 7, 72), 600, 40),
    ((1, 20, 21, 520), 64, 33),  # more rows than a tile's, more inputs than `linear` takes at once
    ((1, 9, 13, 1030), 90, 33),
    ((1, 1, 1, 1), 1, 1),
    ((0, 7, 7, 80), 128, 80),
]


def operands(
    shape: tuple[int, ...] = (4, 5, 3, 16),
    hidden: int = 24,
    outputs: int = 8,
    dtype: str = "float32",
) -> list[jax.Array]:
    """x, kernels and biases, in the operator's order."""
    normal = np.random.RandomState(0).standard_normal
    kernels = [normal(s) / np.sqrt(s[0]) for s in ((shape[-1], hidden), (hidden, outputs))]
    arrays = normal(shape), kernels[0], normal(hidden), kernels[1], normal(outputs)
    return on_device(arrays, dtype)


def apart(x, kernel1, bias1, kernel2, bias2, implementation=None) -> jax.Array:
    hidden = linear(x, kernel1, bias1, gelu=True, implementation=implementation)
    return linear(hidden, kernel2, bias2, implementation=implementation)


@pytest.mark.parametrize("implementation", ["jnp", kernel(), None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_agrees_with_float64(dtype: str, implementation) -> None:
    if implementation == "kernel" and dtype == "float64":
        pytest.skip("the kernel does not take float64")
    for shape in SHAPES:
        with jax.enable_x64(True):
            arrays = operands(*shape, dtype)
            got = jax.jit(functools.partial(mlp, implementation=implementation))(*arrays)
            x, kernel1, bias1, kernel2, bias2 = (np.asarray(a, np.float64) for a in arrays)
            z = jnp.asarray(x @ kernel1 + bias1)
            wanted = np.asarray(jax.nn.gelu(z, approximate=False)) @ kernel2 + bias2
        assert got.dtype == dtype
        assert_close(got, wanted, 8 * TOLERANCE[dtype])


@kernel_serves
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_same_bits_as_two_products(dtype: str) -> None:
    for shape in SHAPES:
        arrays = operands(*shape, dtype)
        got, wanted = (f(*arrays, implementation="kernel") for f in (mlp, apart))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted), str(shape))


@kernel_serves
def test_a_bias_in_float32() -> None:
    x, kernel1, bias1, kernel2, bias2 = operands(dtype="bfloat16")
    biases = [bias.astype("float32") + 2.0**-20 for bias in (bias1, bias2)]
    mixed = (x, kernel1, biases[0], kernel2, biases[1])
    got, wanted = (f(*mixed, implementation="kernel") for f in (mlp, apart))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


@kernel_serves
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs", [40, 160])
def test_what_is_not_finite(inputs: int, dtype: str) -> None:
    """Each such row comes out as arithmetic has it, and others do not notice."""
    largest = float(jnp.finfo(dtype).max)
    x, kernel1, bias1 = np.ones((1, 9, 9, inputs)), np.zeros((inputs, 130)), np.zeros(130)
    kernel1[:40] = 1 / 32  # the last of the inputs do not count
    kernel2, bias2 = np.zeros((130, 36)), np.arange(36.0)
    kernel2[:64] = 1 / 16
    x[0, 0, 3, 7], x[0, 5, 5, 39] = np.nan, np.inf
    x[0, 8, 8, 0] = -np.inf  # GELU makes zero of it
    x[0, 7, 7, 5] = largest  # of which float32's first piece is infinite, but not the sum
    arrays = on_device((x, kernel1, bias1, kernel2, bias2), dtype)
    got = np.asarray(mlp(*arrays, implementation="kernel"), np.float64)
    with np.errstate(invalid="ignore"):
        z = x @ kernel1
        hidden = np.where(z == -np.inf, 0, np.asarray(jax.nn.gelu(z, approximate=False)))
        wanted = hidden.astype(dtype).astype("float64") @ kernel2 + bias2
    rtol = 0.02 if dtype == "bfloat16" else 1e-6
    np.testing.assert_allclose(got, wanted, rtol, atol=1e-30)  # GELU's tail ends at -12.9
    assert np.isfinite(got[0, 7:9, 7:9]).all() and not np.isfinite(got[0, 0, 3]).any()


@kernel_serves
def test_a_sum_that_is_finite_though_its_pieces_sums_are_not() -> None:
    """Twice the first piece is minus infinity, and GELU would make zero of that."""
    x, large = np.zeros((1, 7, 7, 160)), 2.0**127 - 2.0**116
    x[0, 1, 1, :2], x[0, 1, 1, 32:129:32], x[0, 1, 1, 129:] = -large, large / 2, 1
    arrays = x, np.ones((160, 64)), np.zeros(64), np.eye(64)[:, :40], np.zeros(40)
    got = mlp(*(jnp.asarray(a, "float32") for a in arrays), implementation="kernel")
    np.testing.assert_array_equal(got[0, 1, 1], np.full(40, 31))
    assert not got[0, 1, 0].any()


@kernel_serves
def test_other_rows_do_not_matter() -> None:
    """Nor do threads and tiles: each sum runs in one order."""
    x, *parameters = operands((3, 20, 20, 96), 300, 96)
    x = x.at[0, 3, 4, 5].set(jnp.inf).at[1, 6, 7, 8].set(jnp.nan)
    run = jax.jit(functools.partial(mlp, implementation="kernel"))
    whole = np.asarray(run(x, *parameters))
    finite = np.asarray(run(jnp.nan_to_num(x, posinf=0), *parameters))
    rows = np.isfinite(x).all(-1)
    np.testing.assert_array_equal(whole[rows], finite[rows])
    part = np.asarray(run(x[1:2, 5:], *parameters))
    np.testing.assert_array_equal(part, whole[1:2, 5:])


@kernel_serves
def test_transforms_of_the_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_module, "_pays", lambda *_: True)
    check_transforms(mlp, operands(), _targets.MLP_FORWARD, shared=4)


@kernel_serves
def test_it_is_two_products_where_there_are_few_pixels_and_on_a_gpu_that_has_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def text_of(pixels: int) -> str:
        return jax.jit(mlp).lower(*operands((1, 1, pixels, 64))).as_text()

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    many = 3 * LEAST_PIXELS
    assert CALL in text_of(many) and "linear" not in text_of(many)
    assert CALL not in text_of(many - 1) and "@internimage_linear_gelu_forward" in text_of(many - 1)
    there = {_targets.MLP_FORWARD: ("cpu",)}
    monkeypatch.setattr(_ffi, "serving", lambda target: there.get(target, ("cpu", "cuda")))
    arrays = operands((1, 1, many, 64), 64, 64, "bfloat16")
    text = for_cuda(mlp, *arrays)
    assert CALL not in text and "@internimage_linear_gelu_forward" in text


def test_a_program_for_cuda_has_the_kernel_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))

    def has_it(pixels: int, channels: int, hidden: int, outputs: int, dtype="bfloat16") -> bool:
        shapes = (
            (1, 1, pixels, channels),
            (channels, hidden),
            (hidden,),
            (hidden, outputs),
            (outputs,),
        )
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        return CALL in for_cuda(mlp, *arrays)

    many = mlp_module.LEAST_PIXELS_ON_CUDA
    assert has_it(many, 64, 256, 64) and has_it(many, 80, 320, 80, "float16")
    assert not has_it(many - 1, 64, 256, 64) and not has_it(many, 64, 256, 64, "float32")
    assert not has_it(many, 128, 512, 128) and not has_it(many, 64, 256, 72)
    assert not has_it(many, 64, 320, 64) and not has_it(many, 64, 96, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: jnp.zeros((2, 16))}, r"x: expected shape \(N, H, W, C\)"),
        ({1: jnp.zeros((8, 24))}, r"kernel1: expected shape \(16, K\)"),
        ({2: jnp.zeros(32)}, r"bias1: expected shape \(24,\)"),
        ({3: jnp.zeros((16, 8))}, r"kernel2: expected shape \(24, K\)"),
        ({3: jnp.zeros((24, 8), "bfloat16")}, "kernel2: .* and bfloat16"),
        ({4: jnp.zeros(9)}, r"bias2: expected shape \(8,\)"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[int, jax.Array], message: str) -> None:
    arrays = [changes.get(i, a) for i, a in enumerate(operands())]
    with pytest.raises(ValueError, match=message):
        mlp(*arrays)


@kernel_serves
def test_kernels_for_different_numbers_of_rows_are_refused() -> None:
    """Only a call by hand has them: `vmap` gives all parameters an axis."""
    x, *first = operands((2, 3, 3, 16))
    second = [jnp.zeros((2, 24, 8)), jnp.zeros((2, 8))]
    result = jax.ShapeDtypeStruct((2, 3, 3, 8), x.dtype)
    call = jax.ffi.ffi_call(_targets.MLP_FORWARD, result)
    with pytest.raises(Exception, match="the leading axes of both kernels differ"):
        jax.block_until_ready(call(x, *first[:2], *second, version=np.int64(_targets.VERSION)))


def test_an_implementation_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected 'kernel', 'jnp' or None, got 'cuda'"):
        mlp(*operands(), implementation="cuda")
    monkeypatch.setattr(_ffi, "serving", lambda target: ())
    with pytest.raises(ValueError, match="no 'kernel' to serve here"):
        mlp(*operands(), implementation="kernel")

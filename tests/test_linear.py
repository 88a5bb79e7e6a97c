"""Products with bias and GELU: the kernel on a CPU, what serves elsewhere, programs for CUDA.

The CUDA kernel itself is tested in test_layers_cuda.py, on the host, and in test_layers_gpu.py.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import xla_ops
from tests.layers import (
    TOLERANCE,
    assert_close,
    for_cuda,
    kernel,
    kernel_serves,
    mesh,
    on_device,
)
from tests.transforms import check_transforms
from xla_ops import _ffi, _targets, linear

CALL = "@internimage_linear_gelu_forward"

gelu_of = functools.partial(linear, gelu=True)
BEST = xla_ops.status()["cpu"].detail
# Those besides the one that these tests run on.
INSTRUCTION_SETS = {
    "avx512": ["avx2"],
    "avx512bf16": ["avx2", "avx512"],
    "avx512 and amx": ["avx2", "avx512", "avx512bf16"],
}.get(BEST, [])


def operands(
    shape: tuple[int, ...] = (4, 5, 3, 16), outputs: int = 24, dtype: str = "bfloat16"
) -> list[jax.Array]:
    """x, kernel and bias."""
    normal = np.random.RandomState(0).standard_normal
    arrays = normal(shape), normal((shape[-1], outputs)) / np.sqrt(shape[-1]), normal(outputs)
    return on_device(arrays, dtype)


def value_and_gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sin(gelu_of(*arrays).astype("float32")).sum()

    return gelu_of(*arrays), *jax.grad(loss, (0, 1, 2))(*arrays)


@pytest.fixture
def cuda_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))


@pytest.mark.parametrize("implementation", ["jnp", kernel(), None])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gelu", [True, False])
def test_agrees_with_float64(dtype: str, implementation, gelu: bool) -> None:
    if implementation == "kernel" and dtype == "float64":
        pytest.skip("the kernel does not take float64")
    # Several tiles, panels and depths, none full; whole ones; rows that are copied; nothing.
    for shape, outputs in (
        ((4, 5, 3, 16), 24),
        ((2, 9, 13, 300), 290),
        ((1, 15, 15, 256), 64),
        ((1, 2, 3, 1024), 17),
        ((1, 5, 6, 515), 40),
        ((1, 1, 1, 1), 1),
        ((0, 2, 2, 8), 8),
        ((0, 7, 7, 160), 8),
    ):
        with jax.enable_x64(True):
            arrays = operands(shape, outputs, dtype)
            got = jax.jit(functools.partial(linear, gelu=gelu, implementation=implementation))(
                *arrays
            )
            x, kernel, bias = (np.asarray(a, np.float64) for a in arrays)
            z = jnp.asarray(x @ kernel + bias)
            wanted = jax.nn.gelu(z, approximate=False) if gelu else z
        assert got.dtype == dtype
        # XLA's product is rounded, and so may the bias be.
        assert_close(got, wanted, 4 * TOLERANCE[dtype])


@kernel_serves
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_bias_in_float32(dtype: str) -> None:
    x, kernel, bias = operands((1, 3, 3, 40), 56, dtype)
    mixed = linear(x, kernel, bias.astype("float32") + 2.0**-20, implementation="kernel")
    assert mixed.dtype == dtype
    assert_close(mixed, linear(x, kernel, bias, implementation="kernel"), TOLERANCE[dtype])


@kernel_serves
def test_sets_of_parameters_with_biases_in_float32() -> None:
    sets = [operands((2, 3, 3, 40), 56) for _ in range(3)]
    x, kernel, bias = (
        jnp.stack([(i + 1) * a for i, a in enumerate(s)]) for s in zip(*sets, strict=True)
    )
    bias = bias.astype("float32")
    run = functools.partial(linear, implementation="kernel")
    each = [run(*arrays) for arrays in zip(x, kernel, bias, strict=True)]
    np.testing.assert_array_equal(jax.vmap(run)(x, kernel, bias), jnp.stack(each))


@kernel_serves
def test_what_a_thread_has_from_the_call_before_is_not_read() -> None:
    """Rows of an odd number of inputs are copied with one number more."""
    arrays = operands((1, 5, 6, 301), 40)
    wanted = linear(*arrays, implementation="jnp")
    for _ in range(4):
        linear(*(a * jnp.nan for a in operands((1, 5, 6, 303), 40)), implementation="kernel")
        got = linear(*arrays, implementation="kernel")
        assert_close(got, wanted, 4 * TOLERANCE["bfloat16"])


@kernel_serves
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("inputs", [40, 160, 600])
def test_what_is_not_finite(inputs: int, dtype: str, gelu: bool) -> None:
    x, kernel, bias = np.ones((1, 9, 9, inputs)), np.ones((inputs, 72)), np.zeros(72)
    x[0, 0, 3, 7], x[0, 5, 5, 39], x[0, 8, 8, 0] = np.nan, np.inf, -np.inf
    bias[5], bias[11] = np.nan, -np.inf
    arrays = on_device((x, kernel, bias), dtype)
    got = linear(*arrays, gelu=gelu, implementation="kernel")
    with np.errstate(invalid="ignore"):
        z = x @ kernel + bias
    wanted = np.where(z == -np.inf, 0, z) if gelu else z
    # Far out GELU stays what it is at -12.9, which bfloat16 tells from zero.
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0, atol=1e-30)


@kernel_serves
@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("inputs", [1, 128, 1100])
def test_each_product_is_as_exact_as_float32(inputs: int, largest: bool) -> None:
    """Sums hide what a product loses, so each here has one: the last bits of both factors count."""
    stream = np.random.RandomState(0)
    x = np.zeros((2, 7, 7, inputs), np.float32)
    place, value = stream.randint(inputs, size=x.shape[:-1]), stream.standard_normal(x.shape[:-1])
    np.put_along_axis(x, place[..., None], value[..., None].astype("float32"), -1)
    x[0, 0, 0] *= np.float32(2.0**-80)
    if largest:
        x[0, 0, 1, place[0, 0, 1]] = np.finfo("float32").max
    kernel = stream.uniform(0.25, 0.75, (inputs, 150)).astype("float32")
    got = linear(jnp.asarray(x), jnp.asarray(kernel), jnp.zeros(150), implementation="kernel")
    wanted = x.astype("float64") @ kernel.astype("float64")
    np.testing.assert_allclose(np.asarray(got, "float64"), wanted, rtol=2.0**-23, atol=0)


@kernel_serves
def test_other_rows_do_not_matter() -> None:
    """Nor do threads and tiles: each sum runs in one order."""
    x, kernel, bias = operands((3, 20, 20, 300), 128, "float32")
    x = x.at[0, 3, 4, 5].set(jnp.inf).at[1, 6, 7, 8].set(jnp.nan)
    run = jax.jit(functools.partial(linear, gelu=True, implementation="kernel"))
    whole = np.asarray(run(x, kernel, bias))
    finite = np.asarray(run(jnp.nan_to_num(x, posinf=0), kernel, bias))
    rows = np.isfinite(x).all(-1)
    np.testing.assert_array_equal(whole[rows], finite[rows])
    assert whole.tobytes() == np.asarray(run(x, kernel, bias)).tobytes()
    part = np.asarray(run(x[1:2, 5:], kernel, bias))
    np.testing.assert_array_equal(part, whole[1:2, 5:])


@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512bf16"])
def test_other_instruction_sets_compute_the_same(name: str) -> None:
    if name not in INSTRUCTION_SETS:
        pytest.skip(f"this processor has no {name}, or nothing less")
    tests = [
        f"{Path(__file__).parent / file}::test_{test}"
        for file, test in (
            ("test_linear.py", "agrees_with_float64"),
            ("test_linear.py", "what_is_not_finite"),
            ("test_linear.py", "a_bias_in_float32"),
            ("test_linear.py", "each_product_is_as_exact_as_float32"),
            ("test_convolution.py", "agrees_with_float64"),
            ("test_mlp.py", "agrees_with_float64"),
            ("test_mlp.py", "the_same_bits_as_two_products"),
            ("test_mlp.py", "what_is_not_finite"),
            ("test_panels.py", "the_same_bits_as_rows"),
            ("test_panels.py", "what_is_not_finite"),
            ("test_gradients.py", "of_a_product"),
            ("test_gradients.py", "of_a_norm"),
        )
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-k",
        "kernel or finite or bias or exact or bits or test_gradients",
        *tests,
    ]
    environment = {**os.environ, "INTERNIMAGE_CPU_ISA": name, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@kernel_serves
@pytest.mark.parametrize("gelu", [True, False])
def test_transforms_of_the_cpu_kernel(gelu: bool) -> None:
    target = _targets.LINEAR_GELU_FORWARD if gelu else _targets.LINEAR_FORWARD
    check_transforms(functools.partial(linear, gelu=gelu), operands(dtype="float32"), target)


def test_a_program_for_cuda_has_the_kernel_where_it_serves(cuda_serves: None) -> None:
    def has_it(dtype: str, inputs: int, outputs: int = 64) -> bool:
        arrays = operands((1, 4, 4, inputs), outputs, dtype)
        text = for_cuda(gelu_of, *arrays)
        assert (CALL in text) != ("stablehlo.dot_general" in text)
        return CALL in text

    assert has_it("bfloat16", 64) and has_it("float16", 256)
    assert not has_it("float32", 64)
    assert not has_it("bfloat16", 264)  # wide: the product's form matters more
    assert not has_it("bfloat16", 20) and not has_it("bfloat16", 64, 20)


def test_where_compute_capability_9_0_serves_it_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))

    def has_it(pixels: int, inputs: int, outputs: int, gelu: bool = True) -> bool:
        shapes = (1, 1, pixels, inputs), (inputs, outputs), (outputs,)
        arrays = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
        text = for_cuda(functools.partial(linear, gelu=gelu), *arrays)
        return (CALL if gelu else "@internimage_linear_forward") in text

    many = 12544  # S's third level at batch 64, and T's fourth at batch 256
    assert has_it(many, 320, 1280) and has_it(many, 512, 2048)
    assert not has_it(many, 520, 2080) and not has_it(49, 320, 1280)
    assert has_it(many, 320, 320, gelu=False) and has_it(4 * many, 80, 80, gelu=False)
    assert not has_it(many, 256, 256, gelu=False) and not has_it(many, 448, 448, gelu=False)
    assert not has_it(49, 80, 80, gelu=False) and not has_it(many, 80, 84, gelu=False)


@pytest.mark.parametrize("gelu", [True, False])
def test_parameters_of_symbolic_sizes_are_exported(
    gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))
    (k,) = jax.export.symbolic_shape("k")
    for inputs, outputs in ((80, k), (k, 80)):
        shapes = (1, 64, 64, inputs), (inputs, outputs), (outputs,)
        arrays = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
        function = jax.jit(functools.partial(linear, gelu=gelu))
        named = jax.export.DisabledSafetyCheck.custom_call("internimage_bias_gelu_forward")
        export = jax.export.export(function, platforms=["cpu", "cuda"], disabled_checks=[named])
        assert export(*arrays).out_avals


def test_under_differentiation_it_is_a_product_and_bias_gelu(cuda_serves: None) -> None:
    arrays = operands()
    gradients = lambda *arrays: value_and_gradients(*arrays)[1:]  # noqa: E731
    text = for_cuda(gradients, *arrays)
    assert CALL not in text and "@internimage_bias_gelu_backward" in text
    assert for_cuda(value_and_gradients, *arrays).count(CALL) == 1
    with pytest.raises(ValueError, match=r"no forward mode .* use 'jnp'"):
        jax.jvp(gelu_of, arrays, arrays)


def test_transforms(cuda_serves: None) -> None:
    arrays = operands()
    wanted = jax.jit(value_and_gradients)(*arrays)  # compiled for the CPU, which has no kernel here
    specs = (P("data"), P(), P())
    mapped = jax.shard_map(
        value_and_gradients, mesh=mesh(), in_specs=specs, out_specs=(P("data"), *specs)
    )
    assert_close(jax.jit(mapped)(*arrays), wanted, 4 * TOLERANCE["bfloat16"])
    assert CALL in for_cuda(mapped, *arrays)
    stacked = [jnp.stack([a, 2 * a]) for a in arrays]
    for axes, shapes in (
        ((0, None, None), "2x4x5x3x16xbf16>, tensor<16x24xbf16>, tensor<24xbf16>"),
        ((None, 0, 0), "2x4x5x3x16xbf16>, tensor<2x16x24xbf16>, tensor<2x24xbf16>"),
    ):
        each = [b if axis == 0 else a for a, b, axis in zip(arrays, stacked, axes, strict=True)]
        text = for_cuda(jax.vmap(gelu_of, axes), *each)
        (call,) = (line for line in text.splitlines() if CALL in line)
        assert shapes in call


def test_a_sharded_batch_divides_the_result(cuda_serves: None) -> None:
    local = [
        jax.device_put(a, NamedSharding(mesh(), s))
        for a, s in zip(operands(), (P("data"), P(), P()), strict=True)
    ]
    text = for_cuda(gelu_of, *local)
    (rule,) = re.findall(r"op_sharding_rule<\((.*?)\) \{", text)
    x, kernel, bias, y = re.findall(r"\[([^]]*)\]", rule)
    assert x[0] == y[0] and x[0] not in kernel + bias  # the batch, and nothing else, goes through


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: jnp.zeros((2, 16))}, r"x: expected shape \(N, H, W, C\)"),
        ({0: jnp.zeros((1, 1, 1, 16), int)}, "x: expected one of float32"),
        ({1: jnp.zeros((8, 24), "bfloat16")}, r"kernel: expected shape \(16, K\)"),
        ({1: jnp.zeros((16, 24))}, "kernel: .* and float32"),
        ({1: jnp.zeros((16, 0), "bfloat16")}, "kernel: .* K at least 1"),
        ({2: jnp.zeros(32, "bfloat16")}, r"bias: expected shape \(24,\)"),
        ({2: jnp.zeros(24, "float16")}, "bias: .* and float16"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[int, jax.Array], message: str) -> None:
    arrays = [changes.get(i, a) for i, a in enumerate(operands())]
    with pytest.raises(ValueError, match=message):
        gelu_of(*arrays)


def test_an_implementation_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ())
    with pytest.raises(ValueError, match="no 'kernel' to serve here"):
        gelu_of(*operands(), implementation="kernel")
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))
    with pytest.raises(ValueError, match="bfloat16 and float16, with C and K in eights"):
        gelu_of(*operands(outputs=20), implementation="kernel")
    with pytest.raises(ValueError, match="expected 'kernel', 'jnp' or None, got 'fast'"):
        gelu_of(*operands(), implementation="fast")  # type: ignore[arg-type]

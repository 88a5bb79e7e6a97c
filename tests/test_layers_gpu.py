"""The CUDA kernels of the layers besides DCNv3, held to the jnp form in float64 on the CPU.

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_layers_gpu.py

Without a GPU a CPU runs the same code (gpu.py); test_layers_cuda.py does under sanitizers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from tests import gpu
from tests import test_layer_norm as layer_norm
from tests import test_mlp as mlp
from tests.layers import TOLERANCE, assert_close, on_device, operands
from xla_ops import _targets
from xla_ops.mlp import CHANNELS_ON_CUDA

pytestmark = gpu.needs_it()

# Of the released models, and of every way to divide channels and pixels.
SHAPES = [
    ((2, 14, 14, 64), 3),
    ((1, 7, 9, 112), 3),
    ((1, 12, 12, 1280), 5),
    ((1, 6, 7, 4096), 5),
    ((3, 5, 1, 33), 3),
    ((3, 14, 13, 64), 3),  # as many pixels as on the host four to a thread take
    ((2, 9, 9, 256), 3),
    ((2, 7, 7, 512), 3),
    ((1, 9, 10, 320), 5),
    ((1, 5, 3, 512), 3),  # and fewer
    ((1, 3, 5, 1280), 5),
    ((5, 1, 1, 128), 3),
    ((1, 1, 2048, 8), 1),
    ((0, 4, 4, 8), 3),
]
LARGE = [((8, 56, 56, 64), 3), ((16, 14, 14, 512), 3), ((8, 20, 20, 320), 5)]  # so many for a GPU


def by_cuda(function: Callable, *arrays: np.ndarray, times: int = 1) -> list[list[np.ndarray]]:
    """Value and gradients of `function` by the CUDA kernels, as often as asked."""
    with gpu.kernels():
        return _on(gpu.device(), "kernel", function, *arrays, times=times)


def _on(
    device: jax.Device, form: str, function: Callable, *arrays: np.ndarray, times: int = 1
) -> list[list[np.ndarray]]:
    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(
            lambda *a: function(*a, implementation=form), *operands[: len(arrays) - 1]
        )
        return y, *pullback(operands[-1])

    with jax.default_device(device):
        local = [jax.device_put(a, device) for a in arrays]
        compiled = jax.jit(run)
        return [[np.asarray(r) for r in compiled(*local)] for _ in range(times)]


def assert_as_exact(function: Callable, dtype: str, *arrays: jax.Array) -> None:
    (got,) = by_cuda(function, *map(np.asarray, arrays))
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True):
        exact = [np.asarray(a, np.float64) for a in arrays]
        (expected,) = _on(cpu, "jnp", function, *exact)
    assert_close(got, expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("shape", "size", "dtype"),
    [
        *(
            (*case, dtype)
            for case in SHAPES
            for dtype in TOLERANCE
            if dtype != "float64" or case[0][-1] <= 2048  # what the backward takes
        ),
        *(gpu.large(*case, "bfloat16") for case in LARGE),
    ],
    ids=str,
)
def test_dwconv_norm_gelu(shape: tuple[int, ...], size: int, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        assert_as_exact(xla_ops.dwconv_norm_gelu, dtype, *operands(shape, size, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 14, 14, 256), (1, 3, 5, 7), (1, 1, 1, 1), (0, 2, 2, 8)])
def test_bias_gelu(shape: tuple[int, ...], dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, _, bias, *_, dy = operands(shape, 3, dtype)
        assert_as_exact(xla_ops.bias_gelu, dtype, 4 * x, bias, dy)


@gpu.needs_instructions_of(_targets.LINEAR_GELU_FORWARD)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        gpu.large((16, 56, 56, 64), 256),  # blocks that stay, with four stages and with two
        gpu.large((16, 28, 28, 112), 448),
        gpu.large((16, 28, 28, 160), 640),  # of each number of steps that has a form
        gpu.large((32, 14, 14, 256), 1024),
        gpu.large((16, 14, 14, 320), 1280),
        gpu.large((16, 14, 14, 360), 1440),
        gpu.large((64, 7, 7, 512), 2048),
        gpu.large((8, 7, 7, 904), 12288),  # and those that do not, of each size
        gpu.large((1, 28, 28, 128), 512),
        gpu.large((1, 14, 14, 256), 1024),
        gpu.large((1, 7, 7, 512), 2048),
        ((1, 33, 32, 24), 136),  # and again, on the host
        ((1, 4, 27, 208), 136),
        ((1, 1, 1, 8), 8),  # nothing is full
        ((3, 5, 7, 40), 136),
        ((0, 4, 4, 16), 16),
    ],
    ids=str,
)
def test_linear_with_gelu(shape: tuple[int, ...], outputs: int, dtype: str) -> None:
    normal = np.random.RandomState(0).standard_normal
    arrays = normal(shape), normal((shape[-1], outputs)) / np.sqrt(shape[-1]), normal(outputs)
    x, kernel, vector = on_device(arrays, dtype)
    for bias in (vector, vector.astype("float32")):
        exact = [np.asarray(a, np.float64) for a in (x, kernel, bias)]
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            wanted = jax.jit(functools.partial(LINEAR, implementation="jnp"))(*exact)
        first, second = gpu.by_kernel(LINEAR, x, kernel, bias, times=2)
        assert_close(first, wanted, TOLERANCE[dtype])
        assert first.tobytes() == second.tobytes()


LINEAR = functools.partial(xla_ops.linear, gelu=True)


@gpu.needs_instructions_of(_targets.LINEAR_FORWARD)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        gpu.large((16, 56, 56, 80), 136),
        gpu.large((16, 28, 28, 160), 272),
        gpu.large((16, 28, 28, 208), 136),
        gpu.large((64, 14, 14, 320), 544),
        gpu.large((16, 14, 14, 448), 448),
        gpu.large((1, 7, 7, 512), 512),
        ((1, 17, 32, 80), 136),  # of the number of steps that each form takes
        ((1, 4, 27, 208), 136),
        ((1, 3, 5, 320), 40),
        ((1, 5, 3, 360), 72),
        ((1, 1, 1, 8), 8),
        ((0, 4, 4, 16), 16),
    ],
    ids=str,
)
def test_linear(shape: tuple[int, ...], outputs: int, dtype: str) -> None:
    normal = np.random.RandomState(0).standard_normal
    arrays = normal(shape), normal((shape[-1], outputs)) / np.sqrt(shape[-1]), normal(outputs)
    x, kernel, vector = on_device(arrays, dtype)
    for bias in (vector, vector.astype("float32")):
        exact = [np.asarray(a, np.float64) for a in (x, kernel, bias)]
        wanted = exact[0] @ exact[1] + exact[2]
        first, second = gpu.by_kernel(xla_ops.linear, x, kernel, bias, times=2)
        assert_close(first, wanted, TOLERANCE[dtype])
        assert first.tobytes() == second.tobytes()


@gpu.needs_instructions_of(_targets.MLP_FORWARD)
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_products_with_parameters_of_each_example(name: str) -> None:
    function = getattr(xla_ops, name)
    sets = [mlp.operands((2, 5, 7, 64), 128, 64, "bfloat16") for _ in range(2)]
    sets[1] = [a * 2 for a in sets[1]]
    if name == "linear":
        sets = [arrays[:3] for arrays in sets]
    stacked = [jnp.stack(arrays) for arrays in zip(*sets, strict=True)]
    (got,) = gpu.by_kernel(
        lambda *a, implementation: jax.vmap(
            functools.partial(function, implementation=implementation)
        )(*a),
        *stacked,
    )
    wanted = [gpu.by_kernel(function, *arrays)[0] for arrays in sets]
    assert got.tobytes() == np.stack(wanted).tobytes()


@gpu.needs_instructions_of(_targets.LINEAR_GELU_FORWARD)
def test_linear_with_gelu_of_what_is_not_finite() -> None:
    x, kernel, bias = np.ones((1, 9, 9, 40)), np.ones((40, 72)), np.zeros(72)
    x[0, 0, 3, 7], x[0, 5, 5, 39], x[0, 8, 8, 0] = np.nan, np.inf, -np.inf
    bias[5], bias[11] = np.nan, -np.inf
    (got,) = gpu.by_kernel(LINEAR, *(jnp.asarray(a, "bfloat16") for a in (x, kernel, bias)))
    with np.errstate(invalid="ignore"):
        z = x @ kernel + bias
    wanted = np.where(z == -np.inf, 0, z)
    # Far out GELU stays what it is at -13, which bfloat16 tells from zero.
    np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=0, atol=1e-30)


@gpu.needs_instructions_of(_targets.MLP_FORWARD)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [
        *(gpu.large((64, 56, 56, channels), 4 * channels) for channels in CHANNELS_ON_CUDA),
        *(gpu.large((5, 14, 14, channels), 4 * channels) for channels in CHANNELS_ON_CUDA),
        ((5, 8, 33, 64), 256),  # a warpgroup has several tiles, on the host
        ((2, 9, 11, 80), 320),
        ((1, 5, 7, 80), 64),
        ((1, 1, 1, 64), 128),
        ((0, 4, 4, 64), 64),
    ],
    ids=str,
)
def test_mlp(shape: tuple[int, ...], hidden: int, dtype: str) -> None:
    arrays = mlp.operands(shape, hidden, shape[-1], dtype)
    biases = [arrays[2], arrays[4]]
    for kind in (dtype, "float32"):
        arrays[2], arrays[4] = (bias.astype(kind) for bias in biases)
        exact = [np.asarray(a, np.float64) for a in arrays]
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            wanted = jax.jit(functools.partial(xla_ops.mlp, implementation="jnp"))(*exact)
        first, second = gpu.by_kernel(xla_ops.mlp, *arrays, times=2)
        assert_close(first, wanted, 8 * TOLERANCE[dtype])  # as of the CPU's
        assert first.tobytes() == second.tobytes()


@gpu.needs_instructions_of(_targets.MLP_FORWARD)
def test_mlp_of_what_is_not_finite() -> None:
    x, kernel1, bias1, kernel2, bias2 = mlp.operands((1, 9, 9, 64), 128, 64, "bfloat16")
    arrays = [x.at[0, 0, 3, 7].set(np.nan).at[0, 8, 8, 0].set(np.inf), kernel1, bias1, kernel2]
    (got,) = gpu.by_kernel(xla_ops.mlp, *arrays, bias2)
    finite = np.isfinite(got.astype(np.float64)).all(-1)[0]
    assert {tuple(map(int, at)) for at in np.argwhere(~finite)} == {(0, 3), (8, 8)}
    assert np.isnan(got[0, 0, 3].astype(np.float64)).all()


NORMS = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 1, 7, 8),
    (2, 3, 5, 33),
    (1, 5, 7, 112),  # a thread has one piece; three; and four
    (1, 5, 3, 320),
    (1, 3, 1, 1024),
    (1, 2, 3, 1280),  # a row is a block's
    (1, 1, 2, 4096),
    (1, 1, 1, 4099),
    (1, 46, 46, 32),  # many rows, for the host
    (1, 33, 33, 64),
    (1, 17, 17, 512),
    (0, 4, 4, 8),
    gpu.large((64, 56, 56, 64)),  # and for a GPU
    gpu.large((16, 112, 112, 32)),
    gpu.large((64, 14, 14, 256)),
    gpu.large((64, 14, 14, 512)),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_layer_norm(shape: tuple[int, ...], dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, scale, bias = layer_norm.operands(shape, dtype)
        first, second = gpu.by_kernel(xla_ops.layer_norm, x, scale, bias, times=2)
        assert_close(first, layer_norm.in_float64(x, scale, bias, 1e-6), 2 * TOLERANCE[dtype])
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_add_norm(shape: tuple[int, ...], dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, residual, scale, bias = layer_norm.operands_of_add(shape, dtype)
        first, second = gpu.by_kernel(xla_ops.add_norm, x, residual, scale, bias, times=2)
        np.testing.assert_array_equal(first[0], np.asarray(x) + np.asarray(residual))
        exact = layer_norm.in_float64(first[0], scale, bias, 1e-6)
        assert_close(first[1], exact, 2 * TOLERANCE[dtype])
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_norm_add(shape: tuple[int, ...], dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, residual, scale, bias = layer_norm.operands_of_add(shape, dtype)
        first, second = gpu.by_kernel(xla_ops.norm_add, x, residual, scale, bias, times=2)
        exact = layer_norm.in_float64(x, scale, bias, 1e-6) + np.asarray(residual, np.float64)
        assert_close(first, exact, 2 * TOLERANCE[dtype])
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("channels", [64, 33, 2560])
def test_layer_norm_with_parameters_of_each_batch(channels: int) -> None:
    normal = np.random.RandomState(0).standard_normal
    shapes = (3, 2, 5, 7, channels), (3, channels), (3, channels)
    x, scale, bias = (jnp.asarray(normal(shape), "float32") for shape in shapes)
    x = x.astype("bfloat16")  # with float32 parameters
    mapped = lambda *a, implementation: jax.vmap(  # noqa: E731
        functools.partial(xla_ops.layer_norm, implementation=implementation)
    )(*a)
    (got,) = gpu.by_kernel(mapped, x, scale, bias)
    added = lambda *a, implementation: jax.vmap(  # noqa: E731
        functools.partial(xla_ops.add_norm, implementation=implementation)
    )(*a)
    ((_, of_sum),) = gpu.by_kernel(added, x / 2, x - x / 2, scale, bias)
    for i in range(3):
        wanted = layer_norm.in_float64(x[i], scale[i], bias[i], 1e-6)
        assert_close(got[i], wanted, 2 * TOLERANCE["bfloat16"])
        assert_close(of_sum[i], wanted, 2 * TOLERANCE["bfloat16"])


@pytest.mark.parametrize("shape", [(1, 3, 7, 20), (1, 33, 65, 32), (1, 3, 3, 2560)], ids=str)
def test_layer_norm_of_what_is_not_finite(shape: tuple[int, ...]) -> None:
    x, scale, bias = layer_norm.operands(shape)
    spoilt = x.at[0, 0, 2, 3].set(jnp.nan).at[0, 1, 1, 19].set(jnp.inf)
    got, wanted = (gpu.by_kernel(xla_ops.layer_norm, a, scale, bias)[0] for a in (spoilt, x))
    rows = np.zeros(shape[:3], bool)
    rows[0, 0, 2] = rows[0, 1, 1] = True
    assert np.isnan(got[rows]).all()
    np.testing.assert_array_equal(got[~rows], wanted[~rows])


def test_half_precision_with_float32_parameters() -> None:
    x, *parameters, dy = operands((2, 7, 7, 128))
    halves = [x.astype("bfloat16"), *parameters, dy.astype("bfloat16")]
    assert_as_exact(xla_ops.dwconv_norm_gelu, "bfloat16", *halves)


def test_the_same_bits_each_time() -> None:
    arrays = [np.asarray(a) for a in operands((4, 14, 14, 128), 3, "bfloat16")]
    first, *others = by_cuda(xla_ops.dwconv_norm_gelu, *arrays, times=3)
    for other in others:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, other, strict=True))

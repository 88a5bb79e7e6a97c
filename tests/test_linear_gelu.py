"""A product, bias and GELU: what serves everywhere, and programs for CUDA, without a GPU.

The kernel itself is tested in test_layers_cuda.py, on the host, and in test_layers_gpu.py.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import xla_ops
from tests.test_dwconv import TOLERANCE, assert_close, mesh
from xla_ops import _ffi

CALL = "@internimage_linear_bias_gelu_forward"


def operands(
    shape: tuple[int, ...] = (4, 5, 3, 16), outputs: int = 24, dtype: str = "bfloat16"
) -> list[jax.Array]:
    """x, kernel and bias."""
    normal = np.random.RandomState(0).standard_normal
    arrays = normal(shape), normal((shape[-1], outputs)) / np.sqrt(shape[-1]), normal(outputs)
    return [jnp.asarray(a, dtype) for a in arrays]


def value_and_gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sin(xla_ops.linear_bias_gelu(*arrays).astype("float32")).sum()

    return xla_ops.linear_bias_gelu(*arrays), *jax.grad(loss, (0, 1, 2))(*arrays)


@pytest.fixture
def cuda_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ("cuda",))


def for_cuda(function, *arrays: jax.Array) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("implementation", ["jnp", None])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_agrees_with_float64(dtype: str, implementation) -> None:
    with jax.enable_x64(True):
        arrays = operands(dtype=dtype)
        got = xla_ops.linear_bias_gelu(*arrays, implementation=implementation)
        x, kernel, bias = (np.asarray(a, np.float64) for a in arrays)
        wanted = jax.nn.gelu(jnp.asarray(x @ kernel + bias), approximate=False)
    assert got.dtype == dtype
    assert_close(got, wanted, 4 * TOLERANCE[dtype])  # the product is rounded as well


def test_a_program_for_cuda_has_the_kernel_where_it_serves(cuda_serves: None) -> None:
    def has_it(dtype: str, inputs: int, outputs: int = 64) -> bool:
        arrays = operands((1, 4, 4, inputs), outputs, dtype)
        text = for_cuda(xla_ops.linear_bias_gelu, *arrays)
        assert (CALL in text) != ("stablehlo.dot_general" in text)
        return CALL in text

    assert has_it("bfloat16", 64) and has_it("float16", 512)
    assert not has_it("float32", 64)
    assert not has_it("bfloat16", 520)  # wide: the product's form matters more
    assert not has_it("bfloat16", 20) and not has_it("bfloat16", 64, 20)


def test_under_differentiation_it_is_a_product_and_bias_gelu(cuda_serves: None) -> None:
    arrays = operands()
    gradients = lambda *arrays: value_and_gradients(*arrays)[1:]  # noqa: E731
    text = for_cuda(gradients, *arrays)
    assert CALL not in text and "@internimage_bias_gelu_backward" in text
    assert for_cuda(value_and_gradients, *arrays).count(CALL) == 1
    with pytest.raises(ValueError, match=r"no forward mode .* use 'jnp'"):
        jax.jvp(xla_ops.linear_bias_gelu, arrays, arrays)


def test_transforms(cuda_serves: None) -> None:
    arrays = operands()
    wanted = jax.jit(value_and_gradients)(*arrays)  # compiled for the CPU, so without the kernel
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
        text = for_cuda(jax.vmap(xla_ops.linear_bias_gelu, axes), *each)
        (call,) = (line for line in text.splitlines() if CALL in line)
        assert shapes in call


def test_a_sharded_batch_divides_the_result(cuda_serves: None) -> None:
    local = [
        jax.device_put(a, NamedSharding(mesh(), s))
        for a, s in zip(operands(), (P("data"), P(), P()), strict=True)
    ]
    text = for_cuda(xla_ops.linear_bias_gelu, *local)
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
        xla_ops.linear_bias_gelu(*arrays)


def test_an_implementation_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "serving", lambda target: ())
    with pytest.raises(ValueError, match="no 'kernel' to serve here; it wants a GPU"):
        xla_ops.linear_bias_gelu(*operands(), implementation="kernel")
    with pytest.raises(ValueError, match="takes bfloat16 or float16, and C and K in eights"):
        xla_ops.linear_bias_gelu(*operands(outputs=20), implementation="kernel")
    with pytest.raises(ValueError, match="expected 'kernel', 'jnp' or None, got 'fast'"):
        xla_ops.linear_bias_gelu(*operands(), implementation="fast")  # type: ignore[arg-type]

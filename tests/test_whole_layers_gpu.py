"""Whole layers as one CUDA call, held to the jnp form in float64 on the CPU.

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_whole_layers_gpu.py

Without a GPU a CPU runs the same code (gpu.py).
"""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xla_ops
from tests import gpu, kernels_on_host
from tests import test_whole_layers as whole
from tests.layers import TOLERANCE, assert_close
from xla_ops import _targets

pytestmark = gpu.needs_it()

WHOLE = [
    ((1, 9, 5, 112), 7, 448),
    ((2, 5, 6, 128), 8, 512),
    ((1, 3, 3, 64), 4, 1024),  # a cluster of blocks makes the last product
    ((1, 2, 3, 80), 5, 320),
    ((1, 20, 20, 64), 4, 256),
    ((1, 1, 1, 16), 1, 16),
    ((3, 1, 7, 32), 4, 48),
    ((0, 2, 2, 16), 2, 32),
    gpu.large((1, 56, 56, 64), 4, 256),
    gpu.large((1, 14, 14, 256), 16, 1024),
    gpu.large((1, 7, 7, 512), 32, 2048),
    gpu.large((1, 7, 7, 896), 56, 3584),
    gpu.large((8, 14, 14, 320), 20, 1280),
    gpu.large((1, 7, 9, 1024), 16, 4096),
    gpu.large((170, 56, 56, 16), 2, 32),  # more images than go through the kernels at once
]


@gpu.needs_instructions_of(_targets.LAYERS_FORWARD)
@pytest.mark.parametrize(
    ("dtype", "vectors", "post_norm"),
    [
        ("bfloat16", "bfloat16", False),
        ("float16", "float32", True),  # as norms are that factors were multiplied into
    ],
)
@pytest.mark.parametrize(("shape", "group", "hidden"), WHOLE, ids=str)
def test_whole_layers(
    shape: tuple[int, ...], group: int, hidden: int, dtype: str, vectors: str, post_norm: bool
) -> None:
    function = functools.partial(xla_ops.layers, group=group, offset_scale=0.7, post_norm=post_norm)
    x, parameters = whole.operands(shape, group, hidden, dtype, vectors)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, parameters))
        wanted = jax.jit(functools.partial(function, implementation="jnp"))(*exact)
    first, second = gpu.by_kernel(function, x, parameters, times=2)
    assert_close(first, wanted, 4 * TOLERANCE[dtype])  # as the operators one after the other
    assert first.tobytes() == second.tobytes()


@gpu.needs_instructions_of(_targets.LAYERS_FORWARD)
def test_whole_layers_with_parameters_of_each_example() -> None:
    sets = [whole.operands((2, 3, 5, 32), 2, 64, "bfloat16", "float32") for _ in range(2)]
    sets[1] = jax.tree.map(lambda a: a * 1.5, sets[1])
    function = functools.partial(xla_ops.layers, group=2)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *sets)
    mapped = lambda *a, implementation: jax.vmap(  # noqa: E731
        functools.partial(function, implementation=implementation)
    )(*a)
    (got,) = gpu.by_kernel(mapped, *stacked)
    wanted = [gpu.by_kernel(function, *arrays)[0] for arrays in sets]
    assert got.tobytes() == np.stack(wanted).tobytes()


@gpu.needs_instructions_of(_targets.LAYERS_FORWARD)
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(
    ("shape", "group", "hidden", "times"),
    [
        ((1, 4, 4, 32), 2, 64, 2),
        gpu.large((1, 56, 56, 64), 4, 256, 300),
        gpu.large((1, 14, 14, 256), 16, 1024, 300),
        gpu.large((1, 7, 7, 512), 32, 2048, 300),
    ],
    ids=str,
)
def test_whole_layers_have_the_same_bits_early_and_in_order(
    shape: tuple[int, ...],
    group: int,
    hidden: int,
    times: int,
    post_norm: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several maps in turn: what is read too early is another map's."""
    x, parameters = whole.operands(shape, group, hidden, "bfloat16")
    maps = jax.device_put([x, -x, x[:, ::-1]], gpu.device())
    parameters = jax.device_put(parameters, gpu.device())

    def run(x: jax.Array, parameters: list[xla_ops.LayerParameters]) -> jax.Array:
        for _ in range(3):
            settings = {"group": group, "post_norm": post_norm, "implementation": "kernel"}
            x = xla_ops.layers(x / 2, parameters, **settings)
        return x

    wanted = []
    for early in (False, True):
        monkeypatch.setattr(importlib.import_module("xla_ops.layers"), "EARLY", early)
        with gpu.kernels():
            jax.clear_caches()
            compiled = jax.jit(run).lower(maps[0], parameters).compile()
            wanted = wanted or [np.asarray(compiled(a, parameters)) for a in maps]
            got = [compiled(maps[i % 3], parameters) for i in range(times)]
        for i, y in enumerate(got):
            assert np.asarray(y).tobytes() == wanted[i % 3].tobytes()


@pytest.mark.skipif(gpu.ON != "host", reason="of the host's launches")
@pytest.mark.parametrize("post_norm", [False, True])
def test_kernels_of_layers_begin_early_but_for_the_first(post_norm: bool) -> None:
    """That one may not fetch its weights: what came before may not have written them yet."""
    x, parameters = whole.operands((1, 4, 4, 32), 2, 64, "bfloat16")
    kernels_on_host.extension()
    kernels_on_host.take_launches()
    gpu.by_kernel(functools.partial(xla_ops.layers, group=2, post_norm=post_norm), x, parameters)
    assert kernels_on_host.take_launches() == [False] + [True] * (15 if post_norm else 13)


@gpu.needs_instructions_of(_targets.LAYERS_FORWARD)
def test_whole_layers_of_what_is_not_finite() -> None:
    """It spreads as far as a depthwise kernel and points reach, and not into another image."""
    x, parameters = whole.operands((2, 6, 6, 32), 2, 64, "bfloat16")
    function = functools.partial(xla_ops.layers, group=2)
    (finite,) = gpu.by_kernel(function, x, parameters)
    (got,) = gpu.by_kernel(function, x.at[0, 3, 3, 5].set(jnp.nan), parameters)
    assert np.isnan(got[0, 3, 3].astype(np.float64)).all()
    np.testing.assert_array_equal(got[1], finite[1])

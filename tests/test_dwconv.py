"""The layers besides DCNv3: their kernels, their definitions in jnp, and torch."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xla_ops
from tests.layers import TOLERANCE, assert_close, mesh, needs_kernel, operands

NAMES = ("x", "kernel", "bias", "scale", "offset")
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute")


@functools.cache
def program(implementation: str | None):
    """From operands and dy to y and the gradients."""

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        function = functools.partial(xla_ops.dwconv_norm_gelu, implementation=implementation)
        y, pullback = jax.vjp(function, *arrays[:-1])
        return y, *pullback(arrays[-1])

    return jax.jit(run)


SHAPES = [
    ((2, 9, 6, 64), 3),
    ((1, 1, 1, 1), 3),
    ((2, 5, 1, 7), 5),
    ((1, 3, 11, 320), 5),
    ((1, 4, 5, 33), 7),
    ((1, 2, 3, 16), 1),
    ((0, 4, 4, 8), 3),
]


@needs_kernel
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_kernel_agrees_with_the_definition_in_float64(shape: tuple[int, ...], size: int) -> None:
    # Half precision in two of them: the sizes matter to all dtypes alike.
    dtypes = list(TOLERANCE)[: 4 if shape[-1] in (33, 64) else 2]
    with jax.enable_x64(True):
        for dtype, tolerance in ((d, TOLERANCE[d]) for d in dtypes):
            arrays = operands(shape, size, dtype)
            got = program("kernel")(*arrays)
            wanted = program("jnp")(*(np.asarray(a, np.float64) for a in arrays))
            for a, operand in zip(got, (arrays[-1], *arrays[:-1]), strict=True):
                assert a.dtype == dtype and a.shape == operand.shape
            assert_close(got, wanted, 2 * tolerance)


@needs_kernel
def test_rows_that_threads_do_not_share_evenly() -> None:
    for shape in ((1, 19, 41, 64), (3, 9, 11, 64)):  # of the forward, of the backward
        arrays = operands(shape)
        assert_close(program("kernel")(*arrays), program("jnp")(*arrays))


@needs_kernel
def test_half_precision_with_float32_parameters() -> None:
    x, *parameters, dy = operands((2, 4, 5, 24), dtype="float32")
    for dtype in ("bfloat16", "float16"):
        arrays = [x.astype(dtype), *parameters, dy.astype(dtype)]
        got = program("kernel")(*arrays)
        assert [a.dtype for a in got[1:]] == [dtype, *["float32"] * 4]
        wanted = program("jnp")(*(a.astype("float32") for a in arrays))
        assert_close(got[:2], wanted[:2], TOLERANCE[dtype])
        assert_close(got[2:], wanted[2:])


@pytest.mark.parametrize("implementation", ["jnp", pytest.param("kernel", marks=needs_kernel)])
def test_agrees_with_torch(implementation: str) -> None:
    torch = pytest.importorskip("torch")
    with jax.enable_x64(True):
        arrays = operands((2, 6, 5, 12), 5, "float64")
        got = program(implementation)(*arrays)
        x, kernel, *vectors, dy = (torch.from_numpy(np.array(a)) for a in arrays)
        leaves = [x, kernel, *vectors]
        for leaf in leaves:
            leaf.requires_grad_()
        nchw, weight = x.permute(0, 3, 1, 2), kernel.permute(2, 0, 1)[:, None]
        v = torch.nn.functional.conv2d(nchw, weight, vectors[0], padding=2, groups=12)
        v = torch.nn.functional.layer_norm(v.permute(0, 2, 3, 1), (12,), *vectors[1:], 1e-6)
        y = torch.nn.functional.gelu(v)
        y.backward(dy)
        assert_close(got, [y.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)], 1e-12)


def test_depthwise_convolution_is_that_of_lax() -> None:
    x, kernel, *_ = operands((2, 6, 9, 4), 5)
    lowered = jax.jit(xla_ops.depthwise_convolution).lower(x, kernel)
    assert " convolution(" not in lowered.compile().as_text()  # on a CPU
    wanted = jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        ((2, 2), (2, 2)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    assert_close(lowered.compile()(x, kernel), wanted, 1e-6)


@needs_kernel
def test_gelu_is_exact_over_the_whole_line() -> None:
    # One channel is normalised to zero, so `offset` is what GELU sees.
    z = np.concatenate([np.linspace(-13, 13, 2001), np.geomspace(1e-6, 1, 200), [-3e38, 3e38]])
    x, kernel, bias, scale, _, dy = operands((1, 1, 1, 1))
    arrays = (x, kernel, bias, scale, jnp.asarray(z[:, None], "float32"), dy * 0 + 1)
    y, _, _, _, _, slope = jax.jit(jax.vmap(program("kernel"), (None,) * 4 + (0, None)))(*arrays)
    with jax.enable_x64(True):
        exact = np.asarray(z.astype("float32"), np.float64)
        wanted, pullback = jax.vjp(lambda z: jax.nn.gelu(z, approximate=False), jnp.asarray(exact))
        (wanted_slope,) = pullback(jnp.ones_like(wanted))
    np.testing.assert_allclose(np.ravel(y), wanted, rtol=1e-6, atol=3e-37)  # less is flushed
    np.testing.assert_allclose(np.ravel(slope), wanted_slope, rtol=0, atol=4e-7)


@needs_kernel
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_no_further_than_its_neighbours(value: float) -> None:
    x, *rest = operands((1, 6, 7, 10))
    y, dx, *_ = program("kernel")(x.at[0, 1, 2, 3].set(value), *rest)
    spoilt = np.isnan(y).any(-1)[0]
    assert spoilt[:3, 1:4].all() and spoilt.sum() == 9
    assert np.isfinite(np.asarray(dx)[0, 5]).all()


@needs_kernel
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        lambda f: jax.jit(jax.checkpoint(f)),
        lambda f: lambda x, *p: jax.lax.scan(lambda c, _: (f(c, *p), None), x, length=3)[0],
    ],
    ids=["eager", "remat", "scan"],
)
def test_transforms(transform) -> None:
    arrays = operands((2, 5, 4, 8))

    def gradients(implementation: str):
        function = functools.partial(xla_ops.dwconv_norm_gelu, implementation=implementation)
        loss = lambda *a: jnp.sum(jnp.sin(transform(function)(*a)))  # noqa: E731
        return jax.grad(loss, range(5))

    assert_close(gradients("kernel")(*arrays[:-1]), jax.jit(gradients("jnp"))(*arrays[:-1]))


@needs_kernel
def test_vmap_over_maps_parameters_or_both() -> None:
    sets = [operands((2, 4, 5, 8), seed=seed) for seed in range(3)]
    stacked = [jnp.stack(arrays) for arrays in zip(*sets, strict=True)]
    one = sets[0]
    for axes in ((0,) * 6, (0, None, None, None, None, 0), (None, 0, None, 0, None, None)):
        arrays = [a if axis is None else b for a, b, axis in zip(one, stacked, axes, strict=True)]
        mapped = [jax.jit(jax.vmap(program(name), axes)) for name in ("kernel", "jnp")]
        assert_close(mapped[0](*arrays), mapped[1](*arrays))
    again = [jnp.stack([a, a + 1]) for a in stacked]
    for axes in (0, (0, None, None, None, None, 0)):
        inner = again if axes == 0 else [again[0], *stacked[1:5], again[5]]
        twice = [jax.jit(jax.vmap(jax.vmap(program(name)), axes)) for name in ("kernel", "jnp")]
        assert_close(twice[0](*inner), twice[1](*inner))


@needs_kernel
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_jit_over_a_sharded_batch_moves_no_map(kind: AxisType) -> None:
    arrays = operands((4, 16, 4, 8))  # chunks of an image are more in a smaller batch
    specs = (P("data"), P(), P(), P(), P(), P("data"))
    local = [
        jax.device_put(a, NamedSharding(mesh(kind), s)) for a, s in zip(arrays, specs, strict=True)
    ]
    with jax.set_mesh(mesh(kind)):
        compiled = program(None).lower(*local).compile()
        got = compiled(*local)
    assert "internimage_dwconv" in compiled.as_text()
    assert not [word for word in COLLECTIVES if word in compiled.as_text()]
    assert got[0].sharding.is_equivalent_to(local[0].sharding, 4)
    assert_close(got, program("jnp")(*arrays))


@needs_kernel
def test_shard_map_and_pmap() -> None:
    arrays = operands((4, 5, 4, 8))
    specs = (P("data"), P(), P(), P(), P(), P("data"))
    out = (P("data"), P("data"), P(), P(), P(), P())
    mapped = jax.shard_map(program(None), mesh=mesh(), in_specs=specs, out_specs=out)
    wanted = program("jnp")(*arrays)
    assert_close(jax.jit(mapped)(*arrays), wanted)
    halves = [a.reshape(2, 2, 5, 4, 8) for a in (arrays[0], arrays[-1])]
    axes = (0, None, None, None, None, 0)
    got = jax.pmap(program("kernel"), in_axes=axes)(halves[0], *arrays[1:5], halves[1])
    assert_close(got[0].reshape(4, 5, 4, 8), wanted[0])
    assert_close([a.sum(0) for a in got[2:]], wanted[2:])


@needs_kernel
def test_forward_mode_is_refused_with_what_to_use() -> None:
    arrays = operands((1, 3, 3, 4))[:-1]
    with pytest.raises(ValueError, match=r"no forward mode .* use 'jnp'"):
        jax.jvp(xla_ops.dwconv_norm_gelu, arrays, arrays)
    plain = functools.partial(xla_ops.dwconv_norm_gelu, implementation="jnp")
    jax.jvp(plain, arrays, arrays)


def test_lowering_for_another_platform_takes_the_jnp_form() -> None:
    arrays = operands((1, 3, 3, 4))
    lowered = program(None).trace(*arrays).lower(lowering_platforms=("tpu",))
    assert "internimage" not in lowered.as_text()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "x",
            lambda a: a[0],
            r"x: expected shape \(N, H, W, C\), a map not empty, got \(4, 5, 8\)",
        ),
        ("x", lambda a: a[:, :0], "x: .* not empty"),
        ("x", lambda a: a.astype("int32"), "x: expected one of float32"),
        ("kernel", lambda a: a[:2, :2], r"kernel: expected shape \(K, K, 8\) with K odd"),
        ("kernel", lambda a: a[..., :4], r"kernel: .* got \(3, 3, 4\)"),
        ("bias", lambda a: a[None], r"bias: expected shape \(8,\), got \(1, 8\)"),
        ("scale", lambda a: a.astype("bfloat16"), "scale: expected the dtype of x, float32, and"),
    ],
)
def test_what_does_not_fit_is_named(name: str, change, message: str) -> None:
    arguments = dict(zip(NAMES, operands((2, 4, 5, 8)), strict=False))
    with pytest.raises(ValueError, match=message):
        xla_ops.dwconv_norm_gelu(**arguments | {name: change(arguments[name])})


def hashes() -> list[str]:
    found = []
    for shape, size in (((1, 20, 9, 64), 3), ((3, 7, 8, 21), 5)):
        for array in program("kernel")(*operands(shape, size)):
            found.append(hashlib.sha256(np.asarray(array).tobytes()).hexdigest())
    return found


@needs_kernel
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    command = [sys.executable, "-c", "from tests.test_dwconv import hashes; print(*hashes())"]
    root = str(Path(__file__).parents[1])
    found = set()
    for count in ("1", "7"):  # XLA's pool has as many threads as this variable says
        environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "NPROC": count}
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1

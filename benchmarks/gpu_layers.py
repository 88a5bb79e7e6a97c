"""Times the layers besides DCNv3 on a GPU, beside what XLA makes of them.

A section of `benchmarks.gpu_check`. Shapes are those of T and B at batch 64, and wider ones, since
it is open up to how many channels `linear` with GELU pays.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

import xla_ops
from benchmarks.gpu_op import MANY, attempt, slope

if TYPE_CHECKING:
    from benchmarks.gpu_check import Row, Rows

# batch, side, channels
PRODUCTS = [(64, 56, 64), (64, 28, 128), (64, 14, 256), (64, 7, 512), (64, 7, 896), (64, 12, 1280)]
PRODUCTS += [(1, 56, 64), (1, 28, 128), (1, 14, 256), (1, 7, 512)]
MAPS = [(64, 56, 64), (64, 14, 256), (1, 14, 256)]
NORMS = [(64, 112, 32), (64, 56, 64), (64, 14, 256), (1, 56, 64), (1, 14, 256)]
TINY = [(2, 8, 32)]


def rows(options: argparse.Namespace) -> Rows:
    cpu = options.platform == "cpu"
    for shape in TINY if cpu else PRODUCTS:
        yield {"layer": "linear", "shape": shape}, functools.partial(product, shape, cpu)
    for shape in TINY if cpu else MAPS:
        for layer in ("dwconv_norm_gelu", "bias_gelu"):
            yield {"layer": layer, "shape": shape}, functools.partial(in_a_row, shape, layer)
    for shape in TINY if cpu else NORMS:
        for layer in ("layer_norm", "add_norm", "norm_add"):
            yield {"layer": layer, "shape": shape}, functools.partial(in_a_row, shape, layer)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def product(shape: tuple[int, int, int], cpu: bool) -> Row:
    """Microseconds of fc1 of an MLP, by one kernel, as product and `bias_gelu`, and as XLA's own.

    Each application has an x and weights of its own: XLA makes one product of those that share one.
    """
    n, side, channels = shape
    bias = normal(1, 4 * channels)
    maps = [normal(MANY + i, n, side, side, channels) for i in range(MANY)]
    weights = [normal(i, channels, 4 * channels) / channels**0.5 for i in range(MANY)]
    in_two = lambda x, w, b: xla_ops.bias_gelu(x @ w, b)  # noqa: E731
    one = functools.partial(xla_ops.linear, gelu=True, implementation="kernel")
    forms = {"one_kernel": one, "product_and_bias_gelu": in_two}
    forms["xla"] = functools.partial(xla_ops.linear, gelu=True, implementation="jnp")
    if cpu:
        del forms["one_kernel"]  # there is none

    def program(form: Callable[..., jax.Array], count: int) -> Callable[[], Any]:
        run = jax.jit(lambda xs, ws, b: [form(x, w, b) for x, w in zip(xs, ws, strict=True)])
        return lambda: jax.block_until_ready(run(maps[:count], weights[:count], bias))

    work = 2 * n * side**2 * 4 * channels**2
    found: Row = {}
    for name, form in forms.items():
        found[f"{name}_us"] = us = attempt(slope, functools.partial(program, form))
        if isinstance(us, float):
            found[f"{name}_tflops"] = work / us / 1e6
    return found


def in_a_row(shape: tuple[int, int, int], layer: str) -> Row:
    """Microseconds of a layer applied to its own result, by the kernel and in jnp."""
    n, side, channels = shape
    x, vector = normal(0, n, side, side, channels), normal(1, channels)
    kernel = normal(2, 3, 3, channels)

    def program(form: str, count: int) -> Callable[[], Any]:
        @jax.jit
        def run(x: jax.Array) -> jax.Array:
            total = x
            for _ in range(count):
                if layer == "dwconv_norm_gelu":
                    x = xla_ops.dwconv_norm_gelu(
                        x, kernel, vector, vector, vector, implementation=form
                    )
                elif layer == "layer_norm":
                    x = xla_ops.layer_norm(x, vector, vector, implementation=form)
                elif layer == "add_norm":
                    total, x = xla_ops.add_norm(total, x, vector, vector, implementation=form)
                elif layer == "norm_add":
                    x = xla_ops.norm_add(x, total, vector, vector, implementation=form)
                else:
                    x = xla_ops.bias_gelu(x, vector, implementation=form)
                # XLA would make one pass of several.
                total, x = lax.optimization_barrier((total, x))
            return x

        return lambda: run(x).block_until_ready()

    forms = ("kernel", "jnp")
    return {f"{form}_us": attempt(slope, functools.partial(program, form)) for form in forms}

"""Times training steps on a GPU: loss and gradients of all parameters, as `programs` compiles them.

A section of `benchmarks.gpu_check`. bfloat16 with float32 parameters, random weights and images;
times and memory as in `gpu_model`. "recomputing" is the config's `with_cp`.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from benchmarks.gpu_model import B, T, side, time_calls
from benchmarks.model import random_images, random_values
from benchmarks.programs import lowered_step
from internimage_jax.config import released_model
from internimage_jax.initial import fill
from internimage_jax.model import InternImage

if TYPE_CHECKING:
    from benchmarks.gpu_check import Row, Rows

DTYPE = "bfloat16"


def rows(options: argparse.Namespace) -> Rows:
    """T by the kernels and by the jnp form, first things first: compiling is most of the time."""
    batch, larger = (1, 2) if options.platform == "cpu" else (32, 64)
    chosen: list[tuple[str, int, Any, bool]] = [
        (T, batch, None, False),
        (T, batch, None, True),
        (T, batch, "gather", False),
        (B, batch, None, False),
        (T, batch, "gather", True),
        (T, larger, None, False),
        (T, larger, None, True),
    ]
    for name, batch, form, with_cp in chosen:
        row = {"model": name, "batch": batch, "form": form or "kernels", "recomputing": with_cp}
        yield row, functools.partial(measure, options, name, batch, form, with_cp)


def measure(options: argparse.Namespace, name: str, batch: int, form: Any, with_cp: bool) -> Row:
    """How fast a step is, its memory, whether its gradients are finite, and how many arrays of them
    another call makes with other bits.
    """
    config = released_model(name).config.replace(with_cp=with_cp)
    start = time.perf_counter()
    model = InternImage(config, dtype=DTYPE, implementation=form)
    fill(model, random_values(config))
    lowered = lowered_step(model, batch, side(options, name))
    _, params, rest = nnx.split(model, nnx.Param, ...)
    images = random_images(batch, side(options, name), DTYPE)
    key = jax.random.key(0)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    step = functools.partial(compiled, params, rest, images, key)
    gradients = jax.block_until_ready(step())
    row = {
        "make_and_trace_seconds": traced - start,
        "compile_seconds": ready - traced,
        "first_call_seconds": time.perf_counter() - ready,
        "parameters_gb": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9,
        "temporaries_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
    }
    # By NumPy, which has nothing to compile for each shape.
    first, second = (list(map(np.asarray, jax.tree.leaves(g))) for g in (gradients, step()))
    differ = [a.tobytes() != b.tobytes() for a, b in zip(first, second, strict=True)]
    row |= {
        "gradients": len(first),
        "finite": all(bool(np.isfinite(a).all()) for a in first),
        "differ_from_call_to_call": sum(differ),
    }
    return row | time_calls(step, batch)

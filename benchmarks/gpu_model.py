"""Times whole models on a GPU, as they are and with single choices made the other way.

Sections of `benchmarks.gpu_check`. bfloat16, random weights. "milliseconds" are of a call that is
waited for, Python's share included; "in a row" of one of ten calls that are waited for together,
which hides that share. Compiling includes what XLA writes down of the program, for its steps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import statistics
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import jax
import numpy as np

from benchmarks.gpu_target import compiled_with_steps
from benchmarks.model import random_forward
from internimage_jax.config import released_model

if TYPE_CHECKING:
    from benchmarks.gpu_check import Row, Rows

T, B = "internimage_t_1k_224", "internimage_b_1k_224"
IN_A_ROW = 10


def models(options: argparse.Namespace) -> Rows:
    """The models as they are, and T's logits beside those of the jnp forms."""
    small, large = batches(options)
    for name, batch in ((T, large), (T, small)):
        yield {"model": name, "batch": batch}, functools.partial(measure, options, name, batch)
    yield {"model": T, "what": "against the jnp forms"}, functools.partial(compare, options)
    for name, batch in ((B, large), (B, small)):
        yield {"model": name, "batch": batch}, functools.partial(measure, options, name, batch)


def batches(options: argparse.Namespace) -> tuple[int, int]:
    return (1, 2) if options.platform == "cpu" else (1, 64)


def side(options: argparse.Namespace, name: str) -> int:
    return 64 if options.platform == "cpu" else released_model(name).image_size


def compare(options: argparse.Namespace) -> Row:
    """Largest differences of logits from those of the jnp forms in float32, in units of the
    largest logit.
    """
    config, batch = released_model(T).config, batches(options)[1]
    logits = {}
    with jax.default_matmul_precision("highest"):
        for dtype in ("float32", "bfloat16"):
            for form in ("gather", None):
                lowered, leaves, images = random_forward(
                    config, batch, side(options, T), dtype, form
                )
                logits[dtype, form] = np.asarray(lowered.compile()(leaves, images), np.float32)
    wanted = logits.pop(("float32", "gather"))
    scale = np.abs(wanted).max()
    return {
        f"{dtype}, {form or 'kernels'}": float(np.abs(got - wanted).max() / scale)
        for (dtype, form), got in logits.items()
    }


def measure(options: argparse.Namespace, name: str, batch: int, form: Any = None) -> Row:
    """How fast a model is, and the steps of its program."""
    config = released_model(name).config
    start = time.perf_counter()
    lowered, leaves, images = random_forward(config, batch, side(options, name), "bfloat16", form)
    traced = time.perf_counter()
    compiled, steps = compiled_with_steps(lowered)
    ready = time.perf_counter()
    compiled(leaves, images).block_until_ready()
    row = {
        "make_and_trace_seconds": traced - start,
        "compile_seconds": ready - traced,
        "first_call_seconds": time.perf_counter() - ready,
    }
    single, row_of = [], []
    for _ in range(5 if options.platform == "cpu" else 20):
        start = time.perf_counter()
        compiled(leaves, images).block_until_ready()
        single.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            last = compiled(leaves, images)
        last.block_until_ready()
        row_of.append((time.perf_counter() - start) / IN_A_ROW)
    each = statistics.median(row_of)
    row |= {
        "milliseconds": 1e3 * statistics.median(single),
        "milliseconds_in_a_row": 1e3 * each,
        "range_in_a_row": [1e3 * min(row_of), 1e3 * max(row_of)],
        "images_per_second": batch / each,
    }
    return row | steps


def choices(options: argparse.Namespace) -> Rows:
    """Beside the models as they are, timed anew."""
    patches = {"module": "xla_ops.convolution", "name": "LARGEST_PATCHES"}
    widest = {"module": "xla_ops.linear", "name": "MOST_CHANNELS"}
    small, large = batches(options)
    at_both = [
        ("as it is", T, None),
        ("jnp forms", T, "gather"),
        ("no convolution a product", T, patches | {"value": 0}),
        ("GELU in no product", T, widest | {"value": 0}),
        ("as it is", B, None),
        ("GELU in every product", B, widest | {"value": 1 << 30}),
    ]
    # At the small batch they all are already.
    at_large = [*at_both, ("every convolution a product", T, patches | {"value": 1 << 60})]
    for batch, chosen in ((large, at_large), (small, at_both)):
        for choice, name, change in chosen:
            row = {"model": name, "batch": batch, "choice": choice}
            yield row, functools.partial(changed, options, name, batch, change)


def changed(
    options: argparse.Namespace, name: str, batch: int, change: dict[str, Any] | str | None
) -> Row:
    jax.clear_caches()  # of layers traced with another choice
    with contextlib.ExitStack() as stack:
        if isinstance(change, dict):
            module = importlib.import_module(change["module"])
            stack.enter_context(mock.patch.object(module, change["name"], change["value"]))
        return measure(options, name, batch, change if isinstance(change, str) else None)

"""Times whole models on a GPU, as they are and with single choices made the other way.

Sections of `benchmarks.gpu_check`. bfloat16, random weights. "milliseconds" are of a call that is
waited for, Python's share included; "in a row" of one of several calls (ten, or fewer long ones)
that are waited for together, which hides that share. "temporaries_gb" is what the program wants
besides operands and result. Compiling includes what XLA writes down of the program, for its steps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from benchmarks.gpu_target import compiled_with_steps
from benchmarks.model import random_forward
from internimage_jax.config import released_model

if TYPE_CHECKING:
    from benchmarks.gpu_check import Row, Rows

T, S, B = (f"internimage_{size}_1k_224" for size in "tsb")
L, XL = "internimage_l_22kto1k_384", "internimage_xl_22kto1k_384"
H, G = "internimage_h_22kto1k_640", "internimage_g_22kto1k_512"
# What one row's calls may take, and what those that are waited for together may; seconds.
TIMING, IN_A_ROW = 3.0, 0.4


def models(options: argparse.Namespace) -> Rows:
    """The models as they are, and T's logits beside those of the jnp forms; first things first."""
    small, large = batches(options)
    first = [(T, large), (T, small)]
    # Of the largest, batches that take some tenths of a second.
    others = [(S, large), (B, large), (L, large), (XL, large), (H, min(16, large))]
    others += [(G, min(8, large)), (B, small), (S, small), (L, small)]
    for name, batch in first:
        yield {"model": name, "batch": batch}, functools.partial(measure, options, name, batch)
    yield {"model": T, "what": "against the jnp forms"}, functools.partial(compare, options)
    for name, batch in others:
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


def measure(
    options: argparse.Namespace,
    name: str,
    batch: int,
    form: Any = None,
    compiler_options: dict[str, str] | None = None,
) -> Row:
    """How fast a model is, its memory, and the steps of its program."""
    config = released_model(name).config
    start = time.perf_counter()
    lowered, leaves, images = random_forward(config, batch, side(options, name), "bfloat16", form)
    traced = time.perf_counter()
    compiled, steps = compiled_with_steps(lowered, compiler_options)
    ready = time.perf_counter()
    compiled(leaves, images).block_until_ready()
    row = {
        "make_and_trace_seconds": traced - start,
        "compile_seconds": ready - traced,
        "first_call_seconds": time.perf_counter() - ready,
        "parameters_gb": sum(leaf.nbytes for leaf in leaves) / 1e9,
        "temporaries_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
    }
    return row | time_calls(lambda: compiled(leaves, images), batch) | steps


def time_calls(call: Callable[[], Any], batch: int) -> Row:
    """Times a program that has run before; fewer calls where one takes long."""

    def seconds_of(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / calls

    about = seconds_of(1)
    calls = min(10, max(2, int(IN_A_ROW / about)))
    rounds = min(20, max(3, int(TIMING / about / (1 + calls))))
    single, in_a_row = zip(
        *((seconds_of(1), seconds_of(calls)) for _ in range(rounds)), strict=True
    )
    each = statistics.median(in_a_row)
    return {
        "milliseconds": 1e3 * statistics.median(single),
        "milliseconds_in_a_row": 1e3 * each,
        "range_in_a_row": [1e3 * min(in_a_row), 1e3 * max(in_a_row)],
        "calls_in_a_row": calls,
        "rounds": rounds,
        "images_per_second": batch / each,
    }


class Choice(NamedTuple):
    """What is made the other way: the form, constants of modules, or options of the compiler."""

    what: str
    form: str | None = None
    constants: tuple[tuple[str, str, int], ...] = ()  # of each its module, its name, the value
    compiler: dict[str, str] | None = None  # XLA's options for a GPU


def choices(options: argparse.Namespace) -> Rows:
    """Beside the models as they are, timed anew."""
    as_it_is = Choice("as it is")
    patches = ("xla_ops.convolution", "LARGEST_PATCHES")
    widest = ("xla_ops.linear", "MOST_CHANNELS")
    small, large = batches(options)
    at_both = [
        (T, as_it_is),
        (T, Choice("jnp forms", form="gather")),
        (T, Choice("no convolution a product", constants=((*patches, 0),))),
        (T, Choice("GELU in no product", constants=((*widest, 0),))),
        (B, as_it_is),
        (B, Choice("GELU in every product", constants=((*widest, 1 << 30),))),
    ]
    # A layer's first product and its depthwise convolution want nothing of each other. XLA lets the
    # steps of a command buffer run one after the other unless it is told so.
    unordered = Choice(
        "steps at once where their data allow it",
        compiler={"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
    )
    layers = ("xla_ops.layers", "MOST_NUMBERS", 1 << 19)  # all of T's and B's maps
    whole = Choice("the layers of a level one call", constants=(layers,))
    in_order = ("xla_ops.layers", "EARLY", 0)
    ordered = Choice(
        "the layers of a level one call, kernels in order", constants=(layers, in_order)
    )
    at_small = [(T, as_it_is), (T, whole), (T, ordered), (B, whole), (S, whole), (T, unordered)]
    at_small += [*at_both[1:], (B, unordered)]
    # At the small batch they all are already.
    every = Choice("every convolution a product", constants=((*patches, 1 << 60),))
    for batch, chosen in ((small, at_small), (large, [*at_both, (T, every)])):
        for name, choice in chosen:
            row = {"model": name, "batch": batch, "choice": choice.what}
            yield row, functools.partial(changed, options, name, batch, choice)


def changed(options: argparse.Namespace, name: str, batch: int, choice: Choice) -> Row:
    jax.clear_caches()  # of layers traced with another choice
    with contextlib.ExitStack() as stack:
        for module, constant, value in choice.constants:
            patch = mock.patch.object(importlib.import_module(module), constant, value)
            stack.enter_context(patch)
        compiler = choice.compiler if options.platform != "cpu" else None
        return measure(options, name, batch, choice.form, compiler)

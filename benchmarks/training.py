"""Times a training step, beside the official PyTorch model where a checkout of it is at hand.

    python -m benchmarks.training internimage_t_1k_224 --batch-size 8 --official PATH --json

A step is the loss, the gradients of all parameters, and BatchNorm's new statistics; the parameters
are float32, and stay as they are. The two take turns within one process, two steps each, the second
timed; gradients are compared before any time is taken. No path is dropped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.model import parser_of, random_images, random_values, show, timed
from benchmarks.official import copy_weights, load_official
from convert.permute import flax_layout
from convert.rules import rules
from internimage_jax.config import InternImageConfig, released_model
from internimage_jax.model import InternImage
from internimage_jax.shapes import multiply_adds

Arrays = dict[str, np.ndarray]


def random_step(
    config: InternImageConfig, batch_size: int, side: int, dtype: str
) -> tuple[jax.stages.Lowered, tuple[Any, ...]]:
    """A step with random weights before compilation, and what it takes.

    It returns the loss, BatchNorm's statistics, and the gradients by their path.
    """
    model = InternImage(config, dtype=dtype)
    values = random_values(config)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(jnp.array(values[".".join(map(str, path))]))
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)

    def step(params: nnx.State, statistics: nnx.State, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            model = nnx.merge(graphdef, params, statistics, copy=True)
            log_probabilities = jax.nn.log_softmax(model(images, train=True))
            picked = jnp.take_along_axis(log_probabilities, labels[:, None], 1)
            return -picked.mean(), nnx.state(model, nnx.BatchStat)

        return jax.value_and_grad(loss, has_aux=True)(params)

    images = random_images(batch_size, side, dtype)
    operands = params, statistics, images, jnp.arange(batch_size) % config.num_classes
    return jax.jit(step).lower(*operands), operands


def official_step(
    path: Path, config: InternImageConfig, images: jax.Array
) -> tuple[Callable[[], Any], Callable[[], Arrays]]:
    """The official model's step, and its gradients by the paths of ours."""
    import torch

    model = load_official(path, config)
    copy_weights(random_values(config), config, model)
    model.train()
    batch = torch.from_numpy(np.asarray(images, np.float32).transpose(0, 3, 1, 2).copy())
    labels = torch.arange(len(batch)) % config.num_classes

    def step() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), labels).backward()

    def gradients() -> Arrays:
        parameters = dict(model.named_parameters())
        found = {}
        for rule in rules(config):
            if rule.torch in parameters:  # and no statistic
                gradient = parameters[rule.torch].grad.numpy()
                found[rule.flax] = flax_layout(gradient, rule.axes)
        return found

    return step, gradients


def difference(gradients: nnx.State, wanted: Arrays) -> float:
    """Of all gradients as one vector, as a part of its length."""
    error = length = 0.0
    for path, variable in nnx.to_flat_state(gradients):
        exact = wanted.pop(".".join(map(str, path)))
        got = np.asarray(variable[...], np.float64)
        error += float(((got - exact.reshape(got.shape)) ** 2).sum())
        length += float((exact.astype(np.float64) ** 2).sum())
    if wanted:
        sys.exit(f"no gradients of ours for {', '.join(wanted)}")
    return (error / length) ** 0.5


def measure(options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    released = released_model(options.model)
    config = released.config.replace(drop_path_rate=0.0, with_cp=options.with_cp)
    side = options.image_size or released.image_size
    start = time.perf_counter()
    lowered, operands = random_step(config, batch_size, side, options.dtype)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    result: dict[str, Any] = {
        "benchmark": "training",
        "model": released.name,
        "image_size": side,
        "batch_size": batch_size,
        "dtype": options.dtype,
        "with_cp": options.with_cp,
        "trace_seconds": lowered_at - start,
        "compile_seconds": time.perf_counter() - lowered_at,
        "temporary_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(compiled(*operands)),
    }
    _, gradients = runs["ours"]()
    if options.official:
        runs["official"], official_gradients = official_step(options.official, config, operands[2])
        runs["official"]()
        result["difference"] = difference(gradients, official_gradients())
        limit = 1e-3 if options.dtype == "float32" else 0.2
        if not result["difference"] <= limit:
            sys.exit(f"gradients differ by {result['difference']:.1e}: no times taken")
    # Each product of the forward has two as large in the backward.
    return result | timed(runs, options, 3 * multiply_adds(config, side) * batch_size)


def main() -> None:
    parser = parser_of(__doc__, [8])
    parser.add_argument("--with-cp", action="store_true", help="recompute each layer")
    show(parser.parse_args(), measure)


if __name__ == "__main__":
    main()

"""Times the whole model, beside the official PyTorch model where a checkout of it is at hand.

    python -m benchmarks.model internimage_t_1k_224 --batch-size 1 8 --official PATH --json

The two take turns within one process, two calls each, the second timed; outputs are compared before
any time is taken. Weights are drawn at random, with offsets of about a pixel.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

import xla_ops
from benchmarks.official import checkout, copy_weights, load_official
from internimage_jax.config import InternImageConfig, released_model
from internimage_jax.model import InternImage
from internimage_jax.shapes import multiply_adds, parameter_shapes

DRAWN = 1048573  # numbers; a prime, so rows of a kernel do not begin alike


def random_values(config: InternImageConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Weights that keep activations near 1 and exercise every branch.

    All are the same numbers over and over, which every array begins elsewhere in, and share their
    memory: the 3e9 of the largest model would take half a minute to draw.
    """
    drawn = np.random.default_rng(0).standard_normal(DRAWN, np.float32)
    scaled: dict[float, np.ndarray] = {}

    def draw(shape: tuple[int, ...], scale: float) -> np.ndarray:
        start, size = 997 * len(values) % DRAWN, math.prod(shape)
        numbers = scaled.get(scale)
        if numbers is None:
            numbers = (drawn * np.float32(scale)).astype(dtype)
        if len(numbers) < size + DRAWN:
            numbers = np.resize(numbers, size + DRAWN)
        scaled[scale] = numbers
        return numbers[start : start + size].reshape(shape)

    values: dict[str, np.ndarray] = {}
    for path, shape in parameter_shapes(config).items():
        if path.endswith("kernel"):
            value = draw(shape, math.prod(shape[:-1]) ** -0.5)
        elif path.endswith(("scale", "var")):
            value = 1 + np.abs(draw(shape, 0.1))
        elif "gamma" in path:
            value = 0.2 + draw(shape, 0.05)
        else:
            value = draw(shape, 0.5 if ".offset." in path else 0.1)
        values[path] = value.astype(dtype, copy=False)
    return values


def random_forward(
    config: InternImageConfig,
    batch_size: int,
    side: int,
    dtype: str = "float32",
    implementation: Any = None,
) -> tuple[jax.stages.Lowered, list[jax.Array], jax.Array]:
    """The forward of a model with random weights before compilation, its parameters, and images."""
    model = InternImage(config, dtype=dtype, param_dtype=dtype, implementation=implementation)
    values = random_values(config, dtype)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(values[".".join(map(str, path))])  # NumPy's: to join them is no program
    graphdef, state = nnx.split(model.fused())
    leaves, tree = jax.tree.flatten(state)
    # A CPU's JAX may otherwise keep them where they are, in memory that they share.
    leaves = [jnp.array(leaf, copy=jax.default_backend() == "cpu") for leaf in leaves]

    def forward(leaves: list[jax.Array], images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(images)

    images = random_images(batch_size, side, dtype)
    return jax.jit(forward).lower(leaves, images), leaves, images


def random_images(batch_size: int, side: int, dtype: str) -> jax.Array:
    stream = np.random.default_rng(1)
    return jnp.asarray(stream.standard_normal((batch_size, side, side, 3), np.float32), dtype)


def lowered_forward(
    config: InternImageConfig,
    batch_size: int,
    side: int,
    dtype: str = "float32",
    sharding: Sharding | None = None,
) -> tuple[jax.stages.Lowered, list[jax.ShapeDtypeStruct]]:
    """The forward pass before compilation, and its parameters' shapes; no parameter is made.

    With a sharding, operands are where that says, so the program is for these devices.
    """
    model = InternImage(config, dtype=dtype, param_dtype=dtype)  # has shapes in their place
    # The layout of kernels is that of the devices which the program is for.
    backend = next(iter(sharding.device_set)).platform if sharding else jax.default_backend()
    with mock.patch.object(jax, "default_backend", return_value=backend):
        graphdef, state = nnx.split(nnx.eval_shape(InternImage.fused, model))
    leaves, tree = jax.tree.flatten(state)
    leaves = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in leaves]

    def forward(leaves: list[jax.Array], images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))(images)

    shape = (batch_size, side, side, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
    return jax.jit(forward).lower(leaves, images), leaves


def interleaved(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each second call, the functions taking turns of two for about `seconds`.

    The first is not timed: threads of the function before may still spin, its data fill the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


CUBE = 2048


def cube(dtype: str) -> Callable[[], Any]:
    """A product of two square matrices, whose rate is what the machine gives at the time."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((CUBE, CUBE)), dtype)
    product = jax.jit(lambda a: a @ a)
    return lambda: product(a).block_until_ready()


def measure(options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    released = released_model(options.model)
    side = options.image_size or released.image_size
    lowered, leaves, images = random_forward(
        released.config, batch_size, side, options.dtype, options.implementation
    )
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    result: dict[str, Any] = {
        "model": released.name,
        "image_size": side,
        "batch_size": batch_size,
        "dtype": options.dtype,
        "implementation": options.implementation or "best",
        "compile_seconds": time.perf_counter() - lowered_at,
        "temporary_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: compiled(leaves, images).block_until_ready()
    }
    logits = np.asarray(runs["ours"]())
    if options.official:
        import torch

        official = load_official(options.official, released.config)
        copy_weights(random_values(released.config), released.config, official)
        batch = torch.from_numpy(np.asarray(images, np.float32).transpose(0, 3, 1, 2).copy())

        def run_official() -> Any:
            with torch.inference_mode():
                return official(batch)

        wanted = run_official().numpy()
        result["difference"] = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
        limit = 1e-4 if options.dtype == "float32" else 0.1
        if result["difference"] > limit:
            sys.exit(
                f"outputs differ by {result['difference']:.1e} of the largest logit: no times taken"
            )
        runs["official"] = run_official
    work = multiply_adds(released.config, side) * batch_size
    return result | timed(runs, options, work)


def timed(
    runs: dict[str, Callable[[], Any]], options: argparse.Namespace, work: int
) -> dict[str, Any]:
    """Times of `runs`, the ratio of "official" to "ours", and the rate of `work` multiply-adds."""
    result: dict[str, Any] = {}
    times = interleaved({**runs, "cube": cube(options.dtype)}, options.seconds)
    for name, each in times.items():
        result[f"{name}_ms"] = statistics.median(each)
        result[f"{name}_ms_range"] = [min(each), max(each)]
    if "official" in times:
        pairs = zip(times["official"], times["ours"], strict=True)
        result["ratio"] = statistics.median(b / a for b, a in pairs)
    result["gflops"] = 2 * work / result["ours_ms"] / 1e6
    result["cube_gflops"] = 2 * CUBE**3 / result["cube_ms"] / 1e6
    pairs = zip(times["cube"], times["ours"], strict=True)
    result["part_of_matmul_rate"] = work / CUBE**3 * statistics.median(a / b for a, b in pairs)
    return result


def parser_of(description: str, batch_sizes: list[int]) -> argparse.ArgumentParser:
    """The arguments of this benchmark and of that of training."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("model", nargs="?", default="internimage_t_1k_224")
    parser.add_argument("--batch-size", type=int, nargs="+", default=batch_sizes)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--official", type=checkout, help="a checkout of the official code")
    parser.add_argument("--seconds", type=float, default=20, help="of timing for each batch size")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each batch size")
    return parser


def show(
    options: argparse.Namespace, measure: Callable[[argparse.Namespace, int], dict[str, Any]]
) -> None:
    """Measures and prints one batch size after the other."""
    for batch_size in options.batch_size:
        result = measure(options, batch_size)
        result["jax"] = jax.__version__
        result["device"] = f"{jax.devices()[0].device_kind} ({platform.machine()})"
        result["cpu_kernels"] = xla_ops.status()["cpu"].detail
        if options.json:
            print(json.dumps(result), flush=True)
            continue
        for key, value in result.items():
            print(f"{key:>22}  {value:.4g}" if isinstance(value, float) else f"{key:>22}  {value}")
        print(flush=True)


def main() -> None:
    parser = parser_of(__doc__, [1, 8])
    parser.add_argument("--implementation", choices=("kernel", "gather"))
    show(parser.parse_args(), measure)


if __name__ == "__main__":
    main()

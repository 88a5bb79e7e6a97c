"""Tells what compiled programs of the models are: the memory they want, and on a GPU their steps.

    python -m benchmarks.programs --batch-size 1 8 --json
    python -m benchmarks.programs --gpu H200 --batch-size 1 64 --training --json

Nothing is run and no parameter is made, so the largest model takes no more memory than a small one.
With `--gpu` the programs are for a GPU, which need not be here (`benchmarks.gpu_target` says what
has to be installed). A program that is one command buffer, and nothing outside it, is launched as
one CUDA graph. Training is a step of T (loss, gradients of all parameters) at 32 images, with and
without recomputation of each layer (`with_cp`). With `--layers` a level is a call of
`xla_ops.layers` where it serves, which models do not take of themselves.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import time
from typing import Any

import jax
from flax import nnx
from jax.sharding import Sharding

from benchmarks import gpu_target
from benchmarks.model import lowered_forward
from internimage_jax.config import RELEASED, InternImageConfig
from internimage_jax.model import InternImage

T = "internimage_t_1k_224"


def forward(name: str, batch_size: int, dtype: str, sharding: Sharding | None) -> dict[str, Any]:
    released = RELEASED[name]
    lowered, leaves = lowered_forward(
        released.config, batch_size, released.image_size, dtype, sharding
    )
    parameters = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    row = {"program": "forward", "model": name, "dtype": dtype, "batch_size": batch_size}
    return {**row, "parameters_gb": parameters / 1e9, **describe(lowered, sharding)}


def training(
    config: InternImageConfig, batch_size: int, dtype: str, sharding: Sharding | None
) -> dict[str, Any]:
    lowered = lowered_step(InternImage(config, dtype=dtype), batch_size, 224, sharding)
    program = "training step" + (", recomputing" if config.with_cp else "")
    row = {"program": program, "model": T, "dtype": dtype, "batch_size": batch_size}
    return row | describe(lowered, sharding)


def lowered_step(
    model: InternImage, batch_size: int, side: int, sharding: Sharding | None = None
) -> jax.stages.Lowered:
    """A training step before compilation, of a model with or without values.

    It takes parameters, statistics, images and a PRNG key, and returns the parameters' gradients.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State, rest: nnx.State, images: jax.Array, key: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params, rest, copy=True)(images, train=True, key=key)
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    images = jax.ShapeDtypeStruct((batch_size, side, side, 3), model.dtype)
    key = jax.eval_shape(jax.random.key, 0)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        (params, rest, images, key),
    )
    return jax.jit(jax.grad(loss)).lower(*shapes)


def describe(lowered: jax.stages.Lowered, sharding: Sharding | None) -> dict[str, Any]:
    start = time.perf_counter()
    if sharding is None:
        compiled, found = lowered.compile(), {}
    else:
        compiled, found = gpu_target.compiled_with_steps(lowered)
    seconds = time.perf_counter() - start
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {"temporaries_gb": temporaries / 1e9, "compile_seconds": seconds, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=RELEASED, default=list(RELEASED))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--training", action="store_true", help="T at 32 images too")
    parser.add_argument("--gpu", choices=gpu_target.GPUS, help="compile for one that is not here")
    parser.add_argument("--layers", action="store_true", help="a level's layers as one call")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    if options.layers:  # the module, whose name in the package is the operator's
        importlib.import_module("xla_ops.layers").MOST_NUMBERS = 1 << 19  # all of T's and B's maps
    sharding = gpu_target.sharding(options.gpu) if options.gpu else None
    platform = options.gpu or jax.default_backend()
    for name in options.models:
        for batch_size in options.batch_size:
            row = forward(name, batch_size, options.dtype, sharding)
            row["program"] += ", whole levels" if options.layers else ""
            show({"platform": platform, **row}, options.json)
    for with_cp in (False, True) if options.training else ():
        config = RELEASED[T].config.replace(with_cp=with_cp)
        row = training(config, 32, options.dtype, sharding)
        show({"platform": platform, **row}, options.json)


def show(row: dict[str, Any], as_json: bool) -> None:
    row = {"benchmark": "programs", "jax": jax.__version__, **row}
    print(json.dumps(row) if as_json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()

"""Tells the memory that compiled programs of the models want, as XLA reports it; nothing is run.

    python -m benchmarks.memory --json

Parameters, and temporaries of the forward pass at each batch size; and of a training step of T
(loss, gradients of all parameters) with and without recomputation of each layer (`with_cp`). What
another platform's XLA wants can differ.
"""

from __future__ import annotations

import argparse
import json
import math

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.model import lowered_forward
from internimage_jax.config import RELEASED, InternImageConfig
from internimage_jax.model import InternImage

T = "internimage_t_1k_224"


def forward(name: str, batch_size: int, dtype: str) -> dict[str, object]:
    released = RELEASED[name]
    lowered, leaves = lowered_forward(released.config, batch_size, released.image_size, dtype)
    parameters = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return {
        "program": "forward",
        "model": name,
        "dtype": dtype,
        "batch_size": batch_size,
        "parameters_gb": parameters / 1e9,
        "temporaries_gb": lowered.compile().memory_analysis().temp_size_in_bytes / 1e9,
    }


def training(config: InternImageConfig, batch_size: int, dtype: str) -> dict[str, object]:
    graphdef, params, rest = nnx.split(InternImage(config, dtype=dtype), nnx.Param, ...)

    def loss(params: nnx.State, rest: nnx.State, images: jax.Array, key: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params, rest, copy=True)(images, train=True, key=key)
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    images = jax.ShapeDtypeStruct((batch_size, 224, 224, 3), jnp.dtype(dtype))
    key = jax.eval_shape(jax.random.key, 0)
    compiled = jax.jit(jax.grad(loss)).lower(params, rest, images, key).compile()
    return {
        "program": "training step" + (", recomputing" if config.with_cp else ""),
        "model": T,
        "dtype": dtype,
        "batch_size": batch_size,
        "temporaries_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=RELEASED, default=list(RELEASED))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--training", action="store_true", help="T at 32 images too")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    rows = (forward(n, b, options.dtype) for n in options.models for b in options.batch_size)
    for row in rows:
        show(row, options.json)
    for with_cp in (False, True) if options.training else ():
        config = RELEASED[T].config.replace(with_cp=with_cp)
        show(training(config, 32, options.dtype), options.json)


def show(row: dict[str, object], as_json: bool) -> None:
    row = {"benchmark": "memory", "platform": jax.default_backend(), **row}
    print(json.dumps(row) if as_json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()

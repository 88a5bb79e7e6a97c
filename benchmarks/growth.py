"""Times the forward pass against batch, image side, model size and number of devices.

    python -m benchmarks.growth --json > growth.jsonl

There should be no step where there is no reason for one. Devices are forced CPU devices, the work
of each the same: with fewer cores than devices, time grows as the work does, and not faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.model import random_forward
from internimage_jax.config import RELEASED, InternImageConfig
from internimage_jax.shapes import multiply_adds

T = "internimage_t_1k_224"
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)
SIDES = (32, 33, 48, 64, 65, 96, 128, 160, 192, 223, 224, 225, 256, 320, 384, 512, 640, 768, 1024)
DEVICES = (1, 2, 4, 8)
SMALL = InternImageConfig(channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8))


def median_ms(run: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of a call, over about `seconds` and three calls at least."""
    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def forward(config: InternImageConfig, batch_size: int, side: int, seconds: float) -> dict:
    """One point: milliseconds, and the rate in multiply-adds."""
    lowered, leaves, images = random_forward(config, batch_size, side)
    compiled = lowered.compile()
    ms = median_ms(lambda: compiled(leaves, images).block_until_ready(), seconds)
    work = multiply_adds(config, side) * batch_size
    return {
        "batch_size": batch_size,
        "image_size": side,
        "ms": ms,
        "ms_per_image": ms / batch_size,
        "gflops": 2 * work / ms / 1e6,
    }


def points(what: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    if "batch" in what:
        for batch_size in BATCHES:
            yield {"series": "batch", **forward(RELEASED[T].config, batch_size, 224, seconds)}
    if "side" in what:
        for side in SIDES:
            yield {"series": "side", **forward(RELEASED[T].config, 1, side, seconds)}
    if "model" in what:
        for name, released in RELEASED.items():
            if "_1k_224" in name or "22kto1k_384" in name:
                point = forward(released.config, 1, released.image_size, seconds)
                yield {"series": "model", "model": name, **point}
    if "devices" in what:
        for count in DEVICES:
            flags = os.environ.get("XLA_FLAGS", "")
            flags += f" --xla_force_host_platform_device_count={count}"
            command = [sys.executable, "-m", "benchmarks.growth", "--one-pmap", str(count)]
            command += ["--seconds", str(seconds)]
            out = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, env=os.environ | {"XLA_FLAGS": flags}
            ).stdout
            yield {"series": "devices", **json.loads(out)}


def one_pmap(count: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a small model under `pmap`, four images a device."""
    from flax import nnx

    from benchmarks.model import random_values
    from internimage_jax.initial import fill
    from internimage_jax.model import InternImage

    model = InternImage(SMALL)
    fill(model, dict(random_values(SMALL)))
    graphdef, state = nnx.split(model.fused())
    mapped = jax.pmap(lambda state, x: nnx.merge(graphdef, state)(x))
    state = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), state)
    state = jax.pmap(lambda a: a)(state)  # to the devices, once
    images = jnp.asarray(np.random.RandomState(0).standard_normal((count, 4, 128, 128, 3)), "f4")
    text = mapped.lower(state, images).compile().as_text() or ""
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    ms = median_ms(lambda: mapped(state, images).block_until_ready(), seconds)
    return {
        "devices": count,
        "cores": len(os.sched_getaffinity(0)),
        "ms": ms,
        "ms_per_device": ms / count,
        "collectives": sum(text.count(f" {name}(") for name in names),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    series = ["batch", "side", "model", "devices"]
    parser.add_argument("--series", nargs="+", choices=series, default=series)
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each point")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--one-pmap", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_pmap:
        print(json.dumps(one_pmap(options.one_pmap, options.seconds)))
        return
    for point in points(options.series, options.seconds):
        point = {"benchmark": "growth", "device": jax.devices()[0].device_kind, **point}
        if options.json:
            print(json.dumps(point), flush=True)
            continue
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in point.items()}
        print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


if __name__ == "__main__":
    main()

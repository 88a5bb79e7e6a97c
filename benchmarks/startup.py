"""Times what comes before the first prediction: imports, tracing, compilation, the command line.

    python -m benchmarks.startup --json

Each process that is timed is a new one. "warm" has the programs of a run before in the compilation
cache, "cold" has an empty one. Python's share of a call is the time of calling a compiled program
that takes as many arrays as a predictor with T does, and does nothing with them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.model import lowered_forward
from internimage_jax.commands.demo import write_checkpoint
from internimage_jax.config import released_model
from internimage_jax.predict import is_argument

T, G = "internimage_t_1k_224", "internimage_g_22kto1k_512"


def seconds_of(*arguments: str, rounds: int, **variables: str) -> float:
    """Median wall-clock seconds of a Python process from start to end."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | variables,
        )
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def imports(rounds: int) -> dict[str, float]:
    """Seconds to import this package, and jax and flax alone."""
    ours = "import jax, flax.nnx, internimage_jax; internimage_jax.from_pretrained"
    return {
        "import_jax_and_flax": seconds_of("-c", "import jax, flax.nnx", rounds=rounds),
        "import_internimage_jax_too": seconds_of("-c", ours, rounds=rounds),
    }


def command_line(rounds: int) -> dict[str, float]:
    """Seconds from the shell to the end of conversion and of a first prediction with T."""
    photo = resources.files("internimage_jax") / "data_files" / "cat.jpg"
    released = released_model(T)
    with tempfile.TemporaryDirectory() as folder, resources.as_file(photo) as path:
        source, model = Path(folder, "source"), Path(folder, "model")
        write_checkpoint(source, released.config, released.image_size)
        found = {}
        start = time.perf_counter()
        command = [sys.executable, "-m", "convert", source, model]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found["convert"] = time.perf_counter() - start
        predict = ("-m", "internimage_jax", "predict", str(path), "--model", str(model))
        cache = str(Path(folder, "cache"))
        found["predict_cold"] = seconds_of(*predict, rounds=1, INTERNIMAGE_CACHE=cache)
        found["predict_warm"] = seconds_of(*predict, rounds=rounds, INTERNIMAGE_CACHE=cache)
        return found


def compilation(name: str) -> dict[str, float]:
    """Seconds to trace and to compile a model's forward at batch 1; no parameter is made."""
    released = released_model(name)
    start = time.perf_counter()
    lowered, leaves = lowered_forward(released.config, 1, released.image_size)
    traced = time.perf_counter()
    lowered.compile()
    return {
        "trace": traced - start,
        "compile": time.perf_counter() - traced,
        "arguments": sum(map(is_argument, leaves)),
    }


def python_share(arrays: int) -> float:
    """Microseconds of a call with that many parameters, all but what the model computes."""
    leaves = [jnp.full(1, i) for i in range(arrays)]
    nothing = jax.jit(lambda leaves, x: x + 1, keep_unused=True).lower(leaves, jnp.zeros(1))
    compiled = nothing.compile()
    x = jnp.zeros(1)
    times = []
    for _ in range(2000):
        start = time.perf_counter()
        compiled(leaves, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "startup", "jax": jax.__version__}
    result |= imports(options.rounds)
    result |= command_line(options.rounds)
    for letter, name in (("t", T), ("g", G)):
        found = compilation(name)
        result |= {f"{key}_{letter}": value for key, value in found.items()}
    result["python_microseconds"] = python_share(result["arguments_t"])
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:>28}  {value:.3g}" if isinstance(value, float) else f"{key:>28}  {value}")


if __name__ == "__main__":
    main()

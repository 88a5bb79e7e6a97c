"""Where a model's time on a GPU goes: how long each kernel of its forward pass takes.

A section of `benchmarks.gpu_check`. JAX's profiler writes down when each kernel ran. Here they are
launched one by one, since those of a CUDA graph lose the names of their operations; what a graph
saves, the gaps between kernels, is the difference of "busy" and "span".
"""

from __future__ import annotations

import argparse
import collections
import functools
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax

from benchmarks.gpu_model import B, T, batches, side
from benchmarks.model import random_forward
from internimage_jax.config import released_model

if TYPE_CHECKING:
    from benchmarks.gpu_check import Row, Rows

CALLS = 3
ONE_BY_ONE = {"xla_gpu_enable_command_buffer": ""}


class Launch(NamedTuple):
    """A kernel, when it began and how long it took; nanoseconds."""

    name: str
    start: float
    duration: float


def rows(options: argparse.Namespace) -> Rows:
    small, large = batches(options)
    for name, batch in ((T, large), (T, small), (B, large)):
        yield {"model": name, "batch": batch}, functools.partial(profile, options, name, batch)


def profile(options: argparse.Namespace, name: str, batch: int) -> Row:
    """Microseconds of one call: all its kernels, and those of each name."""
    cpu = options.platform == "cpu"
    lowered, leaves, images = random_forward(
        released_model(name).config, batch, side(options, name), "bfloat16"
    )
    compiled = lowered.compile({} if cpu else ONE_BY_ONE)
    for _ in range(CALLS):
        compiled(leaves, images).block_until_ready()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                compiled(leaves, images).block_until_ready()
        launches = launches_in(Path(folder))
    one = launches[-(len(launches) // CALLS) :]  # the last call
    if not one:
        return {"busy_us": 0.0, "kernels": []}
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    for launch in one:
        by_name[group_of(launch.name)].append(launch.duration / 1e3)
    sums = sorted(((sum(v), len(v), k) for k, v in by_name.items()), reverse=True)
    return {
        "busy_us": sum(launch.duration for launch in one) / 1e3,
        "span_us": (one[-1].start + one[-1].duration - one[0].start) / 1e3,
        "kernels": [[name, count, round(us, 1)] for us, count, name in sums],
        "in_order": [[launch.name[:60], round(launch.duration / 1e3, 1)] for launch in one],
    }


def launches_in(folder: Path) -> list[Launch]:
    """Kernels that a GPU ran while the profiler wrote to the folder, by time."""
    (path,) = folder.rglob("*.xplane.pb")
    found = [
        Launch(event.name, event.start_ns, event.duration_ns)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")  # others tell of the same kernels by operation
        for event in line.events
    ]
    return sorted(found, key=lambda launch: launch.start)


def group_of(name: str) -> str:
    """A kernel's name without what tells one instance from the next."""
    name = re.sub(r"^void |\(.*", "", name)
    return re.sub(r"_\d+(_\d+)*$", "", name)[:90]

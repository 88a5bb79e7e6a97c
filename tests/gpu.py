"""Where the tests for a GPU run: on one if there is one, else on the host (kernels_on_host).

On a GPU a kernel that does not serve is an error and no skip. INTERNIMAGE_GPU_TESTS_ON, "cuda" or
"host", says where, whatever there is.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import xla_ops
from tests.kernels_on_host import cannot_build, cuda_kernels_on_host
from xla_ops import _ffi


def _place() -> str:
    try:
        return "cuda" if jax.local_devices(backend="cuda") else "host"
    except RuntimeError:  # no such platform
        return "host"


ON = os.environ.get("INTERNIMAGE_GPU_TESTS_ON") or _place()
if ON not in ("cuda", "host"):
    raise ValueError(f"INTERNIMAGE_GPU_TESTS_ON: expected cuda or host, got {ON!r}")


def needs_it() -> pytest.MarkDecorator:
    """The mark of a test that runs there."""
    reason = cannot_build() if ON == "host" else ""
    return pytest.mark.skipif(bool(reason), reason=reason)


def needs_instructions_of(target: str) -> pytest.MarkDecorator:
    """That of a test of a kernel that some GPUs have no instructions for."""
    missing = ON == "cuda" and target in _ffi._extension("cuda").missing(0)
    return pytest.mark.skipif(missing, reason="the GPU has no such instructions")


def large(*values: Any) -> Any:
    """Parameters of a test that would take a CPU minutes."""
    return pytest.param(*values, marks=pytest.mark.skipif(ON != "cuda", reason="for a GPU alone"))


def device() -> jax.Device:
    return jax.local_devices(backend="cuda" if ON == "cuda" else "cpu")[0]


def kernels() -> contextlib.AbstractContextManager[None]:
    """Within, on that device, the operators are the CUDA kernels."""
    if ON == "host":
        return cuda_kernels_on_host()
    status = xla_ops.status()["cuda"]
    assert status.implementation == "kernel", status.detail
    return contextlib.nullcontext()


def by_kernel(function: Callable, *arrays: Any, times: int = 1) -> list[Any]:
    """What `function`, whose kernel may be one of the forward alone, returns there, each time."""
    local = jax.device_put(arrays, device())
    with kernels():
        run = jax.jit(functools.partial(function, implementation="kernel"))
        return [jax.tree.map(np.asarray, run(*local)) for _ in range(times)]

"""Where the tests for a GPU run: on one if there is one, else on the host (kernels_on_host)."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any

import jax
import pytest

import xla_ops
from tests.kernels_on_host import cuda_kernels_on_host
from tests.native import COMPILER


def _place() -> str:
    there = xla_ops.status()["cuda"].implementation == "kernel"
    return "cuda" if there else "host"


ON = os.environ.get("INTERNIMAGE_GPU_TESTS_ON") or _place()


def needs_it() -> pytest.MarkDecorator:
    """The mark of a test that runs there."""
    if ON == "cuda":
        status = xla_ops.status()["cuda"]
        absent, reason = status.implementation != "kernel", f"no kernel for cuda: {status.detail}"
    else:
        absent, reason = shutil.which(COMPILER) is None, f"no compiler {COMPILER}"
    return pytest.mark.skipif(absent, reason=reason)


def large(*values: Any) -> Any:
    """Parameters of a test that would take a CPU minutes."""
    return pytest.param(*values, marks=pytest.mark.skipif(ON != "cuda", reason="for a GPU alone"))


def device() -> jax.Device:
    return jax.local_devices(backend="cuda" if ON == "cuda" else "cpu")[0]


def kernels() -> contextlib.AbstractContextManager[None]:
    """Within, on that device, the operators are the CUDA kernels."""
    return contextlib.nullcontext() if ON == "cuda" else cuda_kernels_on_host()

"""Strict settings for all tests: what JAX or NumPy would do silently is an error."""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import shutil
import tempfile

# Before jax is imported. Several devices on one CPU, so that sharding is tested everywhere.
# Compiling is most of the time, so it is done as fast as it can be: without LLVM's optimisation,
# and by XLA's older emitters where it still has them. Released models are compiled as users
# compile them, and so is everything under a later jaxlib, but for LLVM's optimisation. XLA for GPUs
# heeds these flags as well and does not do without, so they are for a CPU alone.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        + " --xla_cpu_use_fusion_emitters=false"
        * importlib.metadata.version("jaxlib").startswith("0.10.")
    )
# What several tests or their processes compile is compiled once; pytest-xdist's workers share it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    folder = tempfile.mkdtemp(prefix="internimage-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["INTERNIMAGE_TESTS_FOLDER"] = folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/xla"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A GPU's default for float32 products has the accuracy of a tenth of the mantissa.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def x64():
    """Makes float64 available within a test; flax promotes to it without being asked."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keeps commands that tests start out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What compiles for a minute goes first: at the end one process would wait for the other.
    items.sort(key=lambda item: item.path.name not in ("test_native.py", "test_layers_cuda.py"))

"""Compiles programs for a GPU that is not here, and tells what they consist of.

JAX's plugin for CUDA is wanted, of jaxlib's version and without its libraries, and CUDA's ptxas:

    pip install --no-deps jax-cuda13-pjrt==VERSION jax-cuda13-plugin==VERSION

XLA then knows the GPU from a description alone. What it would choose by trying, such as the form of
each matrix product, it chooses by a model of costs; all else is the program that would run.
"""

from __future__ import annotations

import collections
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from xla_ops import _ffi, _targets


class Gpu(NamedTuple):
    """What XLA's models of costs ask of a GPU; sizes in bytes."""

    capability: tuple[int, int]
    processors: int
    memory: int
    bandwidth: int  # bytes a second
    level2: int
    shared: int  # of a multiprocessor
    clock: float  # GHz


GPUS = {
    "H200": Gpu((9, 0), 132, 151397597184, 4800 * 10**9, 50 << 20, 228 << 10, 1.98),
    "H100": Gpu((9, 0), 132, 85017755648, 3350 * 10**9, 50 << 20, 228 << 10, 1.98),
    "A100": Gpu((8, 0), 108, 85174583296, 2039 * 10**9, 40 << 20, 164 << 10, 1.41),
}


def sharding(name: str) -> SingleDeviceSharding:
    """Where operands would be, for `jax.ShapeDtypeStruct`; the CUDA kernels serve from then on."""
    # The plugin otherwise asks for CUDA's libraries, which compiling does not need.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology="1x1x1", target_config=_description(name)
    )
    # Of compute capability 9.0.
    of_its_own = {_targets.LINEAR_FORWARD, _targets.MLP_FORWARD, _targets.LAYERS_FORWARD}
    without = of_its_own if GPUS[name].capability != (9, 0) else set()
    _ffi.serve_untried("cuda", frozenset(without))
    return SingleDeviceSharding(topology.devices[0])


def _description(name: str) -> str:
    """`stream_executor.GpuTargetConfigProto` in text."""
    gpu = GPUS[name]
    major, minor = gpu.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "NVIDIA {name}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          name: "NVIDIA {name}"
          device_vendor: "NVIDIA Corporation"
          platform_version: "Compute Capability {major}.{minor}"
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.processors}
          fpus_per_core: {128 if major > 8 else 64}
          clock_rate_ghz: {gpu.clock}
          device_memory_size: {gpu.memory}
          memory_bandwidth: {gpu.bandwidth}
          l2_cache_size: {gpu.level2}
          shared_memory_per_core: {gpu.shared}
          shared_memory_per_block: {48 << 10}
          shared_memory_per_block_optin: {gpu.shared - 1024}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          device_address_bits: 64
          ecc_enabled: true
          driver_version: "13.0.0"
          runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.10.0"
        }}"""


def compiled_with_steps(
    lowered: jax.stages.Lowered, compiler_options: dict[str, str] | None = None
) -> tuple[jax.stages.Compiled, dict[str, int]]:
    """Compiles for a GPU, here or not; with the program goes what it consists of, as far as this
    XLA writes it down.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, **(compiler_options or {})})
        # Before XLA's passes over the steps, which make command buffers, and maybe after.
        found = sorted(Path(folder).glob("*.thunk_sequence*.txt"))
        return compiled, count_steps(found[-1].read_text()) if found else {}


def count_steps(steps: str) -> dict[str, int]:
    """Counts the steps of a program as XLA writes them down, one a line.

    Steps of a command buffer, which is launched as one, are indented. Within them are products,
    our own calls, and kernels that XLA made of all else, copies and transposes among them.
    """
    counts: collections.Counter[str] = collections.Counter()
    for line in steps.splitlines():
        found = re.match(r"(\s*)\d+: k(\w+)\s+\[[^]]*\]\s*(\S*)", line)
        if not found:
            continue
        indent, kind, name = found.groups()
        if kind == "CommandBuffer":
            counts["command_buffers"] += 1
            continue
        if not indent:
            counts["outside"] += 1
        counts["steps"] += 1
        counts[_kind_of_step(kind, name)] += 1
    names = "steps command_buffers outside products calls convolutions copies transposes converts"
    return {name: counts[name] for name in names.split()}


def _kind_of_step(kind: str, name: str) -> str:
    if kind == "CustomCall":
        return "calls"
    if kind.startswith("Convolution"):
        return "convolutions"
    if "Gemm" in kind or "CublasLt" in kind or name.startswith("gemm_fusion"):
        return "products"
    if kind in ("Copy", "Memcpy", "DeviceToDeviceCopy") or re.match(r"\w*copy", name):
        return "copies"
    if "transpose" in name:
        return "transposes"
    return "converts" if name.startswith("wrapped_convert") else "other"

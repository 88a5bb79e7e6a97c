"""The compiled extensions: imports them, registers their targets once, and tries each target.

Nothing happens on import. The first call of the operator registers the targets and runs each on a
tiny input; one that fails is set aside with its reason, and the jnp form serves in its place.
"""

from __future__ import annotations

import functools
import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray

VERSION = 1  # of the attributes and layouts; the handlers refuse another

FORWARD = "internimage_dcnv3_forward"
BACKWARD = "internimage_dcnv3_backward"
FUSED_FORWARD = "internimage_dcnv3_fused_forward"
FUSED_BACKWARD = "internimage_dcnv3_fused_backward"
TARGETS = (FORWARD, BACKWARD, FUSED_FORWARD, FUSED_BACKWARD)

# As JAX names them; the module with a platform's handlers is `_cpu` or `_cuda`.
PLATFORMS = ("cpu", "cuda")

_XLA_NAMES = {"cpu": "cpu", "cuda": "CUDA"}

_lock = threading.Lock()


class Status(NamedTuple):
    """What serves on a platform: "kernel" or "gather", and why or in what form."""

    implementation: str
    detail: str


def status() -> dict[str, Status]:
    """Tells what serves on each platform that has a kernel, and why where it is not the kernel."""
    return {platform: _load(platform) for platform in PLATFORMS}


def serving() -> tuple[str, ...]:
    """The platforms whose kernel is there and passed its trial."""
    return tuple(name for name in PLATFORMS if _load(name).implementation == "kernel")


def _load(platform: str) -> Status:
    with _lock:
        return _load_once(platform)


@functools.cache
def _load_once(platform: str) -> Status:
    name = f"_{platform}"
    try:
        extension = importlib.import_module(f"xla_ops.{name}")
    except ImportError as error:
        reason = Path(__file__).with_name(f"{name}.reason")
        return Status(
            "gather", reason.read_text().strip() if reason.exists() else f"not built: {error}"
        )
    if extension.version != VERSION:
        return Status("gather", f"built as version {extension.version}, not {VERSION}: rebuild it")
    try:
        device = jax.local_devices(backend=platform)[0]
    except RuntimeError:  # where this JAX has no such platform, or the machine no such device
        return Status(
            "gather", f"built for {extension.instruction_set()}; JAX has no {platform} here"
        )
    try:
        for target, handler in extension.targets().items():
            jax.ffi.register_ffi_target(target, handler, platform=_XLA_NAMES[platform])
        # In a thread of its own: the caller may be tracing, or inside a mesh.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_try, platform, device).result()
    except Exception as error:  # whatever a runtime throws that does not match
        return Status("gather", f"failed its trial: {error}".splitlines()[0])
    return Status("kernel", extension.instruction_set())


def has_scratch(target: str, platform: str) -> bool:
    """Whether a handler has one result more, which it works in and nobody reads."""
    return platform == "cuda" and target in (BACKWARD, FUSED_BACKWARD)


def scratch(x: Array, dy: Array, points: int) -> jax.ShapeDtypeStruct:
    """That result for x (..., H, W, G * D) and dy (..., Ho, Wo, G * D), with P points.

    It has 64 bits for each pixel and channel, and one row more; hardly anything where every GPU has
    the shared memory to sum the gradient of x in. dcnv3_cuda_spread.cu has the same rule.
    """
    *batch, h, w, channels = x.shape
    terms = dy.shape[-3] * dy.shape[-2] * (points + 1)  # at most, of the sum that is a pixel's
    word, most = {2: (4, 2**30), 4: (8, 2**16), 8: (8, 0)}[x.dtype.itemsize]
    if h * w * word <= 48 * 1024 and terms < most:
        return jax.ShapeDtypeStruct((*batch, 1, 1, 1), np.uint32)
    return jax.ShapeDtypeStruct((*batch, 1, h * w + 1, 2 * channels), np.uint32)


def _try(platform: str, device: Any) -> None:
    """Calls each target on one pixel, whose sample in the middle of the kernel is the pixel."""
    one = np.ones((1, 1, 1, 1), np.float32)
    record = np.zeros((1, 1, 1, 8), np.float32)
    cases = {
        FORWARD: ((one * 3, np.zeros((1, 1, 1, 2), np.float32), one * 2), [6.0]),
        BACKWARD: ((one * 3, np.zeros((1, 1, 1, 2), np.float32), one * 2, one), [2.0, -6.0, 3.0]),
        FUSED_FORWARD: ((one * 3, record), [3.0]),
        FUSED_BACKWARD: ((one * 3, record, one), [1.0, -3.0]),
    }
    results = {
        FORWARD: (one,),
        BACKWARD: (one, np.zeros((1, 1, 1, 2), np.float32), one),
        FUSED_FORWARD: (one,),
        FUSED_BACKWARD: (one, record),
    }
    geometry = np.array([1, 1, 1, 1, 0, 0, 1, 1, 1, 0, VERSION], np.int64)
    attributes: dict[str, Any] = {"geometry": geometry, "offset_scale": np.float64(1)}
    with jax.default_device(device):
        for target, (operands, expected) in cases.items():
            shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in results[target]]
            if has_scratch(target, platform):
                shapes.append(scratch(one, one, 1))
            extra = {"center_feature_scale": False} if "fused" in target else {}
            call = jax.ffi.ffi_call(target, shapes)
            got = jax.jit(functools.partial(call, **attributes, **extra))(*operands)
            first = [float(array.ravel()[0]) for array in got[: len(expected)]]
            if first != expected:
                raise RuntimeError(f"{target} gave {first}, expected {expected}")

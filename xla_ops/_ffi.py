"""The compiled extensions: imports them, registers their targets once, and tries each target.

Nothing happens on import. The first call of an operator registers the targets and runs each on a
small input. An operator whose target gives something wrong is set aside with its reason, and all of
them where the program fails; the jnp form serves in their place. `serve_untried` is for programs
that run elsewhere.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VERSION = 4  # of the attributes and layouts; the handlers refuse another

FORWARD = "internimage_dcnv3_forward"
BACKWARD = "internimage_dcnv3_backward"
FUSED_FORWARD = "internimage_dcnv3_fused_forward"
FUSED_BACKWARD = "internimage_dcnv3_fused_backward"
DWCONV_FORWARD = "internimage_dwconv_norm_gelu_forward"
DWCONV_BACKWARD = "internimage_dwconv_norm_gelu_backward"
GELU_FORWARD = "internimage_bias_gelu_forward"
GELU_BACKWARD = "internimage_bias_gelu_backward"
NORM_FORWARD = "internimage_layer_norm_forward"
ADD_NORM_FORWARD = "internimage_add_norm_forward"
NORM_ADD_FORWARD = "internimage_norm_add_forward"
LINEAR_FORWARD = "internimage_linear_forward"
LINEAR_GELU_FORWARD = "internimage_linear_gelu_forward"
CONVOLUTION_FORWARD = "internimage_convolution_forward"
MLP_FORWARD = "internimage_mlp_forward"

# As JAX names them; the module with a platform's handlers is `_cpu` or `_cuda`.
PLATFORMS = ("cpu", "cuda")

_XLA_NAMES = {"cpu": "cpu", "cuda": "CUDA"}
_CPU_SETS = ("amx", "avx512", "avx2", "baseline")

_lock = threading.Lock()


class Status(NamedTuple):
    """What serves on a platform: "kernel" or "gather", and why or in what form."""

    implementation: str
    detail: str


class _Loaded(NamedTuple):
    status: Status
    targets: frozenset[str] = frozenset()  # those that serve


def status() -> dict[str, Status]:
    """Tells what serves on each platform that has a kernel, and why where it is not the kernel."""
    return {platform: _load(platform).status for platform in PLATFORMS}


def reasons() -> str:
    """The details of all platforms' status, for an error."""
    return "; ".join(f"{platform}: {detail}" for platform, (_, detail) in status().items())


def serving(target: str) -> tuple[str, ...]:
    """The platforms that have a kernel of that name, which passed its trial."""
    return tuple(name for name in PLATFORMS if target in usable_targets(name))


def usable_targets(platform: str) -> frozenset[str]:
    """The kernels of a platform that passed their trial."""
    return _load(platform).targets


def _load(platform: str) -> _Loaded:
    with _lock:
        return _load_once(platform)


def serve_untried(platform: str, without: frozenset[str] = frozenset()) -> None:
    """Takes a platform's kernels as serving, but those `without` which that device has to do, so
    that programs can be compiled for a device that is not here. They are not tried, and an
    extension that is not built is an `ImportError`.
    """
    _register(platform)
    with _lock:
        _untried[platform] = without
        _load_once.cache_clear()


_untried: dict[str, frozenset[str]] = {}  # targets that do not serve, by platform


def _extension(platform: str) -> Any:
    return importlib.import_module(f"xla_ops._{platform}")


@functools.cache
def _register(platform: str) -> None:
    for target, handler in _extension(platform).targets().items():
        jax.ffi.register_ffi_target(target, handler, platform=_XLA_NAMES[platform])


def _check_instruction_set() -> None:
    """Raises a ValueError where the environment names a set that cpu_types.h does not know."""
    wanted = os.environ.get("INTERNIMAGE_CPU_ISA", "")
    if wanted not in ("", *_CPU_SETS):
        raise ValueError(
            f"INTERNIMAGE_CPU_ISA: got {wanted!r}, expected one of {', '.join(_CPU_SETS)}"
        )


@functools.cache
def _load_once(platform: str) -> _Loaded:
    gather = lambda reason: _Loaded(Status("gather", reason))  # noqa: E731
    name = f"_{platform}"
    if platform == "cpu":
        _check_instruction_set()
    try:
        extension = _extension(platform)
    except ImportError as error:
        reason = Path(__file__).with_name(f"{name}.reason")
        return gather(reason.read_text().strip() if reason.exists() else f"not built: {error}")
    if extension.version != VERSION:
        return gather(f"built as version {extension.version}, not {VERSION}: rebuild it")
    targets, form = frozenset(extension.targets()), extension.instruction_set()
    if platform in _untried:
        return _Loaded(
            Status("kernel", f"not tried; built for {form}"), targets - _untried[platform]
        )
    try:
        device = jax.local_devices(backend=platform)[0]
    except (RuntimeError, AssertionError):  # JAX has both where a platform is missing
        return gather(f"built for {form}; JAX has no {platform} here")
    try:
        _register(platform)
        # In a thread of its own: the caller may be tracing, or inside a mesh.
        with ThreadPoolExecutor(1) as thread:
            set_aside = thread.submit(_try, platform, device, targets).result()
    except Exception as error:  # whatever a runtime throws
        return gather(f"failed its trial: {error}".splitlines()[0])
    wrong = {_operator(target) for target in set_aside}
    serving = frozenset(target for target in targets if _operator(target) not in wrong)
    details = [f"without {name}: {why}" for name, why in sorted(set_aside.items())]
    if not serving:
        return gather(f"failed its trial: {'; '.join(details)}")
    return _Loaded(Status("kernel", "; ".join([form, *details])), serving)


def _operator(target: str) -> str:
    """The name without its direction: what goes forward is of no use where what goes back fails."""
    return target.rpartition("_")[0]


def _try(platform: str, device: Any, targets: frozenset[str]) -> dict[str, str]:
    """Calls each target; returns those that do not serve on the device, and why.

    Most get one pixel, whose sample in the middle of the kernel is the pixel.
    """
    one, pair = np.ones((1, 1, 1, 1), np.float32), np.zeros((1, 1, 1, 2), np.float32)
    record = np.zeros((1, 1, 1, 8), np.float32)
    layer = (one * 3, one[0], one[0, 0, 0], one[0, 0, 0], one[0, 0, 0] * 13)  # to gelu(0 + 13)
    geometry = np.array([1, 1, 1, 1, 0, 0, 1, 1, 1, 0, VERSION], np.int64)
    plain: dict[str, Any] = {"geometry": geometry, "offset_scale": np.float64(1)}
    fused = plain | {"center_feature_scale": False}
    gelu: dict[str, Any] = {"version": np.int64(VERSION)}
    dwconv = gelu | {"epsilon": np.float64(1e-6)}
    cuda = platform == "cuda"  # its backward calls have scratch as one result more
    half_product, half_products = _product()
    product, products = half_product, half_products
    if not cuda:  # which takes half precision alone
        product = tuple(a.astype(np.float32) for a in half_product)
        products = half_products.astype(np.float32)
    mlp, mlp_result = _two_products(cuda)
    scratch = (np.zeros((1, 1, 1, 1), np.uint32),) if cuda else ()
    dv = (one,) if cuda else ()
    # Operands, attributes, arrays like the results, and what these begin with.
    cases: dict[str, tuple[tuple, dict[str, Any], tuple, list[Any]]] = {
        FORWARD: ((one * 3, pair, one * 2), plain, (one,), [6.0]),
        BACKWARD: (
            (one * 3, pair, one * 2, one),
            plain,
            (one, pair, one, *scratch),
            [2.0, -6.0, 3.0],
        ),
        FUSED_FORWARD: ((one * 3, record), fused, (one,), [3.0]),
        FUSED_BACKWARD: ((one * 3, record, one), fused, (one, record, *scratch), [1.0, -3.0]),
        DWCONV_FORWARD: (layer, dwconv, (one,), [13.0]),
        DWCONV_BACKWARD: (
            (*layer, one),
            dwconv,
            (one, np.zeros((1, 1, 4, 1), np.float32), *dv),
            [0.0, 1.0],
        ),
        GELU_FORWARD: ((one * 6, one[0, 0, 0] * 7), gelu, (one,), [13.0]),
        GELU_BACKWARD: ((one * 6, one[0, 0, 0] * 7, one * 5), gelu, (one,), [5.0]),
        LINEAR_FORWARD: (product, gelu, (products,), [products]),
        NORM_FORWARD: (
            (np.array([[[[0, 6]]]], np.float32), pair[0, 0, 0] + 8, pair[0, 0, 0] + 50),
            dwconv | {"epsilon": np.float64(7)},
            (pair,),
            [[44.0, 56.0]],
        ),
        ADD_NORM_FORWARD: (
            (pair + 1, np.array([[[[-1, 5]]]], np.float32), pair[0, 0, 0] + 8, pair[0, 0, 0] + 50),
            dwconv | {"epsilon": np.float64(7)},
            (pair, pair),
            [[0.0, 6.0], [44.0, 56.0]],
        ),
        NORM_ADD_FORWARD: (
            (
                *(np.array([[[values]]], np.float32) for values in ([0, 6], [3, 5])),
                *(pair[0, 0, 0] + 8, pair[0, 0, 0] + 50),
            ),
            dwconv | {"epsilon": np.float64(7)},
            (pair,),
            [[47.0, 61.0]],
        ),
        CONVOLUTION_FORWARD: (
            (np.ones((1, 3, 2, 1), np.float32), np.ones((3, 3, 1, 1), np.float32), one[0, 0, 0]),
            gelu,
            (np.zeros((1, 2, 1, 1), np.float32),),
            [5.0, 5.0],
        ),
        LINEAR_GELU_FORWARD: (half_product, gelu, (half_products,), [half_products]),
        MLP_FORWARD: (mlp, gelu, (mlp_result,), [mlp_result]),
    }
    missing = _extension(platform).missing(device.local_hardware_id) if cuda else []
    set_aside = dict.fromkeys(missing, "not of this GPU's kind, or no code is built for it")
    trying = sorted(targets - set(missing))

    # One program, since compiling is most of the time.
    def call_all(operands: dict[str, tuple]) -> dict[str, Any]:
        found = {}
        for target in trying:
            _, attributes, results, _ = cases[target]
            like = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in results]
            found[target] = jax.ffi.ffi_call(target, like)(*operands[target], **attributes)
        return found

    with jax.default_device(device):
        found = jax.jit(call_all)({target: cases[target][0] for target in trying})
    for target in trying:
        for array, expected in zip(found[target], cases[target][3], strict=False):
            wanted = np.asarray(expected, np.float64).ravel()
            got = np.asarray(array).astype(np.float64).ravel()[: wanted.size]
            (differ,) = np.nonzero(got != wanted)
            if differ.size:
                i = differ[0]
                set_aside[target] = f"its trial gave {got[i]:g}, expected {wanted[i]:g}"
    return set_aside


def _product() -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """x, kernel and bias of several tiles that are not full, of the smallest kind, and the result.

    On a CPU with AMX they are just enough to be products of pieces in float32.

    Small integers, whose sums bfloat16 holds and GELU leaves as they are, and so many kinds of row
    and column that none can stand for another unseen.
    """
    draw = np.random.RandomState(0).randint
    x, kernel = draw(0, 2, (1, 5, 11, 136)), draw(0, 2, (136, 72))
    bias = 13 + np.arange(72)
    operands = tuple(a.astype(jnp.bfloat16) for a in (x, kernel, bias))
    return operands, (x @ kernel + bias).astype(jnp.bfloat16)


def _two_products(cuda: bool) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """x, kernels and biases of an MLP, and the result; of small integers too.

    The second kernel takes every other column of what the first product gives.
    """
    draw = np.random.RandomState(0).randint
    # As each platform's kernel takes it.
    inputs, hidden, dtype = (64, 128, jnp.bfloat16) if cuda else (136, 72, np.float32)
    x, kernel = draw(0, 2, (1, 5, 31, inputs)), draw(0, 2, (inputs, hidden))
    bias, other = 13 + np.arange(hidden) % 72, np.arange(hidden // 2) % 36
    operands = x, kernel, bias, np.eye(hidden, dtype=int)[:, ::2], other
    result = (x @ kernel + bias)[..., ::2] + other
    return tuple(a.astype(dtype) for a in operands), result.astype(dtype)

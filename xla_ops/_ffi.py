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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from xla_ops import _trial
from xla_ops._targets import ALL, VERSION

# As JAX names them; the module with a platform's handlers is `_cpu` or `_cuda`.
PLATFORMS = ("cpu", "cuda")

_XLA_NAMES = {"cpu": "cpu", "cuda": "CUDA"}
# What the environment may ask of each: see cpu_types.h and dcnv3_cuda_device.h.
_SETTINGS = {
    "cpu": ("INTERNIMAGE_CPU_ISA", ("amx", "avx512bf16", "avx512", "avx2", "baseline")),
    "cuda": ("INTERNIMAGE_CUDA_FORM", ("global",)),
}

_lock = threading.Lock()


class Status(NamedTuple):
    """What serves on a platform: "kernel" or "gather"; and in what form, or why no kernel."""

    implementation: str
    detail: str


class _Loaded(NamedTuple):
    status: Status
    targets: frozenset[str] = frozenset()  # those that serve


def status() -> dict[str, Status]:
    """Tells whether kernels serve on each platform that can have them, and if not, why."""
    return {platform: _load(platform).status for platform in PLATFORMS}


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export` takes as `disabled_checks` for programs that have kernels.

    It names all custom calls of this package, whose attributes and layouts are those of its version
    alone. So what is exported is to be called beside the same version, after `xla_ops.status()`,
    which registers the kernels, and by a processor or GPU that has what the kernels want here.
    Programs of the jnp forms (models of `implementation="gather"`) want none of this.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in ALL]


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
    """Takes a platform's kernels as serving, without a trial, so that programs can be compiled for
    a device that is not here; not those in `without`, which that device lacks. Raises ImportError
    if the extension is not built.
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


def _check_environment(platform: str) -> None:
    """Raises a ValueError where it asks of a platform for what its extension does not know."""
    name, known = _SETTINGS[platform]
    wanted = os.environ.get(name, "")
    if wanted not in ("", *known):
        raise ValueError(f"{name}: got {wanted!r}, expected {', '.join(known)} or nothing")


@functools.cache
def _load_once(platform: str) -> _Loaded:
    gather = lambda reason: _Loaded(Status("gather", reason))  # noqa: E731
    name = f"_{platform}"
    _check_environment(platform)
    try:
        extension = _extension(platform)
    except ImportError as error:
        reason = Path(__file__).with_name(f"{name}.reason")
        where = f"not built: {error} in {reason.parent}"
        return gather(reason.read_text().strip() if reason.exists() else where)
    if extension.version != VERSION:
        return gather(f"built as version {extension.version}, not {VERSION}: rebuild it")
    targets, form = frozenset(extension.targets()), extension.instruction_set()
    if platform in _untried:
        return _Loaded(
            Status("kernel", f"not tried; built for {form}"), targets - _untried[platform]
        )
    try:
        devices = jax.local_devices(backend=platform)
    except (RuntimeError, AssertionError):  # JAX has both where a platform is missing
        return gather(f"built for {form}; JAX has no {platform} here")
    try:
        _register(platform)
        # In a thread of its own: the caller may be tracing, or inside a mesh.
        with ThreadPoolExecutor(1) as thread:
            set_aside = thread.submit(_try, platform, devices, targets).result()
    except Exception as error:  # whatever a runtime throws
        return gather(_why_not(error))
    wrong = {_operator(target) for target in set_aside}
    serving = frozenset(target for target in targets if _operator(target) not in wrong)
    details = [f"without {name}: {why}" for name, why in sorted(set_aside.items())]
    if not serving:
        return gather(f"failed its trial: {'; '.join(details)}")
    return _Loaded(Status("kernel", "; ".join([form, *details])), serving)


def _why_not(error: Exception) -> str:
    """Why none of a platform's kernels serve, in a line."""
    reason = f"failed its trial: {error}".splitlines()[0]
    if "handler's API version" not in reason:
        return reason
    # What is built for an older jaxlib serves on a newer one, and not the other way round.
    return (
        f"built for a newer jaxlib than {version('jaxlib')}, which is here: rebuild it ({reason})"
    )


def _operator(target: str) -> str:
    """The name without its direction: what goes forward is of no use where what goes back fails."""
    return target.rpartition("_")[0]


def _try(platform: str, devices: Sequence[Any], targets: frozenset[str]) -> dict[str, str]:
    """Tries the kernels on a device of each kind: XLA compiles for a platform, whichever runs it.

    Returns those that do not serve on one of them, and why.
    """
    set_aside: dict[str, str] = {}
    for device in {device.device_kind: device for device in devices}.values():
        if platform == "cuda":
            for target in _extension(platform).missing(device.local_hardware_id):
                set_aside[target] = f"not for a GPU like {device.device_kind}, or not built for it"
        set_aside |= _trial.failures(targets - set_aside.keys(), device, platform)
    return set_aside

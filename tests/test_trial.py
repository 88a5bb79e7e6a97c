"""The trial of the kernels when they are loaded: what is wrong is found, and set aside alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest

import xla_ops
from tests import kernels_on_host
from xla_ops import _ffi

CPU = xla_ops.status()["cpu"]
needs_kernel = pytest.mark.skipif(CPU.implementation != "kernel", reason=CPU.detail)

ffi_call = jax.ffi.ffi_call


def patch_calls(monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]) -> None:
    monkeypatch.setattr(jax.ffi, "ffi_call", call)


@needs_kernel
def test_an_operator_that_gives_something_wrong_is_set_aside_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(target: str, like: Any) -> Callable[..., Any]:
        call = ffi_call(target, like)
        if target != _ffi.GELU_BACKWARD:
            return call
        return lambda *operands, **attributes: [y + 1 for y in call(*operands, **attributes)]

    patch_calls(monkeypatch, wrong)
    status, targets = _ffi._load_once.__wrapped__("cpu")
    why = f"without {_ffi.GELU_BACKWARD}: its trial gave 6, expected 5"
    assert status == ("kernel", f"{CPU.detail}; {why}")
    assert targets == _ffi.usable_targets("cpu") - {_ffi.GELU_FORWARD, _ffi.GELU_BACKWARD}


@needs_kernel
def test_a_program_that_fails_sets_all_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(target: str, like: Any) -> Callable[..., Any]:
        call = ffi_call(target, like)
        # The handlers refuse attributes of another version.
        return lambda *operands, **attributes: call(*operands, **attributes | {"version": 0})

    patch_calls(monkeypatch, failing)
    status, targets = _ffi._load_once.__wrapped__("cpu")
    assert status.implementation == "gather" and not targets
    assert "failed its trial" in status.detail and "version" in status.detail


def test_an_instruction_set_that_there_is_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNIMAGE_CPU_ISA", "avx3")
    with pytest.raises(ValueError, match="INTERNIMAGE_CPU_ISA: got 'avx3', expected one of amx, "):
        _ffi._load_once.__wrapped__("cpu")


@pytest.mark.skipif(bool(kernels_on_host.cannot_build()), reason=kernels_on_host.cannot_build())
def test_the_cuda_kernels_pass_their_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = kernels_on_host.extension()
    kernels_on_host.register()
    monkeypatch.setattr(_ffi, "_extension", lambda platform: extension)
    patch_calls(monkeypatch, lambda target, like: ffi_call(kernels_on_host.PREFIX + target, like))
    device = jax.local_devices(backend="cpu")[0]
    targets = frozenset(extension.targets())
    assert _ffi.LINEAR_GELU_FORWARD in targets
    assert _ffi._try("cuda", device, targets) == {}

"""The trial of the kernels when they are loaded: what is wrong is found, and set aside alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import xla_ops
from tests import kernels_on_host
from tests.layers import needs_kernel
from xla_ops import _ffi, _targets, _trial

ffi_call = jax.ffi.ffi_call


def patch_calls(monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]) -> None:
    monkeypatch.setattr(jax.ffi, "ffi_call", call)


@needs_kernel
def test_an_operator_that_gives_something_wrong_is_set_aside_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(target: str, like: Any) -> Callable[..., Any]:
        call = ffi_call(target, like)
        if target != _targets.GELU_BACKWARD:
            return call
        return lambda *operands, **attributes: [y + 1 for y in call(*operands, **attributes)]

    detail = xla_ops.status()["cpu"].detail
    patch_calls(monkeypatch, wrong)
    status, targets = _ffi._load_once.__wrapped__("cpu")
    why = f"without {_targets.GELU_BACKWARD}: its trial gave 6, expected 5"
    assert status == ("kernel", f"{detail}; {why}")
    assert targets == _ffi.usable_targets("cpu") - {_targets.GELU_FORWARD, _targets.GELU_BACKWARD}


@needs_kernel
@pytest.mark.parametrize("factor", [0.9, float("nan")])
def test_nine_points_that_differ_from_the_plain_form_set_both_aside(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def wrong(target: str, like: Any) -> Callable[..., Any]:
        call = ffi_call(target, like)
        if target != _targets.DCNV3_FUSED_BACKWARD or like[0].dtype != "bfloat16":
            return call
        return lambda *operands, **attributes: [
            (y * factor).astype(y.dtype) for y in call(*operands, **attributes)
        ]

    patch_calls(monkeypatch, wrong)
    status, targets = _ffi._load_once.__wrapped__("cpu")
    assert status.implementation == "kernel"
    plain = _targets.DCNV3_BACKWARD
    assert f"without {plain}: its forms of nine points differ by " in status.detail
    assert status.detail.endswith(" in bfloat16")
    dcnv3 = {target for target in _ffi.usable_targets("cpu") if "dcnv3" in target}
    assert len(dcnv3) == 4 and targets == _ffi.usable_targets("cpu") - dcnv3


def test_of_gpus_of_several_kinds_each_is_tried_and_all_have_to_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = ["H100", "A100", "H100", "T4"]
    devices = [
        SimpleNamespace(device_kind=kind, local_hardware_id=i) for i, kind in enumerate(kinds)
    ]
    missing = {"H100": [], "A100": ["mlp"], "T4": ["mlp", "linear"]}
    extension = SimpleNamespace(missing=lambda i: missing[kinds[i]])
    monkeypatch.setattr(_ffi, "_extension", lambda platform: extension)
    tried = []

    def failures(targets: frozenset[str], device: Any, platform: str) -> dict[str, str]:
        tried.append((device.device_kind, sorted(targets)))
        return {"norm": "its trial gave 1, expected 2"} if device.device_kind == "A100" else {}

    monkeypatch.setattr(_trial, "failures", failures)
    set_aside = _ffi._try("cuda", devices, frozenset({"dcnv3", "linear", "mlp", "norm"}))
    assert sorted(set_aside) == ["linear", "mlp", "norm"]
    assert "T4" in set_aside["linear"] and "expected 2" in set_aside["norm"]
    assert {kind for kind, _ in tried} == {"H100", "A100", "T4"} and len(tried) == 3
    assert ("H100", ["dcnv3", "linear", "mlp", "norm"]) in tried


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


@needs_kernel
def test_without_vector_instructions_for_them_products_are_left_to_xla() -> None:
    program = "from xla_ops import _ffi; print(*_ffi.usable_targets('cpu'))"
    environment = os.environ | {"INTERNIMAGE_CPU_ISA": "baseline"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    targets = done.stdout.split()
    assert _targets.DCNV3_FORWARD in targets
    assert not [one for one in targets if "linear" in one or "convolution" in one or "mlp" in one]


@needs_kernel
def test_kernels_of_a_newer_jaxlib_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(platform: str) -> None:
        raise RuntimeError(
            "INVALID_ARGUMENT: XLA FFI handler registration failed because the handler's API "
            "version (0.5) is incompatible with the framework's API version (0.4)."
        )

    monkeypatch.setattr(_ffi, "_register", refuse)
    status, targets = _ffi._load_once.__wrapped__("cpu")
    assert status.implementation == "gather" and not targets
    assert status.detail.startswith(f"built for a newer jaxlib than {version('jaxlib')}, ")


@pytest.mark.parametrize(
    ("platform", "name", "expected"),
    [
        ("cpu", "INTERNIMAGE_CPU_ISA", "amx, avx512bf16, avx512, avx2, baseline or nothing"),
        ("cuda", "INTERNIMAGE_CUDA_FORM", "global or nothing"),
    ],
)
def test_a_setting_that_there_is_not_is_an_error(
    monkeypatch: pytest.MonkeyPatch, platform: str, name: str, expected: str
) -> None:
    monkeypatch.setenv(name, "avx3")
    with pytest.raises(ValueError, match=f"{name}: got 'avx3', expected {expected}"):
        _ffi._load_once.__wrapped__(platform)


@pytest.mark.skipif(bool(kernels_on_host.cannot_build()), reason=kernels_on_host.cannot_build())
def test_the_cuda_kernels_pass_their_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = kernels_on_host.extension()
    kernels_on_host.register()
    monkeypatch.setattr(_ffi, "_extension", lambda platform: extension)
    patch_calls(monkeypatch, lambda target, like: ffi_call(kernels_on_host.PREFIX + target, like))
    device = jax.local_devices(backend="cpu")[0]
    targets = frozenset(extension.targets())
    assert _targets.LINEAR_GELU_FORWARD in targets
    assert _ffi._try("cuda", [device], targets) == {}

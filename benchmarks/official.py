"""The official PyTorch model as a peer, from a checkout of github.com/OpenGVLab/InternImage."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from convert.rules import BATCH_COUNTER, rules
from internimage_jax.config import InternImageConfig


def load_official(checkout: Path, config: InternImageConfig) -> Any:
    """Builds the official model without its CUDA extension, as a CPU runs it.

    What it imports besides torch is replaced by what it uses of it: DropPath and trunc_normal_ of
    timm, and the CUDA extension, which is never called.
    """
    import torch

    layers = types.ModuleType("timm.models.layers")
    layers.DropPath = torch.nn.Identity  # type: ignore[attr-defined]
    layers.trunc_normal_ = torch.nn.init.trunc_normal_  # type: ignore[attr-defined]
    resources = types.ModuleType("pkg_resources")
    resources.get_distribution = lambda _: types.SimpleNamespace(version="1.1")  # type: ignore[attr-defined]
    for name in ("timm", "timm.models", "DCNv3"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["timm.models.layers"] = layers
    sys.modules["pkg_resources"] = resources
    sys.path.insert(0, str(checkout / "classification"))
    package = types.ModuleType("models")  # its own __init__ wants more
    package.__path__ = [str(checkout / "classification" / "models")]
    sys.modules["models"] = package
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        module = importlib.import_module("models.intern_image")
        return module.InternImage(**config.to_dict() | {"core_op": "DCNv3_pytorch"}).eval()


def copy_weights(arrays: dict[str, np.ndarray], config: InternImageConfig, model: Any) -> None:
    """Puts the Flax model's arrays, by path, into the official model, strictly."""
    import torch

    state = {}
    for rule in rules(config):
        array = np.asarray(arrays[rule.flax], np.float32)
        if rule.axes is not None:
            array = array.transpose(np.argsort(rule.axes)).reshape(rule.torch_shape)
        state[rule.torch] = torch.from_numpy(np.array(array))
    for name, value in model.state_dict().items():
        if name.endswith(BATCH_COUNTER):
            state[name] = value
    model.load_state_dict(state, strict=True)

"""The official PyTorch code as a peer, from a checkout of github.com/OpenGVLab/InternImage."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.rules import BATCH_COUNTER, rules
from internimage_jax.config import InternImageConfig


def checkout(path: str) -> Path:
    """An argument of the command line that names one."""
    if not Path(path, "classification", "models", "intern_image.py").is_file():
        raise argparse.ArgumentTypeError(
            f"{path} is no checkout of github.com/OpenGVLab/InternImage: it has no"
            " classification/models/intern_image.py"
        )
    return Path(path)


def _replace_extension() -> None:
    """What stands in for the CUDA extension and the search for it; neither is ever called."""
    resources = types.ModuleType("pkg_resources")
    resources.get_distribution = lambda _: types.SimpleNamespace(version="1.1")  # type: ignore[attr-defined]
    sys.modules.setdefault("DCNv3", types.ModuleType("DCNv3"))
    sys.modules["pkg_resources"] = resources


def load_official_operator(checkout: Path) -> Callable[..., Any]:
    """The official DCNv3 as a CPU runs it, by `F.grid_sample`."""
    _replace_extension()
    sys.path.insert(0, str(checkout / "classification" / "ops_dcnv3"))
    return importlib.import_module("functions.dcnv3_func").dcnv3_core_pytorch


def load_official(checkout: Path, config: InternImageConfig) -> Any:
    """Builds the official model without its CUDA extension, as a CPU runs it.

    What it imports besides torch is replaced by what it uses of it: DropPath and trunc_normal_ of
    timm.
    """
    import torch

    layers = types.ModuleType("timm.models.layers")
    layers.DropPath = torch.nn.Identity  # type: ignore[attr-defined]
    layers.trunc_normal_ = torch.nn.init.trunc_normal_  # type: ignore[attr-defined]
    for name in ("timm", "timm.models"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["timm.models.layers"] = layers
    _replace_extension()
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

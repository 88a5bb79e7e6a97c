"""Writes checkpoints with the recipe's weights in every released layout.

The torch files are torch's own where it is installed, and else made by hand.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from convert.rules import rules
from internimage_jax.config import InternImageConfig
from tests import checkpoint_files as make
from tests.reference.recipe import recipe_tensor, to_hf_name

LAYOUTS = ("pth", "trainer", "dense", "hf", "hf-shards", "hf-bin")
CONFIG = InternImageConfig(channels=8, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), num_classes=10)
HEAD = ("head.", "conv_head.", "dcnv3_head", "clip_projector.", "fc_norm.")
HAS_TORCH = importlib.util.find_spec("torch") is not None


def weights(config: InternImageConfig) -> dict[str, np.ndarray]:
    """The state dict that the official model of `config` has, with the recipe's values."""
    arrays = {}
    for rule in rules(config):
        arrays[rule.torch] = np.asarray(recipe_tensor(rule.torch, rule.torch_shape))
        if rule.torch.endswith("running_var"):
            name = rule.torch.replace("running_var", "num_batches_tracked")
            arrays[name] = recipe_tensor(name, ())
    return arrays


def as_flax(array: np.ndarray, dimensions: int) -> np.ndarray:
    """A PyTorch array in Flax's order: (O, I, H, W) to (H, W, I, O), (O, I) to (I, O)."""
    if array.ndim == 4 and dimensions == 2:  # a 1x1 convolution, which is a linear layer here
        array = array[:, :, 0, 0]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def flax_arrays(
    config: InternImageConfig, arrays: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """What a converted folder of `config` has to hold."""
    arrays = weights(config) if arrays is None else arrays
    return {r.flax: as_flax(arrays[r.torch], len(r.flax_shape)) for r in rules(config)}


def write(
    path: Path,
    layout: str,
    config: InternImageConfig = CONFIG,
    *,
    arrays: Mapping[str, np.ndarray] | None = None,
    settings: Mapping[str, Any] | None = None,
    image_size: int = 64,
) -> Path:
    """Writes a checkpoint and returns its path.

    Args:
        path: Of the file or folder.
        layout: One of `LAYOUTS`.
        config: The model.
        arrays: By .pth name; None is the recipe's.
        settings: More for a Hugging Face folder's config.json.
        image_size: For its preprocessor_config.json.
    """
    arrays = weights(config) if arrays is None else arrays
    if not layout.startswith("hf"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(_tree(layout, arrays), path)
        return path
    path.mkdir(parents=True)
    write_settings(path, config, settings, image_size)
    named = {to_hf_name(name): np.ascontiguousarray(array) for name, array in arrays.items()}
    if layout == "hf-bin":
        _save(named, path / "pytorch_model.bin")
    elif layout == "hf":
        save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(3):
            shard = dict(list(named.items())[i::3])
            file = f"model-{i + 1:05d}-of-00003.safetensors"
            save_file(shard, path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_settings(
    folder: Path,
    config: InternImageConfig,
    settings: Mapping[str, Any] | None = None,
    image_size: int = 64,
) -> None:
    """Writes the two .json files of a Hugging Face folder."""
    values = {
        "architectures": ["InternImageModel"],
        "auto_map": {"AutoModel": "modeling_internimage.InternImageModel"},
        "model_type": "internimage",
        "torch_dtype": "float32",
        "transformers_version": "4.37.2",
        "core_op": "DCNv3",
        **config.to_dict(),
        **(settings or {}),
    }
    (folder / "config.json").write_text(json.dumps(values))
    processing = {
        "crop_size": image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": image_size,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))


def read_converted(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a converted folder, as the safetensors library reads them."""
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    return load_file(folder / "model.safetensors")


def assert_same(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """Asserts that names, shapes, dtypes and values are the same."""
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def _tree(layout: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What a file of that layout holds, as make_checkpoint.py of the reference data writes it."""
    if layout == "pth":
        return {"model": dict(arrays)}
    if layout == "dense":
        backbone = {f"backbone.{n}": a for n, a in arrays.items() if not n.startswith(HEAD)}
        decoder = {"decode_head.conv_seg.weight": np.zeros((150, 8, 1, 1), np.float32)}
        return {"meta": {"epoch": 36, "iter": 1}, "state_dict": backbone | decoder}
    floats = {n: a for n, a in arrays.items() if a.dtype.kind == "f"}
    state = {i: {"exp_avg": 0 * a, "exp_avg_sq": 0 * a} for i, a in enumerate(floats.values())}
    return {
        "model": dict(arrays),
        "epoch": 299,
        "optimizer": {"state": state},
        "config": make.Call(make.Name("yacs_not_installed.config", "CfgNode"), ()),
        "model_ema": {n: a * np.float32(1.01) if n in floats else a for n, a in arrays.items()},
    }


def _save(tree: Mapping[str, Any], path: Path) -> None:
    if HAS_TORCH:
        _save_with_torch(tree, path)
    else:
        storages: dict[str, bytes] = {}
        path.write_bytes(make.torch_zip(make.pickle(_by_hand(tree, storages)), storages))


def _save_with_torch(tree: Mapping[str, Any], path: Path) -> None:
    import torch

    # The class of the config object is there when the file is written, and not when it is read.
    module = types.ModuleType("yacs_not_installed.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": module.__name__})
    sys.modules["yacs_not_installed"] = types.ModuleType("yacs_not_installed")
    sys.modules[module.__name__] = module

    def tensors(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tensors(item) for key, item in value.items()}
        if isinstance(value, make.Call):
            return module.CfgNode(NUM_CLASSES=10)
        return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value

    torch.save(tensors(tree), path)
    del sys.modules[module.__name__], sys.modules["yacs_not_installed"]


def _by_hand(value: Any, storages: dict[str, bytes]) -> Any:
    if isinstance(value, dict):
        return {key: _by_hand(item, storages) for key, item in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    key = str(len(storages))
    storages[key] = value.tobytes()
    strides = np.empty(value.shape, np.uint8).strides
    return make.tensor(make.storage(key, str(value.dtype), value.size), 0, value.shape, strides)

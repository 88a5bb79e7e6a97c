"""What a checkpoint holds: which layout it is in, which model it is of, and its arrays.

The layouts are told apart by their content. The architecture comes from a config.json beside the
weights, from the name of a released model, or from the caller; never from a guess, since neither
`offset_scale` nor `level2_post_norm_block_ids` shows in the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.check import check, fitting_models
from convert.export import CONFIG, FORMAT
from convert.permute import flax_layout
from convert.rules import Rule, from_huggingface, rules
from convert.torch_file import CheckpointError, LazyTensor, open_checkpoint
from internimage_jax.config import (
    NUM_CLASSES_1K,
    NUM_CLASSES_22K,
    RELEASED,
    InternImageConfig,
    released_model,
)
from internimage_jax.preprocess import Preprocessing

Weights = Literal["model", "ema"]
_ENTRY = {"model": "model", "ema": "model_ema"}  # of a training run's file

# Keys of a Hugging Face config.json that say nothing of the architecture.
_HUGGINGFACE_KEYS = {
    *("_name_or_path", "_commit_hash", "architectures", "auto_map", "dtype", "torch_dtype"),
    *("id2label", "label2id", "num_labels", "problem_type", "transformers_version"),
    *("use_return_dict", "return_dict", "output_hidden_states", "output_attentions"),
}
# Settings of training alone: they may differ between files of one model.
_TRAINING = ("drop_rate", "drop_path_rate", "drop_path_type", "with_cp")


@dataclass(frozen=True)
class Source:
    """An open checkpoint whose tensors are known to be those of `config`.

    Args:
        path: The file or folder, as given.
        layout: "released", "trainer", "dense", "huggingface" or "converted".
        name: The released model's name, or else the file's.
        config: The architecture.
        preprocessing: How the model's images are made.
        tensors: By PyTorch name as in a released .pth file; by Flax path if "converted".
        files: The files read, in a fixed order.
        notes: What the user should know of how the file was read, a sentence each.
        made: Arrays that do not come from the file, by Flax path.
        classes: Names of the classes, where config.json has them.
    """

    path: str
    layout: str
    name: str
    config: InternImageConfig
    preprocessing: Preprocessing
    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    made: dict[str, np.ndarray] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None

    def name_of(self, rule: Rule) -> str:
        """The array's name in this file."""
        return rule.flax if self.layout == "converted" else rule.torch

    def read(self, rule: Rule) -> np.ndarray:
        """Returns an array in its Flax shape and the file's dtype; NaN is a CheckpointError."""
        if rule.flax in self.made:
            return self.made[rule.flax]
        array = _finite(self, self.tensors[self.name_of(rule)])
        return array if self.layout == "converted" else flax_layout(array, rule.axes)


def _finite(source: Source, tensor: LazyTensor) -> np.ndarray:
    array = tensor.read()
    # A sum is one pass without a temporary; only a sum that is not finite needs a closer look.
    with np.errstate(all="ignore"):
        suspect = not np.isfinite(array.sum(dtype=np.result_type(array.dtype, np.float32)))
    if suspect and not np.isfinite(array).all():
        raise CheckpointError(f"{source.path}: {tensor.name} has values that are not finite")
    return array


@contextmanager
def open_source(
    path: str | os.PathLike[str],
    *,
    model: str | InternImageConfig | None = None,
    weights: Weights = "model",
) -> Iterator[Source]:
    """Opens a checkpoint of any layout; its arrays can be read until the context ends.

    Args:
        path: A file, an index of shards, or a folder.
        model: Which model it is of: a released name, the path of a config.json, or a config. Needed
            where neither a config.json nor the file's name says it. A config's training settings
            always apply.
        weights: "model", or "ema" for the moving average that a training run keeps.

    Returns:
        A context manager that gives the `Source`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no such checkpoint, or not of that model; one line that says why.
    """
    path = os.fspath(path)
    if weights not in _ENTRY:
        raise ValueError(f"weights: expected 'model' or 'ema', got {weights!r}")
    with open_checkpoint(path) as checkpoint:
        layout, tensors, notes = _select(path, checkpoint.tree, weights)
        folder = checkpoint.files[0].parent
        settings = None
        # What lies beside a bare .pth need not belong to it.
        if os.path.isdir(path) or layout in ("huggingface", "converted"):
            settings = _read_json(folder / CONFIG)
        if layout == "converted":
            name, config, preprocessing = _converted(folder / CONFIG, settings)
        else:
            name, config = _identify(path, folder, settings, model, tensors, layout)
            preprocessing = _preprocessing(folder, name, settings, model)
        about = folder / CONFIG
        if settings is None and (named := _named_file(model)):
            about, settings = named, _read_json(named)
        classes = _class_names(about, settings or {}, config.num_classes)
        if isinstance(model, InternImageConfig):  # says too how the caller will train it
            config = config.replace(**{key: getattr(model, key) for key in _TRAINING})
        yield Source(
            *(path, layout, name, config, preprocessing, tensors, checkpoint.files, notes),
            classes=classes,
        )


def check_tensors(source: Source) -> None:
    """Raises CheckpointError unless the tensors are just those of the model, in shape and dtype."""
    wanted = {
        source.name_of(rule): rule.flax_shape if source.layout == "converted" else rule.torch_shape
        for rule in rules(source.config)
        if rule.flax not in source.made
    }
    check(source.path, wanted, source.tensors)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text: {error}") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _tensors(path: str, tree: object) -> dict[str, LazyTensor]:
    """The tensors of a state dict; raises if there is anything else in it."""
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: expected named tensors, got a {type(tree).__name__}")
    odd = [key for key, value in tree.items() if not isinstance(value, LazyTensor)]
    if odd or not tree:
        what = f"{str(odd[0])[:80]!r}, which is no tensor" if odd else "none"
        raise CheckpointError(f"{path}: expected named tensors, got {what}")
    return {str(name): tensor for name, tensor in tree.items()}


def _only_model(path: str, weights: Weights) -> None:
    if weights != "model":
        raise CheckpointError(f"{path}: weights {weights!r} are in a training run's file only")


def _select(
    path: str, tree: object, weights: Weights
) -> tuple[str, dict[str, LazyTensor], tuple[str, ...]]:
    """Finds the layout, and the tensors by the names of a released .pth file."""
    layout = "released"
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        _only_model(path, weights)
        tree = tree["state_dict"]
    elif isinstance(tree, dict) and isinstance(tree.get("model"), dict):
        entry = _ENTRY[weights]
        if entry not in tree:
            raise CheckpointError(
                f"{path}: has no {entry!r}; it has {', '.join(map(str, tree))[:200]}"
            )
        layout = "released" if set(tree) == {"model"} else "trainer"
        tree = tree[entry]
    else:
        _only_model(path, weights)
    tensors = _tensors(path, tree)
    if all(name.startswith("module.") for name in tensors):  # of a model in DistributedDataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    backbone = {
        name.removeprefix("backbone."): tensor
        for name, tensor in tensors.items()
        if name.startswith("backbone.")
    }
    if not backbone:
        if any(name.endswith(".kernel") for name in tensors):
            return "converted", tensors, ()
        if all(name.startswith("model.") for name in tensors):
            return "huggingface", {from_huggingface(name): t for name, t in tensors.items()}, ()
        return layout, tensors, ()
    others = {name.split(".")[0] for name in tensors} - {"backbone"}
    # A detector's moving average has a name without dots for each tensor.
    others = sorted({"ema_*" if name.startswith("ema_") else name for name in others})
    left_out = f"; left out {', '.join(others)}" if others else ""
    return "dense", backbone, (f"read the backbone{left_out}",)


def _named_file(model: str | InternImageConfig | None) -> Path | None:
    """The config.json that `model` names by its own path or its folder's; None if neither."""
    if not isinstance(model, str) or model.removeprefix("OpenGVLab/") in RELEASED:
        return None
    if os.path.isdir(model):
        return Path(model) / CONFIG
    return Path(model) if model.endswith(".json") else None


def _named_config(model: str | InternImageConfig) -> tuple[str | None, InternImageConfig]:
    """Name and config of what the caller says the model is."""
    if isinstance(model, InternImageConfig):
        return None, model
    if path := _named_file(model):
        settings = _read_json(path)
        if settings is None:
            raise FileNotFoundError(f"{path}: no such file")
        if settings.get("format") == FORMAT:
            return _converted(path, settings)[:2]
        return None, _huggingface_config(path, settings)
    released = released_model(model)
    return released.name, released.config


def _huggingface_config(path: Path, settings: dict[str, Any]) -> InternImageConfig:
    kind = settings.get("model_type", "internimage")
    if kind != "internimage":
        raise CheckpointError(f"{path}: model_type must be 'internimage', got {kind!r}")
    known = _HUGGINGFACE_KEYS | {"model_type"}
    values = {key: value for key, value in settings.items() if key not in known}
    return InternImageConfig.from_dict(values, str(path))


def _identify(
    path: str,
    folder: Path,
    settings: dict[str, Any] | None,
    model: str | InternImageConfig | None,
    tensors: dict[str, LazyTensor],
    layout: str,
) -> tuple[str, InternImageConfig]:
    """Says which model it is: by config.json, by the caller, or by the file's name."""
    named, config = (None, None) if model is None else _named_config(model)
    place = Path(os.path.abspath(path))
    if settings is not None:
        place = Path(os.path.abspath(folder))
        config = _huggingface_config(folder / CONFIG, settings)
        own = str(settings.get("_name_or_path", "")).removeprefix("OpenGVLab/")
        named = own if own in RELEASED else named
    stem = place.name if place.is_dir() else place.stem

    def adapt(config: InternImageConfig) -> InternImageConfig:
        """To what a file of this layout has of a model."""
        if layout != "dense":
            return config
        config = config.replace(num_classes=0)
        gammas = any(name.endswith(".gamma1") for name in tensors)
        if gammas and config.layer_scale is None and not config.res_post_norm:
            # Detection and segmentation train T with layer scales, which its classifier lacks. The
            # initial value is theirs; the forward pass needs to know only that they are there.
            config = config.replace(layer_scale=1.0)
        return config

    if config is None:
        try:
            released = released_model(stem)
        except ValueError:
            fits = fitting_models(tensors, adapt) or ["none of the released models"]
            raise CheckpointError(
                f"{path}: neither a config.json nor the file's name says which model this is (the "
                f"tensors fit {' or '.join(fits)}); convert it by `python -m convert FILE FOLDER "
                "--model NAME`, or in Python say it with model"
            ) from None
        named, config = released.name, released.config
    return named or stem, adapt(config)


def check_named(source: Source, model: str | InternImageConfig, any_classes: bool) -> None:
    """Raises CheckpointError if the source is of another model than the caller named.

    Args:
        source: An open checkpoint.
        model: What the caller named.
        any_classes: Whether the number of classes may differ.
    """
    name, named = _named_config(model)
    ours, theirs = source.config.to_dict(), named.to_dict()
    free = {*_TRAINING}
    if any_classes or source.layout == "dense":
        free.add("num_classes")
    if source.layout == "dense":
        free.add("layer_scale")
    for values in (ours, theirs):  # the initial value of a layer scale is of no use once trained
        values["layer_scale"] = values["layer_scale"] is not None
    wrong = [
        f"{key} {ours[key]}, not {theirs[key]}"
        for key in ours
        if key not in free and ours[key] != theirs[key]
    ]
    if wrong:
        raise CheckpointError(
            f"{source.path}: is of another model than {name or 'the config given'}: "
            f"{'; '.join(wrong)}"
        )


def _preprocessing(
    folder: Path,
    name: str,
    settings: dict[str, Any] | None,
    model: str | InternImageConfig | None,
) -> Preprocessing:
    """That of the checkpoint's own config.json or, where there is none, of the one named for it."""
    if settings is None and (named := _named_file(model)):
        folder, settings = named.parent, _read_json(named) or {}
        if settings.get("format") == FORMAT:
            return _converted(named, settings)[2]
    path = folder / "preprocessor_config.json"
    values = None if settings is None else _read_json(path)
    if values is not None:
        return Preprocessing.from_huggingface(values, str(path))
    return Preprocessing(RELEASED[name].image_size if name in RELEASED else 224)


def _class_names(path: Path, settings: dict[str, Any], count: int) -> tuple[str, ...] | None:
    """The names of `count` classes that a config.json has, None where it has none."""
    names, labels = settings.get("classes"), settings.get("id2label")
    if count == 0:
        return None
    if names is None:
        # Hugging Face's need not be about them, and ImageNet's are known.
        if not isinstance(labels, dict) or len(labels) != count:
            return None
        found = [name for i in range(count) if isinstance(name := labels.get(str(i)), str)]
        known = count in (NUM_CLASSES_1K, NUM_CLASSES_22K)
        if known or len(found) != count or any(name.startswith("LABEL_") for name in found):
            return None
        return tuple(found)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: classes must be a list of names")
    if len(names) != count:
        raise CheckpointError(f"{path}: classes must be {count} names, got {len(names)}")
    return tuple(names)


def _converted(
    path: Path, settings: dict[str, Any] | None
) -> tuple[str, InternImageConfig, Preprocessing]:
    """Name, config and preprocessing from the config.json of a converted folder."""
    if settings is None:
        raise FileNotFoundError(f"{path}: no such file; converted weights need it")
    for key, kind in (("model", str), ("config", dict), ("preprocessing", dict)):
        if not isinstance(settings.get(key), kind):
            raise CheckpointError(
                f"{path}: {key} must be a {kind.__name__}, got {settings.get(key)!r}"
            )
    version = settings.get("format"), settings.get("format_version")
    if version != (FORMAT, 1):
        raise CheckpointError(f"{path}: format must be {FORMAT!r} of version 1, got {version}")
    return (
        settings["model"],
        InternImageConfig.from_dict(settings["config"], str(path)),
        Preprocessing.from_dict(settings["preprocessing"], str(path)),
    )

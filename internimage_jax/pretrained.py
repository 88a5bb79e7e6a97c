"""From a name, a file or a folder to a model, and back to a folder."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

import xla_ops

try:
    from convert import convert, open_model, read_arrays
except ImportError as error:
    other = getattr(sys.modules.get("convert"), "__file__", None)
    if other is None or Path(other).parent.parent == Path(__file__).parent.parent:
        raise
    raise ImportError(
        f"{other}: hides this package's converter, whose name is convert too"
    ) from error
from convert.export import CONFIG, moved_when_done, settings_of, write_settings, write_weights
from convert.source import Weights
from internimage_jax.cache import cache_folder
from internimage_jax.config import NUM_CLASSES_1K, InternImageConfig, ReleasedModel, released_model
from internimage_jax.initial import fill
from internimage_jax.labels import checked_names, imagenet1k_classes, own_names
from internimage_jax.messages import one_line
from internimage_jax.model import InternImage, check_dtypes
from internimage_jax.preprocess import Preprocessing
from internimage_jax.shapes import parameter_shapes

log = logging.getLogger("internimage_jax")

# Files of a released repository, the first kind that it has.
_BESIDE = (CONFIG, "preprocessor_config.json")
_WEIGHTS = (
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)


def create_model(
    model: str | InternImageConfig,
    *,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    drop_path_rate: float | None = None,
    with_cp: bool | None = None,
    image_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    implementation: xla_ops.Implementation | None = None,
    seed: int = 0,
) -> InternImage:
    """Makes a model with fresh weights, as one starts training from.

    Args:
        model: A released name, or a config.
        num_classes: Classes of the head; None keeps the config's, 0 leaves the head out.
        classes: Names of the classes, which also say how many there are.
        drop_path_rate: Of stochastic depth in training; None keeps the config's, which is 0 in the
            released models.
        with_cp: Whether training recomputes what is within a layer; None keeps the config's.
        image_size: Side of the images that `Predictor` and `evaluate` make, in pixels; None is the
            released model's, 224 for a config.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters; None is `dtype`.
        implementation: Of DCNv3: "kernel", "gather" or None, see `xla_ops.dcnv3`. With "gather"
            the other operators are in jnp too.
        seed: Of the initial values.

    Returns:
        The model.

    Raises:
        ValueError: The name is unknown, and the message lists the closest; or a value is out of
            range.
    """
    if isinstance(model, InternImageConfig):
        name, config, preprocessing = "internimage", model, Preprocessing(224)
    else:
        released = released_model(model)
        name, config = released.name, released.config
        preprocessing = Preprocessing(released.image_size)
    if classes is not None:
        num_classes = len(checked_names(classes, num_classes))
    return InternImage(
        _changed(config, num_classes=num_classes, drop_path_rate=drop_path_rate, with_cp=with_cp),
        dtype=dtype,
        param_dtype=dtype if param_dtype is None else param_dtype,
        implementation=implementation,
        rngs=nnx.Rngs(seed),
        name=name,
        preprocessing=_of_size(preprocessing, image_size),
        classes=classes,
    )


def _changed(config: InternImageConfig, **values: Any) -> InternImageConfig:
    return config.replace(**{name: value for name, value in values.items() if value is not None})


def _of_size(preprocessing: Preprocessing, image_size: int | None) -> Preprocessing:
    """The same preprocessing for another image size; the crop keeps its share of the picture."""
    if image_size is None:
        return preprocessing
    short = preprocessing.resize_size
    if short is not None:
        short = round(short * image_size / preprocessing.image_size)
    return dataclasses.replace(preprocessing, image_size=image_size, resize_size=short)


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    model: str | InternImageConfig | None = None,
    weights: Weights = "model",
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    to_1k: bool = False,
    drop_path_rate: float | None = None,
    with_cp: bool | None = None,
    image_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    implementation: xla_ops.Implementation | None = None,
) -> InternImage:
    """Loads a model: a released one by its name, or any checkpoint from a file or folder.

    A released model is fetched from the Hugging Face hub (extra `hub`; its cache and its offline
    switch HF_HUB_OFFLINE are obeyed), converted once, and the converted form kept below
    INTERNIMAGE_CACHE, or else below the user's cache folder.

    Args:
        source: A released name, such as "internimage_t_1k_224" or
            "OpenGVLab/internimage_t_1k_224", or a path: whatever `convert.convert` takes, or a
            folder that it wrote.
        model: Which model a file is of; see `convert.convert`. If it is a config, its training
            settings (drop rates, `with_cp`) always apply.
        weights: "model", or "ema" for the moving average that a training run keeps.
        num_classes: Classes wanted. A head of another size is replaced by a new one, which is
            logged; 0 leaves out the head.
        classes: Names of the classes wanted, which also say how many there are; a head with that
            many is kept. None means those in the checkpoint's config.json, if any.
        to_1k: Takes the ImageNet-1K classes out of a head of 21,841, by the released map.
        drop_path_rate: Of stochastic depth in training; None keeps the checkpoint's, which is 0 in
            the released models.
        with_cp: Whether training recomputes what is within a layer; None keeps the checkpoint's.
        image_size: Side of the images that `Predictor` and `evaluate` make, in pixels; None keeps
            the checkpoint's.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters; None is `dtype`.
        implementation: Of DCNv3: "kernel", "gather" or None, see `xla_ops.dcnv3`. With "gather"
            the other operators are in jnp too.

    Returns:
        The model, with `name`, `config` and `preprocessing` set.

    Raises:
        FileNotFoundError: There is no such file, and no released model of that name.
        ValueError: The name is unknown, or the checkpoint damaged or not of that model; one line.
        OSError: The hub cannot be reached.
    """
    param_dtype = dtype if param_dtype is None else param_dtype
    check_dtypes(dtype, param_dtype)
    param_dtype = jnp.dtype(param_dtype)
    if classes is not None:
        num_classes = len(checked_names(classes, num_classes))
    path = locate(source)
    with open_model(
        path, model=model, weights=weights, num_classes=num_classes, to_1k=to_1k
    ) as opened:
        kept = "head.kernel" not in opened.made
        if kept and classes is not None and _are_others(classes, opened.classes):
            log.warning("%s: kept the head, under the names given for its classes", path)
        loaded = InternImage(
            _changed(opened.config, drop_path_rate=drop_path_rate, with_cp=with_cp),
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            name=opened.name,
            preprocessing=_of_size(opened.preprocessing, image_size),
            classes=opened.classes if classes is None else classes,
        )
        values = {
            rule.flax: jax.device_put(array) for rule, array in read_arrays(opened, param_dtype)
        }
    fill(loaded, values)
    return loaded


def _are_others(classes: Sequence[str], known: Sequence[str] | None) -> bool:
    """Whether a head of as many classes is known to have other names than these."""
    if known is not None:
        return tuple(known) != tuple(classes)
    if len(classes) != NUM_CLASSES_1K or own_names(classes) is None:
        return False
    return [one.wnid for one in imagenet1k_classes()] != list(classes)


def save_pretrained(model: InternImage, folder: str | os.PathLike[str]) -> Path:
    """Writes a model, such as one that was trained, as `from_pretrained` and all commands take it.

    Args:
        model: With values; parameters are written in their dtype. Not a fused one, whose parameters
            are not the released models'. If several processes have it, only one may write it.
        folder: For `model.safetensors` and `config.json`; replaces what was written before.

    Returns:
        The path of `folder`.

    Raises:
        FileExistsError: `folder` is a file, or has other files in it.
        ValueError: The model is fused, has no values or some that are not finite, or its arrays are
            not all within reach of this process. Nothing is written then.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; a model is written to a folder")
    found = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    shapes = parameter_shapes(model.config)
    found_shapes = {name: array.shape for name, array in found.items()}
    if names := sorted(found_shapes.keys() ^ shapes.keys()):
        raise ValueError(
            f"model: {names[0]} is not as its config has it; fused models cannot be saved"
        )
    for name, shape in shapes.items():
        if found_shapes[name] != shape:
            raise ValueError(
                f"model: {name}: got shape {found_shapes[name]}, expected {shape} by model.config; "
                "where a layer was replaced, model.config has to follow (such as its num_classes)"
            )
    classes = (
        None if model.classes is None else checked_names(model.classes, model.config.num_classes)
    )
    for name, array in found.items():
        if isinstance(array, jax.ShapeDtypeStruct):
            raise ValueError(f"model: {name} has no values")
        spread = isinstance(array, jax.Array) and not array.is_fully_addressable
        if spread and not array.is_fully_replicated:
            raise ValueError(f"model: {name} is not all within reach of this process")
    dtype = np.dtype(found["patch_embed.conv1.kernel"].dtype)

    def arrays() -> Iterator[np.ndarray]:
        for name in shapes:
            array = np.asarray(found[name])
            if not np.isfinite(array).all():
                raise ValueError(f"model: {name} has values that are not finite")
            yield array

    with moved_when_done(folder) as unfinished:
        tensors = {name: (shape, np.dtype(found[name].dtype)) for name, shape in shapes.items()}
        write_weights(unfinished, tensors, arrays())
        about = model.name, dtype, model.config, model.preprocessing, classes
        write_settings(unfinished, settings_of(*about))
    return folder


def locate(source: str | os.PathLike[str]) -> str:
    """The path of a checkpoint: `source` itself, or where the released model of that name is."""
    released = released_named(source)
    return os.fspath(source) if released is None else str(_fetched(released))


def released_named(source: str | os.PathLike[str]) -> ReleasedModel | None:
    """The released model that `source` names, None where it is a path.

    Raises ValueError or FileNotFoundError where it is neither.
    """
    name = os.fspath(source)
    if os.path.exists(name):
        return None
    # A path that is not there is no misspelt name.
    suffixes = (".pth", ".pt", ".bin", ".safetensors", ".json")
    if os.sep in name.removeprefix("OpenGVLab/") or name.endswith(suffixes):
        raise FileNotFoundError(f"{name}: no such file or folder")
    try:
        return released_model(name)
    except ValueError as error:
        raise ValueError(f"{error}; nor is there such a file or folder") from None


def _fetched(model: ReleasedModel) -> Path:
    """The converted folder of a released model; fetches and converts where it is not there yet."""
    snapshot = _download(model, _WEIGHTS[0])
    if not any(snapshot.glob("*.safetensors*")):
        snapshot = _download(model, _WEIGHTS[1])
    # The snapshot's name is the commit, so a new release is converted anew.
    converted = cache_folder() / f"{model.name}-{snapshot.name[:12]}"
    if not (converted / CONFIG).exists():
        from filelock import FileLock  # comes with huggingface_hub

        converted.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{converted}.lock"):  # whoever comes second finds it converted
            if not (converted / CONFIG).exists():
                convert(snapshot, converted, model=model.name)
    return converted


def _download(model: ReleasedModel, weights: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise OSError(
            f"{model.name}: to fetch it, pip install huggingface_hub; or give the path of a "
            "checkpoint"
        ) from None
    try:
        return Path(snapshot_download(model.repository, allow_patterns=[*_BESIDE, *weights]))
    except Exception as error:  # its HTTP library's are no OSErrors, and which one that is varies
        reason = one_line(error)
        raise OSError(
            f"{model.name}: cannot be fetched from {model.repository}: {reason}"
        ) from error

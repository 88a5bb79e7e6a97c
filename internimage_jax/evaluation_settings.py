"""What an evaluation's result depends on: model, weights, images, labels, arithmetic, versions.

These settings begin the report, and `--resume` goes on only where they are the same.
"""

from __future__ import annotations

import hashlib
import json
import platform as machine
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internimage_jax.data import Dataset
    from internimage_jax.model import InternImage

_PRECISION = "jax_default_matmul_precision"
PACKAGES = ("internimage-jax", "jax", "jaxlib", "flax", "numpy", "pillow")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on; None if not installed."""
    found: dict[str, str | None] = {"python": machine.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def model_settings(
    model: InternImage, weights: Sequence[dict[str, str]], classes: tuple[str, ...] | None
) -> dict[str, Any]:
    """The model, how its images are made, and what computes it; `classes` of its own, if any."""
    import jax

    import xla_ops

    device = jax.local_devices()[0]
    implementation = model.levels[0].blocks[0].dcn.implementation
    if implementation is None:
        platform = "cuda" if device.platform == "gpu" else device.platform
        serving = xla_ops.status().get(platform)
        implementation = "gather" if serving is None else serving.implementation
    return {
        "model": model.name,
        "num_classes": model.config.num_classes,
        "classes": "ImageNet" if classes is None else list(classes),
        "config": model.config.to_dict(),
        "weights": list(weights),
        "image_size": model.preprocessing.image_size,
        "preprocessing": model.preprocessing.to_dict(),
        "dtype": model.dtype.name,
        # None is the backend's own: on a GPU, float32 products have the accuracy of TF32.
        "matmul_precision": getattr(jax.config, _PRECISION),
        "implementation": implementation,
        "backend": jax.default_backend(),
        "devices": [_device_name(one) for one in jax.local_devices()],
    }


def dataset_settings(dataset: Dataset, chosen: Sequence[int]) -> dict[str, Any]:
    """The images and their labels; a digest stands for their names and labels, in order."""
    digest = hashlib.sha256()
    for i in chosen:
        row = [dataset.names[i], list(dataset.labels[i])]
        digest.update(json.dumps(row).encode() + b"\n")
    classes = None if dataset.classes is None else list(dataset.classes)
    return {
        "dataset": {
            "kind": dataset.kind,
            "images": len(chosen),
            "names_and_labels_sha256": digest.hexdigest(),
            "classes": "all" if classes is None else classes,
        }
    }


def file_digests(path: str) -> list[dict[str, str]]:
    """Name and SHA-256 of each file of a checkpoint."""
    from convert.torch_file import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        files = checkpoint.files
    found = []
    for file in files:
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        found.append({"file": file.name, "sha256": digest.hexdigest()})
    return found


def array_digests(model: InternImage) -> list[dict[str, str]]:
    """As `file_digests`, of a model that is from no file: of its arrays, in the order of names."""
    import numpy as np
    from flax import nnx

    digest = hashlib.sha256()
    named = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(nnx.state(model))}
    for name in sorted(named):
        array = np.asarray(named[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return [{"file": "(in memory)", "sha256": digest.hexdigest()}]


def conversion_notes(path: str) -> tuple[str, ...]:
    """What the converter noted of a folder that it wrote, such as 1,000 classes out of 21,841."""
    from convert.export import CONFIG, FORMAT

    settings = Path(path, CONFIG)
    values = json.loads(settings.read_bytes()) if settings.exists() else {}
    if values.get("format") != FORMAT:
        return ()
    return tuple(f"The weights' conversion: {note}." for note in values.get("notes", ()))


def differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """Says where two settings differ, such as "dtype was 'float32' and is 'bfloat16'"."""
    found = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{path}{key}.")
        elif old != new:
            found.append(f"{path}{key} was {_short(old)} and is {_short(new)}")
    return found


def _device_name(device: Any) -> str:
    kind = device.device_kind
    return kind if kind == device.platform else f"{device.platform} {kind}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."

"""Check the whole way offline: write a checkpoint, convert it, label a photo, compare the answer.

The checkpoint is a small InternImage in the layout of the released ones. Its weights are seeded,
not trained, so the labels mean nothing; that they are the recorded ones is what counts.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import zlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from internimage_jax.commands.predict import print_table
from internimage_jax.config import InternImageConfig

if TYPE_CHECKING:
    import numpy as np

    from internimage_jax.predict import Prediction

CONFIG = InternImageConfig(
    channels=16, depths=(1, 1, 2, 1), groups=(2, 4, 8, 16), layer_scale=1.0, offset_scale=2.0
)
IMAGE_SIZE = 224
# Class and probability, computed on a CPU in float32. Offsets read as (y, x) change the order, and
# bfloat16 makes 0.04; the tolerance is for JPEG decoders that round some pixels in another way.
RECORDED = ((338, 0.15386), (440, 0.08658), (75, 0.08080), (455, 0.05944), (771, 0.04107))
TOLERANCE = 0.01  # of the probability


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # it has none


def run(args: argparse.Namespace) -> None:
    del args
    import jax

    import convert
    from internimage_jax.predict import Predictor
    from internimage_jax.pretrained import from_pretrained

    start = time.perf_counter()
    photo = resources.files("internimage_jax") / "data_files" / "cat.jpg"
    with (
        tempfile.TemporaryDirectory(prefix="internimage-demo-") as folder,
        resources.as_file(photo) as path,
        jax.default_matmul_precision("highest"),  # GPUs and TPUs would round the factors
    ):
        source, converted = Path(folder, "released"), Path(folder, "converted")
        print("These weights are seeded, not trained: the labels mean nothing.")
        write_checkpoint(source, CONFIG, IMAGE_SIZE)
        size = sum(file.stat().st_size for file in source.iterdir())
        print(f"Wrote a checkpoint of {size / 1e6:.1f} MB in the layout of the released ones.")
        convert.convert(source, converted)
        print("Converted it to Flax parameters.")
        predictor = Predictor(from_pretrained(converted), batch_size=1)
        [prediction] = predictor([path])
    print_table(prediction)
    _compare(prediction)
    print(f"The answer matches the recorded one ({time.perf_counter() - start:.1f} s).")


def write_checkpoint(folder: Path, config: InternImageConfig, image_size: int) -> None:
    """Writes a Hugging Face folder as the released models have it, with seeded weights.

    Args:
        folder: Created.
        config: The architecture.
        image_size: Side of the images for preprocessor_config.json.

    Raises:
        OSError: A file cannot be written.
    """
    from safetensors.numpy import save_file

    from convert.rules import rules, to_huggingface

    folder.mkdir()
    settings = {
        "architectures": ["InternImageModel"],
        "model_type": "internimage",
        "torch_dtype": "float32",
        "core_op": "DCNv3",
        **config.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(settings))
    preprocessing = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "crop_size": image_size,
        "size": image_size,
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        **dict.fromkeys(("do_resize", "do_center_crop", "do_normalize"), True),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    tensors = {
        to_huggingface(rule.torch): seeded_values(rule.torch, rule.torch_shape)
        for rule in rules(config)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def seeded_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the float32 values of a tensor, the same everywhere.

    Args:
        name: As in a released .pth file; it seeds the values.
        shape: In PyTorch.
    """
    import numpy as np

    values = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    leaf = name.rpartition(".")[2]
    # A deviation of 1 / sqrt(fan-in) keeps signals; the head's spreads the classes.
    if len(shape) > 1:
        values *= math.sqrt(3 / math.prod(shape[1:])) * (8 if name == "head.weight" else 1)
    elif leaf in ("gamma1", "gamma2"):
        values = 0.5 + 0.1 * values
    elif leaf in ("weight", "running_var"):
        values = 1 + 0.2 * values
    elif not name.endswith("offset.bias"):  # those spread the points by up to a pixel
        values *= 0.2
    return values.astype(np.float32)


def _compare(prediction: Prediction) -> None:
    """Raises ValueError where `prediction` is not the recorded one."""
    for rank, (one, (index, probability)) in enumerate(
        zip(prediction.classes, RECORDED, strict=True), start=1
    ):
        same = one.index == index and math.isclose(one.probability, probability, rel_tol=TOLERANCE)
        if not same:
            raise ValueError(
                f"demo: rank {rank} is class {one.index} with probability {one.probability:.6f}, "
                f"recorded is class {index} with {probability:.6f}"
            )

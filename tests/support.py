"""The oracle's data, and the one table of how close to it a result has to be."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.rules import rules
from internimage_jax.config import InternImageConfig
from internimage_jax.initial import fill
from internimage_jax.model import InternImage
from tests.reference.recipe import recipe_tensor

SMALL = Path(__file__).parent / "reference"
TINY = sorted(path.stem for path in (SMALL / "layouts").glob("tiny_*.json"))

# The least model there is with all four levels.
SMALLEST = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(2, 4, 8, 16), num_classes=5)

# Largest error allowed, as a part of the largest value of the reference.
TOLERANCE = {
    "operator, float64": 1e-11,
    "operator, float32": 1e-5,
    "model, golden in float64": 1e-5,
    "model, golden in float32": 1e-4,
    "gradient": 1e-4,  # of the tensor's rms
}


def reference(name: str) -> Path:
    """Path of a file of the reference data; skips the test where only the small files are there."""
    if (SMALL / name).exists():
        return SMALL / name
    folder = os.environ.get("INTERNIMAGE_REFERENCE")
    if not folder:
        pytest.skip(f"INTERNIMAGE_REFERENCE is not set, and {name} is too large for the project")
    return Path(folder) / name


def layout(name: str) -> dict[str, Any]:
    """Config and tensors of a model of the reference data."""
    return json.loads(reference(f"layouts/{name}.json").read_text())


def reference_config(name: str) -> InternImageConfig:
    values = layout(name)["config"]
    return InternImageConfig.from_dict({k: v for k, v in values.items() if k != "model_type"})


def recipe_model(
    config: InternImageConfig, dtype: Any = np.float32, **settings: Any
) -> InternImage:
    """The Flax model with the recipe's weights."""
    model = InternImage(config, dtype=dtype, param_dtype=dtype, **settings)
    fill(model, _Recipe(config, dtype))
    return model


class _Recipe(Mapping):
    """The recipe's weights by Flax path, each made when it is asked for: G has 12 GB of them."""

    def __init__(self, config: InternImageConfig, dtype: Any):
        self._rules = {rule.flax: rule for rule in rules(config)}
        self._dtype = dtype

    def __getitem__(self, path: str) -> np.ndarray:
        rule = self._rules[path]
        array = recipe_tensor(rule.torch, rule.torch_shape).astype(self._dtype)
        if rule.axes is None:
            return array
        return array.reshape(array.shape[: len(rule.axes)]).transpose(rule.axes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


def golden_input(golden: Any) -> np.ndarray:
    """The input (N, H, W, 3) that a golden was recorded for."""
    height, width = np.broadcast_to(golden["image_size"], 2)
    shape = golden["logits"].shape[0], 3, int(height), int(width)
    stream = np.random.RandomState(int(golden["input_seed"]))
    return stream.standard_normal(shape).astype(np.float32).transpose(0, 2, 3, 1)


def error(value: jax.Array | np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, as a part of the largest value wanted."""
    value = np.asarray(value, np.float64)
    assert value.shape == wanted.shape, (value.shape, wanted.shape)
    return float(np.abs(value - wanted).max() / np.abs(wanted).max())


def assert_close(value: jax.Array | np.ndarray, wanted: np.ndarray, tolerance: str) -> None:
    assert error(value, wanted) <= TOLERANCE[tolerance]


def images(n: int = 2, h: int = 32, w: int = 32, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.RandomState(0).standard_normal((n, h, w, 3)), dtype)


def arrays_of(model: InternImage) -> dict[str, np.ndarray]:
    """Parameters and statistics by path."""
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}

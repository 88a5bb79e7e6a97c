"""InternImage for JAX: the model, its released weights, prediction and evaluation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internimage_jax.config import RELEASED, InternImageConfig, list_models
    from internimage_jax.model import InternImage, InternImageOutput
    from internimage_jax.predict import Prediction, Predictor
    from internimage_jax.preprocess import Preprocessing
    from internimage_jax.pretrained import create_model, from_pretrained, save_pretrained

# Imported when first asked for: the converter and the table of models need neither flax nor jax.
_HOME = {
    "RELEASED": "config",
    "InternImageConfig": "config",
    "list_models": "config",
    "InternImage": "model",
    "InternImageOutput": "model",
    "Prediction": "predict",
    "Predictor": "predict",
    "Preprocessing": "preprocess",
    "create_model": "pretrained",
    "from_pretrained": "pretrained",
    "save_pretrained": "pretrained",
}

__all__ = [
    "RELEASED",
    "InternImage",
    "InternImageConfig",
    "InternImageOutput",
    "Prediction",
    "Predictor",
    "Preprocessing",
    "create_model",
    "from_pretrained",
    "list_models",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""What is written back for PyTorch loads into the official code, and is the same model there.

Needs a checkout of the official repository, whose path INTERNIMAGE_OFFICIAL names, and torch. What
the official code imports besides is replaced by the few lines that its forward pass needs.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from convert import convert
from internimage_jax.config import InternImageConfig
from internimage_jax.pretrained import from_pretrained
from tests.recipe_checkpoints import write
from tests.support import assert_close, reference_config

OFFICIAL = os.environ.get("INTERNIMAGE_OFFICIAL")
pytestmark = pytest.mark.skipif(
    not OFFICIAL, reason="INTERNIMAGE_OFFICIAL, the path of the official repository, is not set"
)


def module(name: str, **contents: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(contents)
    return made


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The official module with the model, imported with stand-ins for what is not installed."""
    torch = pytest.importorskip("torch")
    stand_ins = [
        module("timm"),
        module("timm.models"),
        module(
            "timm.models.layers", DropPath=torch.nn.Identity, trunc_normal_=lambda *a, **k: None
        ),
        module("DCNv3"),  # the compiled operator; the official code has it in PyTorch as well
        module("pkg_resources", get_distribution=lambda name: types.SimpleNamespace(version="1.0")),
    ]
    for stand_in in stand_ins:
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    path = Path(str(OFFICIAL)) / "classification"
    monkeypatch.setattr(sys, "path", [str(path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it is not ours
    # Not `models/__init__.py`, which imports more than the model.
    package = module("models", __path__=[str(path / "models")])
    monkeypatch.setitem(sys.modules, "models", package)
    before = set(sys.modules)
    import models.intern_image as found  # type: ignore[import-not-found]

    yield found
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("models", "ops_dcnv3"):
            del sys.modules[name]


def official_model(official: Any, config: InternImageConfig) -> Any:
    settings = {name: v for name, v in config.to_dict().items() if name != "drop_path_type"}
    return official.InternImage("DCNv3_pytorch", **settings).eval()


@pytest.mark.filterwarnings("ignore")  # of a PyTorch newer than the official code
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("pth", "tiny_prenorm"),
        ("hf", "tiny_postnorm_layerscale"),
        ("hf-shards", "tiny_h_like"),
        ("trainer", "tiny_bn_relu"),
        ("pth", "tiny_offset_scale2"),
    ],
)
def test_what_is_written_back_is_the_same_official_model(layout, name, official, tmp_path) -> None:
    import torch

    config = reference_config(name)
    model = None if layout.startswith("hf") else config
    source = write(tmp_path / "source", layout, config)
    folder = convert(source, tmp_path / "folder", model=model)
    back = convert(folder, tmp_path / "back.pth", to_torch=True)
    theirs = official_model(official, config)
    theirs.load_state_dict(torch.load(back, weights_only=True)["model"], strict=True)
    images = np.random.RandomState(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    graph, state = nnx.split(from_pretrained(folder))
    logits = jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)
    assert_close(logits, wanted, "model, golden in float32")

"""Other classes than the checkpoint has: kept, new, none, or 1,000 of the 21,841."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from convert import convert
from internimage_jax.config import InternImageConfig
from internimage_jax.labels import map_22k_to_1k
from tests.recipe_checkpoints import (
    CONFIG,
    assert_same,
    flax_arrays,
    read_converted,
    weights,
    write,
)

WIDE = InternImageConfig(
    channels=4, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), num_classes=21841, cls_scale=0.5
)
CLIP = CONFIG.replace(use_clip_projector=True)


def settings_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_the_head_is_kept_where_it_has_the_classes_wanted(tmp_path, caplog) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    # The model named has 1000 classes; the caller vouches for the 10 of the file.
    model = CONFIG.replace(num_classes=1000)
    with caplog.at_level(logging.WARNING, "internimage_jax"):
        out = convert(source, tmp_path / "out", model=model, num_classes=10)
    assert_same(read_converted(out), flax_arrays(CONFIG))
    assert settings_of(out)["config"]["num_classes"] == 10
    assert settings_of(out)["notes"] == caplog.messages == []


@pytest.mark.parametrize("layout", ["pth", "hf", "converted"])
@pytest.mark.parametrize("config", [CONFIG, CLIP], ids=["convolution", "attention"])
def test_a_new_head_is_made_and_said_so(layout, config, tmp_path, caplog) -> None:
    source, model = write(tmp_path / "hf", "hf", config), None
    if layout == "pth":
        source, model = write(tmp_path / "weights.pth", "pth", config), config
    elif layout == "converted":
        source = convert(source, tmp_path / "converted")
    with caplog.at_level(logging.WARNING, "internimage_jax"):
        out = convert(source, tmp_path / "out", model=model, num_classes=3)
    note = "left out the head of 10 classes; made a new one of 3 classes, not trained"
    assert settings_of(out)["notes"] == [note]
    assert caplog.messages == [f"{source}: {note}"]
    assert settings_of(out)["config"]["num_classes"] == 3
    got, kept = read_converted(out), flax_arrays(config)
    width = kept.pop("head.kernel").shape[0]
    del kept["head.bias"]
    kernel, bias = got.pop("head.kernel"), got.pop("head.bias")
    assert_same(got, kept)  # the pooling before the head too
    assert kernel.shape == (width, 3)
    assert 0.015 < kernel.std() < 0.025
    np.testing.assert_array_equal(bias, np.zeros(3, np.float32))
    again = convert(source, tmp_path / "again", model=model, num_classes=3)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("config", [CONFIG, CLIP], ids=["convolution", "attention"])
@pytest.mark.parametrize("layout", ["pth", "converted"])
def test_0_classes_leave_out_the_head_and_its_pooling(layout, config, tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth", config)
    if layout == "converted":
        source = convert(source, tmp_path / "converted", model=config)
    out = convert(source, tmp_path / "out", model=config, num_classes=0)
    assert_same(read_converted(out), flax_arrays(config.replace(num_classes=0), weights(config)))
    assert settings_of(out)["notes"] == ["left out the head of 10 classes"]


@pytest.mark.parametrize("config", [CONFIG, CLIP], ids=["convolution", "attention"])
def test_a_detectors_backbone_gets_a_new_head_with_its_pooling(config, tmp_path) -> None:
    source = write(tmp_path / "detector.pth", "dense", config)
    out = convert(source, tmp_path / "out", model=config, num_classes=7)
    got, wanted = read_converted(out), flax_arrays(config.replace(num_classes=7), None)
    assert {n: a.shape for n, a in got.items()} == {n: a.shape for n, a in wanted.items()}
    pooling = ("head.", "conv_head.", "clip_head.")
    assert_same(
        {name: array for name, array in got.items() if not name.startswith(pooling)},
        {name: array for name, array in wanted.items() if not name.startswith(pooling)},
    )
    for name, array in got.items():
        if name.startswith(pooling) and not name.endswith(".kernel"):
            value = 1 if name.endswith((".scale", ".var")) else 0
            np.testing.assert_array_equal(array, np.full_like(array, value), err_msg=name)
    note = "the file has no head; made a new one of 7 classes, not trained"
    assert settings_of(out)["notes"][-1] == note


def test_0_classes_of_a_detector_need_no_note(tmp_path) -> None:
    source = write(tmp_path / "detector.pth", "dense")
    out = convert(source, tmp_path / "out", model=CONFIG, num_classes=0)
    assert settings_of(out)["notes"] == ["read the backbone; left out decode_head"]


@pytest.mark.parametrize("layout", ["pth", "converted"])
def test_the_1000_classes_of_imagenet_1k_are_taken_out_of_21841(layout, tmp_path, caplog) -> None:
    source = write(tmp_path / "weights.pth", "pth", WIDE)
    if layout == "converted":
        source = convert(source, tmp_path / "converted", model=WIDE)
    with caplog.at_level(logging.WARNING, "internimage_jax"):
        out = convert(source, tmp_path / "out", model=WIDE, to_1k=True)
    wide, got = flax_arrays(WIDE), read_converted(out)
    features = np.random.RandomState(0).standard_normal(wide["head.kernel"].shape[0])
    logits = features @ got["head.kernel"] + got["head.bias"]
    wanted = (features @ wide["head.kernel"] + wide["head.bias"])[map_22k_to_1k()]
    assert logits[850] == -1e4
    assert got["head.kernel"].shape[1] == 1000
    np.testing.assert_allclose(np.delete(logits, 850), np.delete(wanted, 850), rtol=1e-6)
    rest = {name: array for name, array in got.items() if not name.startswith("head.")}
    assert_same(rest, {n: a for n, a in wide.items() if not n.startswith("head.")})
    assert settings_of(out)["config"]["num_classes"] == 1000
    [note] = settings_of(out)["notes"]
    assert "class 850 has no counterpart and is masked" in note
    assert caplog.messages == [f"{source}: {note}"]


def test_the_masked_class_has_probability_0_in_half_precision(tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth", WIDE)
    out = convert(source, tmp_path / "out", model=WIDE, to_1k=True, dtype="float16")
    got = read_converted(out)
    assert np.isfinite(got["head.bias"]).all()
    assert np.exp(np.float64(got["head.bias"][850])) == 0


def test_a_new_head_can_be_written_back(tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    back = convert(source, tmp_path / "back.pth", model=CONFIG, num_classes=3, to_torch=True)
    three = CONFIG.replace(num_classes=3)
    got = read_converted(convert(back, tmp_path / "there", model=three))
    there = convert(source, tmp_path / "direct", model=CONFIG, num_classes=3)
    assert_same(got, read_converted(there))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to_1k": True}, "weights.pth: to_1k needs a head of 21841 classes, got one of 10"),
        ({"to_1k": True, "num_classes": 1000}, "num_classes and to_1k exclude each other"),
        ({"num_classes": -1}, "num_classes: expected an integer of at least 0, got -1"),
        ({"num_classes": True}, "num_classes: expected an integer of at least 0, got True"),
        ({"num_classes": 2.0}, r"num_classes: expected an integer of at least 0, got 2\.0"),
    ],
)
def test_what_cannot_be_is_an_error(options, message, tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", model=CONFIG, **options)
    assert list(tmp_path.iterdir()) == [source]


def test_a_head_of_another_size_than_the_models_says_how_to_keep_it(tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    message = r"\(its head is of 10 classes: .*--num-classes\): .*head\.bias \[10\], not \[1000\]"
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", model=CONFIG.replace(num_classes=1000))

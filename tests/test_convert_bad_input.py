"""What does not fit is one line that names it, exactly, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import CheckpointError, convert
from convert.__main__ import main
from convert.lazy_tensor import SourceFile
from tests.recipe_checkpoints import CONFIG, weights, write


def error_of(source: Path, **options: Any) -> str:
    """Returns why a conversion fails, without the name of the source, which comes first."""
    before = sorted(source.parent.rglob("*"))
    with pytest.raises((ValueError, OSError)) as caught:
        convert(source, source.parent / "out", **options)
    assert sorted(source.parent.rglob("*")) == before
    text = str(caught.value)
    assert text.startswith(str(source)), text
    assert len(text.splitlines()) == 1
    return text.removeprefix(str(source)).removeprefix(": ")


def changed(tmp_path: Path, changes: Mapping[str, Any]) -> Path:
    """Writes a checkpoint of `CONFIG` in which some tensors are others, or None: missing."""
    arrays = {**weights(CONFIG), **changes}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    return write(tmp_path / "weights.pth", "pth", arrays=arrays)


# ---- tensors


def test_all_that_is_missing_left_over_misshapen_or_no_float_is_listed_at_once(tmp_path) -> None:
    source = changed(
        tmp_path,
        {
            "levels.0.blocks.0.mlp.fc1.bias": None,
            "head.bias": np.zeros(11, np.float32),
            "extra.weight": np.zeros(1, np.float32),
            "extra.num_batches_tracked": np.zeros((), np.int64),  # beside no norm
            "patch_embed.conv1.bias": np.zeros(4, np.int64),
        },
    )
    assert error_of(source, model=CONFIG) == (
        "does not fit the model "
        "(its head is of 11 classes: num_classes=11, or convert --num-classes): "
        "1 missing: levels.0.blocks.0.mlp.fc1.bias; "
        "2 left over: extra.weight, extra.num_batches_tracked; "
        "1 misshapen: head.bias [11], not [10]; "
        "1 of a dtype that is no float: patch_embed.conv1.bias int64"
    )


def test_many_that_are_alike_are_counted(tmp_path) -> None:
    arrays = {n: a for n, a in weights(CONFIG).items() if ".dcn.offset." not in n}
    source = write(tmp_path / "weights.pth", "pth", arrays=arrays)
    assert "10 missing: levels.#.blocks.#.dcn.offset.weight (5), levels.#.blocks" in error_of(
        source, model=CONFIG
    )


@pytest.mark.parametrize("layout", ["pth", "trainer", "dense", "hf", "hf-shards", "hf-bin"])
@pytest.mark.parametrize("kind", ["missing", "left over", "misshapen"])
def test_one_tensor_amiss_is_an_error_in_every_layout(layout, kind, tmp_path) -> None:
    arrays, name = weights(CONFIG), "levels.2.blocks.1.mlp.fc2.weight"
    changes = {
        "missing": {name: None},
        "left over": {"levels.2.blocks.2.mlp.fc2.weight": arrays[name]},
        "misshapen": {name: arrays[name].T},
    }[kind]
    arrays = {n: a for n, a in (arrays | changes).items() if a is not None}
    source = write(tmp_path / "source", layout, arrays=arrays)
    model = None if layout.startswith("hf") else CONFIG
    assert f"does not fit the model: 1 {kind}: {next(iter(changes))}" in error_of(
        source, model=model
    )


@pytest.mark.parametrize("shape", [(10, 96, 1, 1), (960,), (96, 10), (10, 96, 1)])
def test_the_same_number_of_values_in_another_shape_does_not_fit(shape, tmp_path) -> None:
    source = changed(tmp_path, {"head.weight": weights(CONFIG)["head.weight"].reshape(shape)})
    assert "1 misshapen: head.weight" in error_of(source, model=CONFIG)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["levels.0.norm.0.bias", "conv_head.1.0.running_var"])
def test_a_value_that_is_not_finite_is_an_error_that_names_the_tensor(
    value, name, tmp_path
) -> None:
    array = weights(CONFIG)[name].copy()
    array[1] = value
    source = changed(tmp_path, {name: array})
    assert error_of(source, model=CONFIG) == f"{name} has values that are not finite"
    assert main([str(source), str(tmp_path / "back.pth"), "--to-torch"]) == 1


def test_infinities_of_both_signs_do_not_cancel(tmp_path) -> None:
    array = weights(CONFIG)["head.bias"].copy()
    array[:2] = np.inf, -np.inf
    source = changed(tmp_path, {"head.bias": array})
    assert error_of(source, model=CONFIG) == "head.bias has values that are not finite"


def test_large_values_whose_sum_overflows_are_finite(tmp_path) -> None:
    source = changed(tmp_path, {"head.bias": np.full(10, 3e38, np.float32)})
    convert(source, tmp_path / "out", model=CONFIG)


@pytest.mark.parametrize(
    ("dtype", "value", "given"),
    [("float16", 1e5, np.float32), ("bfloat16", 3.4e38, np.float32), ("float32", 1e39, np.float64)],
)
def test_a_value_too_large_for_the_dtype_is_an_error(dtype, value, given, tmp_path) -> None:
    array = np.zeros(10, given)
    array[3] = value
    if given is np.float64:
        pytest.importorskip("torch")  # the files made by hand have no float64
    source = changed(tmp_path, {"head.bias": array})
    message = f"head.bias has values too large for {dtype}"
    assert error_of(source, model=CONFIG, dtype=dtype) == message


def test_an_unknown_dtype_is_an_error(tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    with pytest.raises(ValueError, match=r"dtype: expected one of float32, .*, got 'int8'"):
        convert(source, tmp_path / "out", model=CONFIG, dtype="int8")


# ---- which model


def test_a_model_that_is_not_said_is_an_error(tmp_path) -> None:
    source = write(tmp_path / "internimage_q.pth", "pth")
    assert error_of(source) == (
        "neither a config.json nor the file's name says which model this is (the tensors fit none "
        "of the released models); convert it by `python -m convert FILE FOLDER --model NAME`, or "
        "in Python say it with model"
    )
    assert error_of(write(tmp_path / "dense", "dense")).startswith("neither a config.json")
    scaled = write(tmp_path / "scaled", "dense", CONFIG.replace(post_norm=True, layer_scale=1.0))
    assert error_of(scaled).startswith("neither a config.json")


def test_an_unknown_model_lists_the_closest(tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    with pytest.raises(ValueError, match=r"unknown model 'internimage_t'; closest: .*_t_1k_224"):
        convert(source, tmp_path / "out", model="internimage_t")
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        convert(source, tmp_path / "out", model=str(tmp_path / "none.json"))


@pytest.mark.parametrize("layout", ["hf", "converted"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset_scale": 2.0}, "offset_scale 1.0, not 2.0"),  # which shows in no tensor
        ({"act_layer": "ReLU"}, "act_layer GELU, not ReLU"),
        ({"num_classes": 1000}, "num_classes 10, not 1000"),
        ({"layer_scale": 1.0}, "layer_scale False, not True"),
        ({"channels": 16}, "channels 8, not 16"),
    ],
)
def test_another_model_than_named_is_an_error(layout, changes, message, tmp_path) -> None:
    source = write(tmp_path / "hf", "hf")
    if layout == "converted":
        source = convert(source, tmp_path / "converted")
    assert error_of(source, model=CONFIG.replace(**changes)) == (
        f"is of another model than the config given: {message}"
    )


def test_settings_of_training_and_a_known_number_of_classes_may_differ(tmp_path) -> None:
    source = write(tmp_path / "hf", "hf")
    trained = CONFIG.replace(drop_path_rate=0.3, with_cp=True)
    convert(source, tmp_path / "out", model=trained)
    convert(source, tmp_path / "out", model=trained.replace(num_classes=1000), num_classes=10)


def test_tensors_of_another_model_than_named_are_listed(tmp_path) -> None:
    source = write(tmp_path / "x.pth", "pth", CONFIG.replace(layer_scale=1.0))
    assert error_of(source, model=CONFIG) == (
        "does not fit the model: 10 left over: levels.#.blocks.#.gamma# (10)"
    )


# ---- config.json


def folder_with(tmp_path: Path, text: str | bytes | None) -> Path:
    """A Hugging Face folder with another config.json, or none."""
    source = write(tmp_path / "hf", "hf")
    path = source / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return source


def test_without_config_json_the_model_has_to_be_said(tmp_path) -> None:
    source = folder_with(tmp_path, None)
    assert error_of(source).startswith("neither a config.json")
    convert(source, tmp_path / "out", model=CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"res_post_norm": True, "post_norm": True}, "res_post_norm and post_norm exclude"),
        ({"chanels": 8, "dept": 1}, "unknown keys 'chanels', 'dept'"),
        ({"channels": "8"}, "channels must be an integer, got '8'"),
        ({"depths": None}, "depths must be"),
        ({"depths": [1, [1], 2, 1]}, "depths must be a list of integers"),
        ({"groups": [3, 2, 4, 8]}, "groups must divide the channels of their level"),
        ({"num_classes": -1}, "num_classes must not be negative"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be positive"),
        ({"core_op": "DCNv4"}, "core_op must be 'DCNv3', got 'DCNv4'"),
        ({"model_type": "resnet"}, "model_type must be 'internimage', got 'resnet'"),
        ({"model_type": []}, "model_type must be 'internimage', got []"),
    ],
)
def test_a_config_that_cannot_be_is_an_error_that_names_it(changes, message, tmp_path) -> None:
    source = write(tmp_path / "hf", "hf", settings=changes)
    assert f"/config.json: {message}" in error_of(source)


def test_a_config_without_its_sizes_is_an_error(tmp_path) -> None:
    source = folder_with(tmp_path, '{"model_type": "internimage", "channels": 8}')
    assert error_of(source) == "/config.json: missing keys 'depths', 'groups'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"channels": 8,', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[8]", "expected a JSON object, got list"),
        (b"\xff\xfe{}", "cannot be read as text"),
        ("null", "expected a JSON object, got NoneType"),
    ],
    ids=["empty", "truncated", "deep", "list", "UTF-16", "null"],
)
def test_a_config_that_is_no_json_object_is_an_error(text, message, tmp_path) -> None:
    assert error_of(folder_with(tmp_path, text)).startswith(f"/config.json: {message}")


def test_a_preprocessor_config_that_cannot_be_followed_is_an_error(tmp_path) -> None:
    source = write(tmp_path / "hf", "hf")
    path = source / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 2}))
    assert error_of(source).startswith("/preprocessor_config.json: resample is 2, expected 3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "format must be 'internimage_jax' of version 1, got (None, 1)"),
        ({"format_version": 2}, "format must be 'internimage_jax' of version 1, got"),
        ({"config": None}, "config must be a dict, got None"),
        ({"config": {"channels": 8}}, "missing keys 'depths', 'groups'"),
        ({"model": 1}, "model must be a str, got 1"),
        ({"preprocessing": {}}, "image_size is missing"),
    ],
)
def test_a_converted_folder_with_another_config_is_an_error(changes, message, tmp_path) -> None:
    source = convert(write(tmp_path / "hf", "hf"), tmp_path / "converted")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | changes))
    assert error_of(source).startswith(f"/config.json: {message}")
    (source / "config.json").unlink()
    assert error_of(source) == "/config.json: no such file; converted weights need it"


# ---- files


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file or folder"),
        ("empty", "is empty"),
        ("folder", "the folder has none of model.safetensors"),
        ("text", "is no checkpoint"),
    ],
)
def test_a_source_that_is_no_checkpoint_is_an_error(kind, message, tmp_path) -> None:
    source = tmp_path / "source"
    if kind == "folder":
        source.mkdir()
    elif kind != "missing":
        source.write_text("" if kind == "empty" else "hello")
    assert error_of(source).startswith(message)


@pytest.mark.parametrize("layout", ["pth", "dense", "hf-bin", "hf", "converted"])
def test_only_a_training_run_has_a_moving_average(layout, tmp_path) -> None:
    source = write(tmp_path / "source", "hf" if layout == "converted" else layout)
    if layout == "converted":
        source = convert(source, tmp_path / "converted")
    message = error_of(source, model=CONFIG, weights="ema")
    assert message in (
        "has no 'model_ema'; it has model",
        "weights 'ema' are in a training run's file only",
    )
    with pytest.raises(ValueError, match="weights: expected 'model' or 'ema', got 'best'"):
        convert(source, tmp_path / "out", weights="best")  # type: ignore[arg-type]


def test_a_state_dict_with_anything_but_tensors_is_an_error(tmp_path) -> None:
    source = changed(tmp_path, {"levels.0.note": "hello"})
    assert error_of(source, model=CONFIG) == (
        "expected named tensors, got 'levels.0.note', which is no tensor"
    )


def test_a_disk_that_cannot_be_read_is_an_error_that_names_the_file(tmp_path, monkeypatch) -> None:
    class Broken:
        def seek(self, offset: int) -> None:
            pass

        def readinto(self, buffer: memoryview) -> int:
            raise OSError(5, "Input/output error")

    path = tmp_path / "x.pth"
    path.write_bytes(bytes(8))
    file = SourceFile(str(path))
    file.close()
    monkeypatch.setattr(file, "_file", Broken())
    with pytest.raises(CheckpointError, match=r"x\.pth: cannot be read: Input/output error"):
        file.read(0, 8)

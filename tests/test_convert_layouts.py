"""Checkpoints of every layout become the same arrays, and the way back is exact."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import convert, open_model
from convert.rules import rules
from convert.source import _class_names, _preprocessing
from convert.torch_file import open_checkpoint
from convert.torch_writer import write_torch
from internimage_jax.config import InternImageConfig
from internimage_jax.preprocess import Preprocessing
from tests import checkpoint_files as make
from tests.recipe_checkpoints import (
    CONFIG,
    HEAD,
    LAYOUTS,
    assert_same,
    flax_arrays,
    read_converted,
    weights,
    write,
)
from tests.support import reference_config

CASES = [
    *((layout, "tiny_prenorm") for layout in LAYOUTS),
    *((layout, "tiny_postnorm_layerscale") for layout in LAYOUTS),  # gammas have two names
    *((layout, "tiny_bn_relu") for layout in LAYOUTS),  # every norm has statistics and a counter
    ("pth", "tiny_g_like"),
    ("dense", "tiny_g_like"),
    ("hf-shards", "tiny_h_like"),
    ("pth", "tiny_remove_center"),
    ("hf", "tiny_dw5_cfs"),
]


def without_head(config: InternImageConfig) -> dict[str, np.ndarray]:
    arrays = {n: a for n, a in weights(config).items() if not n.startswith(HEAD)}
    return flax_arrays(config.replace(num_classes=0), arrays)


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_every_layout_gives_the_recipes_arrays_transposed(layout, name, tmp_path) -> None:
    config = reference_config(name)
    source = write(tmp_path / "source", layout, config)
    # The config.json of a Hugging Face folder says what the others cannot.
    model = None if layout.startswith("hf") else config
    out = convert(source, tmp_path / "out", model=model)
    assert out == tmp_path / "out"
    wanted = without_head(config) if layout == "dense" else flax_arrays(config)
    assert_same(read_converted(out), wanted)
    expected = config.replace(num_classes=0) if layout == "dense" else config
    settings = settings_of(out)
    assert InternImageConfig.from_dict(settings["config"]) == expected
    kinds = {"pth": "released", "trainer": "trainer", "dense": "dense"}
    assert settings["source"]["layout"] == kinds.get(layout, "huggingface")


@pytest.mark.parametrize("layout", ["pth", "dense", "hf", "hf-shards", "hf-bin"])
def test_a_model_is_read_back_from_its_converted_folder(layout, tmp_path) -> None:
    source = write(tmp_path / "internimage_tiny", layout, CONFIG)
    model = None if layout.startswith("hf") else CONFIG
    first = convert(source, tmp_path / "first", model=model)
    second = convert(first, tmp_path / "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    settings, again = settings_of(first), settings_of(second)
    assert again["source"]["layout"] == "converted"
    for key in ("format", "format_version", "model", "config", "preprocessing", "dtype"):
        assert settings[key] == again[key], key


def test_config_json_holds_all_that_the_model_needs(tmp_path) -> None:
    source = write(tmp_path / "hf", "hf-shards", CONFIG, image_size=96)
    settings = settings_of(convert(source, tmp_path / "out"))
    files = sorted(path for path in source.iterdir() if "safetensors" in path.name)
    index = source / "model.safetensors.index.json"
    files = [index, *(path for path in files if path != index)]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert settings == {
        "format": "internimage_jax",
        "format_version": 1,
        "model": "hf",
        "dtype": "float32",
        "config": CONFIG.to_dict(),
        "preprocessing": Preprocessing(96).to_dict(),
        "source": {
            "layout": "huggingface",
            "weights": "model",
            "files": [
                {"name": path.name, "sha256": digest}
                for path, digest in zip(files, digests, strict=True)
            ],
        },
        "notes": [],
    }


def test_the_moving_average_of_a_training_run_is_read_when_asked_for(tmp_path) -> None:
    source = write(tmp_path / "run.pth", "trainer")
    out = convert(source, tmp_path / "out", model=CONFIG, weights="ema")
    arrays = {n: a * np.float32(1.01) for n, a in weights(CONFIG).items() if a.dtype.kind == "f"}
    assert_same(read_converted(out), flax_arrays(CONFIG, arrays))
    assert settings_of(out)["source"]["weights"] == "ema"


def test_a_detector_of_a_model_without_layer_scales_may_have_them(tmp_path, caplog) -> None:
    # Released detectors and segmenters on T are trained with them, its classifier is not.
    scaled = CONFIG.replace(layer_scale=1.0)
    source = write(tmp_path / "detector.pth", "dense", scaled)
    with caplog.at_level(logging.WARNING, "internimage_jax"):
        out = convert(source, tmp_path / "out", model=CONFIG)
    assert_same(read_converted(out), without_head(scaled))
    settings = settings_of(out)
    assert settings["config"] == scaled.replace(num_classes=0).to_dict()
    assert settings["notes"] == ["read the backbone; left out decode_head"]
    assert caplog.messages == [f"{source}: read the backbone; left out decode_head"]


@pytest.mark.parametrize("entry", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_backbone_is_found_wherever_its_names_are(entry, prefix, tmp_path) -> None:
    arrays = {f"{prefix}backbone.{name}": array for name, array in weights(CONFIG).items()}
    arrays = {name: array for name, array in arrays.items() if "head." not in name}
    average = {"ema_backbone_patch_embed_conv1_bias": np.zeros(4, np.float32)}
    arrays |= {prefix + name: array for name, array in average.items()}
    source = make.write(tmp_path / "detector.pth", make.torch_file(arrays, entry))
    out = convert(source, tmp_path / "out", model=CONFIG)
    assert_same(read_converted(out), without_head(CONFIG))
    assert settings_of(out)["notes"] == ["read the backbone; left out ema_*"]


def test_a_detectors_own_tensors_may_be_called_kernel(tmp_path) -> None:
    arrays = {f"backbone.{n}": a for n, a in weights(CONFIG).items() if "head." not in n}
    arrays["neck.blur.kernel"] = np.zeros((3, 3), np.float32)
    source = make.write(tmp_path / "detector.pth", make.torch_file(arrays, "state_dict"))
    out = convert(source, tmp_path / "out", model=CONFIG)
    assert settings_of(out)["notes"] == ["read the backbone; left out neck"]


def test_a_classifier_may_be_of_data_parallel_training(tmp_path) -> None:
    arrays = {f"module.{name}": array for name, array in weights(CONFIG).items()}
    source = make.write(tmp_path / "parallel.pth", make.torch_file(arrays, "model"))
    out = convert(source, tmp_path / "out", model=CONFIG)
    assert_same(read_converted(out), flax_arrays(CONFIG))


def test_a_detector_lacks_no_layer_scale_that_its_model_has(tmp_path) -> None:
    source = write(tmp_path / "detector.pth", "dense", CONFIG)
    with pytest.raises(ValueError, match=r"10 missing: levels\.#\.blocks\.#\.gamma# \(10\)"):
        convert(source, tmp_path / "out", model=CONFIG.replace(layer_scale=1e-5))


def test_a_state_dict_alone_is_a_released_file(tmp_path) -> None:
    source = make.write(tmp_path / "bare.pth", make.torch_file(weights(CONFIG)))
    assert_same(
        read_converted(convert(source, tmp_path / "out", model=CONFIG)), flax_arrays(CONFIG)
    )


# ---- which model it is


def test_the_files_name_says_which_model_it_is(tmp_path) -> None:
    config = InternImageConfig()  # T
    arrays = {rule.torch: np.ones(rule.torch_shape, np.float16) for rule in rules(config)}
    tensors = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    source = tmp_path / "internimage_t_1k_224.pth"
    write_torch(source, tensors, arrays.values())
    with open_model(source) as opened:
        assert (opened.name, opened.config) == ("internimage_t_1k_224", config)
        assert opened.preprocessing == Preprocessing(224)
    other = source.rename(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"the tensors fit internimage_t_1k_224\); ") as caught:
        convert(other, tmp_path / "out")
    assert "neither a config.json nor the file's name says which model this is" in str(caught.value)
    detector = write(tmp_path / "detector.pth", "dense", config, arrays=arrays)
    with pytest.raises(ValueError, match=r"the tensors fit internimage_t_1k_224\); "):
        convert(detector, tmp_path / "out")
    message = r"does not fit the model \(the tensors fit internimage_t_1k_224\): .*gamma# \(66\)"
    with pytest.raises(ValueError, match=message):
        convert(other, tmp_path / "out", model="internimage_s_1k_224")
    with open_model(other, model="OpenGVLab/internimage_t_1k_224") as opened:
        assert opened.name == "internimage_t_1k_224"


@pytest.mark.parametrize("kind", ["config.json", "folder", "converted", "object"])
def test_the_caller_says_which_model_it_is(kind, tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    folder = write(tmp_path / "hf", "hf")
    if kind == "converted":
        folder = convert(folder, tmp_path / "converted")
    named = {"config.json": str(folder / "config.json"), "object": CONFIG}.get(kind, str(folder))
    out = convert(source, tmp_path / "out", model=named)
    assert_same(read_converted(out), flax_arrays(CONFIG))
    assert settings_of(out)["model"] == ("hf" if kind == "converted" else "weights")
    size = 224 if kind == "object" else 64  # a config alone does not say
    assert settings_of(out)["preprocessing"]["image_size"] == size


def test_a_released_name_means_the_released_model_whatever_folder_is_called_so(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("internimage_t_1k_224"), "hf")
    write(Path("weights.pth"), "pth")
    with pytest.raises(ValueError, match="does not fit the model"):
        convert("weights.pth", "out", model="internimage_t_1k_224")


def test_a_folders_model_has_the_released_name_in_its_config_or_the_callers_or_the_folders(
    tmp_path, monkeypatch
) -> None:
    source = write(tmp_path / "commit", "hf", settings={"_name_or_path": "/home/me/run"})
    with open_model(source) as opened:
        assert opened.name == "commit"
    monkeypatch.chdir(source)
    with open_model("model.safetensors", model=CONFIG) as opened:
        assert opened.name == "commit"
    released = "OpenGVLab/internimage_t_1k_224"
    source = write(tmp_path / "other", "hf", settings={"_name_or_path": released})
    with open_model(source) as opened:
        assert opened.name == "internimage_t_1k_224"


# ---- dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_values_are_rounded_once_and_statistics_stay_exact(dtype, tmp_path) -> None:
    source = write(tmp_path / "weights.pth", "pth")
    out = convert(source, tmp_path / "out", model=CONFIG, dtype=dtype)
    assert settings_of(out)["dtype"] == dtype
    wanted = {
        name: array if name.endswith((".mean", ".var")) and dtype != "float64"
        else array.astype(getattr(ml_dtypes, dtype, dtype))
        for name, array in flax_arrays(CONFIG).items()
    }  # fmt: skip
    with open_checkpoint(out) as checkpoint:
        assert_same({name: t.read() for name, t in checkpoint.tree.items()}, wanted)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.float16, "F16"), (ml_dtypes.bfloat16, "BF16"), (np.float64, "F64")]
)
def test_a_source_may_be_of_any_float(dtype, kind, tmp_path) -> None:
    folder = write(tmp_path / "hf", "hf")
    with open_checkpoint(folder) as checkpoint:
        arrays = {n: t.read() for n, t in checkpoint.tree.items() if t.dtype.kind == "f"}
    entries, data = {}, b""
    for name, array in arrays.items():
        arrays[name] = array = array.astype(dtype)
        ends = [len(data), len(data) + array.nbytes]
        entries[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": ends}
        data += array.tobytes()
    make.write(folder / "model.safetensors", make.safetensors_file(entries, data))
    rounded = {n: np.asarray(a, np.float32).astype(dtype) for n, a in weights(CONFIG).items()}
    wanted = {n: a.astype(np.float32) for n, a in flax_arrays(CONFIG, rounded).items()}
    assert_same(read_converted(convert(folder, tmp_path / "out")), wanted)


# ---- back to PyTorch


def state_dict_of(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        [(entry, tensors)] = checkpoint.tree.items()
        assert entry == "model"
        return {name: tensor.read() for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", [*LAYOUTS, "converted"])
def test_what_is_written_back_is_the_state_dict(layout, tmp_path) -> None:
    source = tmp_path / "source"
    if layout == "converted":
        convert(write(tmp_path / "weights.pth", "pth"), source, model=CONFIG)
    else:
        write(source, layout)
    model = CONFIG if layout in ("pth", "trainer", "dense") else None
    out = convert(source, tmp_path / "back.pth", model=model, to_torch=True)
    wanted = weights(CONFIG)
    if layout == "dense":
        wanted = {name: array for name, array in wanted.items() if not name.startswith(HEAD)}
    for name, array in wanted.items():
        if name.endswith("num_batches_tracked"):
            wanted[name] = np.zeros_like(array)  # a counter of training that nobody reads
    assert_same(state_dict_of(out), wanted)


@pytest.mark.parametrize("name", ["tiny_prenorm", "tiny_bn_relu", "tiny_g_like"])
def test_torch_loads_what_is_written_back(name, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    config = reference_config(name)
    source = write(tmp_path / "weights.pth", "pth", config)
    folder = convert(source, tmp_path / "folder", model=config)
    back = convert(folder, tmp_path / "back.pth", to_torch=True)
    wanted = torch.load(source, weights_only=True)["model"]
    for options in ({}, {"mmap": True}):
        got = torch.load(back, weights_only=True, **options)["model"]
        assert set(got) == set(wanted)
        for key, tensor in wanted.items():
            assert got[key].dtype == tensor.dtype
            assert got[key].is_contiguous()
            assert key.endswith("num_batches_tracked") or torch.equal(got[key], tensor), key


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_torch_loads_every_dtype(dtype, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    source = write(tmp_path / "weights.pth", "pth")
    back = convert(source, tmp_path / "back.pth", model=CONFIG, dtype=dtype, to_torch=True)
    got = torch.load(back, weights_only=True)["model"]
    for name, array in weights(CONFIG).items():
        if array.dtype.kind == "f":
            exact = "running" in name and dtype != "float64"
            wanted = torch.from_numpy(array).to(torch.float32 if exact else getattr(torch, dtype))
            assert torch.equal(got[name], wanted), name


def test_a_released_pth_has_the_image_size_of_its_name(tmp_path) -> None:
    for name, side in (("internimage_l_22kto1k_384", 384), ("internimage_h_22kto1k_640", 640)):
        assert _preprocessing(tmp_path, name, None, None).image_size == side
    assert _preprocessing(tmp_path, "", None, None).image_size == 224


def test_names_of_hugging_face_do_not_count_for_imagenets_classes(tmp_path) -> None:
    def names(count: int) -> tuple[str, ...] | None:
        labels = {"id2label": {str(i): f"class {i}" for i in range(count)}}
        return _class_names(tmp_path, labels, count)

    assert names(3) == ("class 0", "class 1", "class 2")
    assert names(1000) is None and names(21841) is None

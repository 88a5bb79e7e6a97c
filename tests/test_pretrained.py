"""From a name, a file or a folder to a model: the same parameters, dtypes and fresh weights."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import convert
from internimage_jax import initial
from internimage_jax.config import RELEASED, InternImageConfig, ReleasedModel
from internimage_jax.labels import imagenet1k_classes
from internimage_jax.model import InternImage
from internimage_jax.predict import Predictor
from internimage_jax.preprocess import Preprocessing
from internimage_jax.pretrained import create_model, from_pretrained, save_pretrained
from tests.recipe_checkpoints import CONFIG, LAYOUTS, assert_same, flax_arrays, weights, write
from tests.support import arrays_of

PIXELS = np.random.RandomState(0).randint(0, 256, (80, 80, 3)).astype(np.uint8)
HEADS = ("head.", "conv_head.", "clip_head.")


# ---- from_pretrained


@pytest.mark.parametrize("layout", [*LAYOUTS, "converted"])
def test_every_layout_gives_the_same_parameters(layout, tmp_path) -> None:
    source = write(tmp_path / "source", "hf" if layout == "converted" else layout)
    if layout == "converted":
        source = convert(source, tmp_path / "converted")
    named = CONFIG if layout in ("pth", "trainer", "dense") else None
    model = from_pretrained(source, model=named)
    wanted = flax_arrays(CONFIG)
    if layout == "dense":
        wanted = {name: a for name, a in wanted.items() if not name.startswith(HEADS)}
    assert_same(arrays_of(model), wanted)
    assert model.config == (CONFIG.replace(num_classes=0) if layout == "dense" else CONFIG)
    assert model.preprocessing == Preprocessing(224 if named else 64)


def test_the_options_of_the_converter_are_those_of_loading(tmp_path, caplog) -> None:
    source = write(tmp_path / "run.pth", "trainer")
    model = from_pretrained(source, model=CONFIG, weights="ema", num_classes=3)
    got = arrays_of(model)
    np.testing.assert_array_equal(
        got["patch_embed.conv1.bias"], weights(CONFIG)["patch_embed.conv1.bias"] * np.float32(1.01)
    )
    assert got["head.bias"].shape == (3,)
    assert "left out the head of 10 classes; made a new one of 3" in caplog.text
    bare = from_pretrained(source, model=CONFIG, num_classes=0)
    assert not any(name.startswith(HEADS) for name in arrays_of(bare))
    with pytest.raises(ValueError, match="to_1k needs a head of 21841 classes, got one of 10"):
        from_pretrained(source, model=CONFIG, to_1k=True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_have_the_dtype_of_the_computation_unless_said_otherwise(
    dtype, tmp_path
) -> None:
    source = write(tmp_path / "hf", "hf")
    statistics = (".mean", ".var")
    exact = flax_arrays(CONFIG)
    rounded = {n: a if n.endswith(statistics) else a.astype(dtype) for n, a in exact.items()}
    for given, computation, values in (
        ({"dtype": dtype}, dtype, rounded),
        ({"dtype": dtype, "param_dtype": jnp.float32}, dtype, exact),
        ({"param_dtype": dtype}, jnp.float32, rounded),
    ):
        model = from_pretrained(source, **given)
        assert model.dtype == computation
        assert_same(arrays_of(model), values)


def test_fresh_parameters_have_the_dtype_of_the_computation_unless_said_otherwise() -> None:
    config = CONFIG.replace(depths=(1, 1, 1, 1), num_classes=0)
    for given, params in ({}, jnp.bfloat16), ({"param_dtype": jnp.float32}, jnp.float32):
        model = create_model(config, dtype=jnp.bfloat16, **given)
        assert model.dtype == jnp.bfloat16
        assert {array.dtype for array in arrays_of(model).values()} == {np.dtype(params)}


@pytest.mark.usefixtures("x64")
def test_float64_parameters_are_exact(tmp_path) -> None:
    model = from_pretrained(write(tmp_path / "hf", "hf"), dtype=jnp.float64)
    assert_same(arrays_of(model), {n: np.float64(a) for n, a in flax_arrays(CONFIG).items()})


@pytest.mark.parametrize("layout", ["pth", "hf", "converted"])
def test_how_a_model_is_trained_can_be_said_when_it_is_loaded(layout, tmp_path) -> None:
    source = write(tmp_path / "source", "hf" if layout == "converted" else layout)
    if layout == "converted":
        source = convert(source, tmp_path / "converted")
    named = CONFIG if layout == "pth" else None
    model = from_pretrained(source, model=named, drop_path_rate=0.3, with_cp=True)
    assert model.config == CONFIG.replace(drop_path_rate=0.3, with_cp=True)
    assert model.levels[3].blocks[-1:] and model.levels[3].drop_path_rates[-1] == 0.3
    given = CONFIG.replace(drop_rate=0.1, drop_path_rate=0.2, drop_path_type="uniform")
    assert from_pretrained(source, model=given).config == given
    with pytest.raises(ValueError, match=r"drop_path_rate must be in \[0, 1\), got 1.5"):
        from_pretrained(source, model=named, drop_path_rate=1.5)
    fresh = create_model(CONFIG, drop_path_rate=0.3, with_cp=True)
    assert fresh.config == CONFIG.replace(drop_path_rate=0.3, with_cp=True)


def test_the_size_of_a_models_images_can_be_said(tmp_path) -> None:
    source = write(tmp_path / "hf", "hf")
    model = from_pretrained(source, image_size=48)
    assert model.preprocessing == Preprocessing(48)
    save_pretrained(model, tmp_path / "saved")
    assert from_pretrained(tmp_path / "saved").preprocessing == Preprocessing(48)
    assert create_model(CONFIG, image_size=48).preprocessing == Preprocessing(48)
    with pytest.raises(ValueError, match="image_size: got 0, expected"):
        create_model(CONFIG, image_size=0)
    model.preprocessing = Preprocessing(48, resize_size=60)
    save_pretrained(model, tmp_path / "cropped")
    resized = from_pretrained(tmp_path / "cropped", image_size=96).preprocessing
    assert resized == Preprocessing(96, resize_size=120)


# ---- save_pretrained


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_saved_model_is_loaded_as_it_was(tmp_path, param_dtype) -> None:
    config, names = CONFIG.replace(num_classes=7, drop_path_rate=0.1), tuple("abcdefg")
    model = InternImage(
        config,
        rngs=nnx.Rngs(3),
        param_dtype=param_dtype,
        name="flowers",
        preprocessing=Preprocessing(96),
        classes=names,
    )
    assert save_pretrained(model, tmp_path / "saved") == tmp_path / "saved"
    again = from_pretrained(tmp_path / "saved", param_dtype=param_dtype)
    assert (again.name, again.config) == ("flowers", config)
    assert again.preprocessing == Preprocessing(96)
    assert again.classes == names
    assert_same(arrays_of(again), arrays_of(model))
    # The converter takes it too, and so the official code does.
    there = convert(tmp_path / "saved", tmp_path / "saved.pth", to_torch=True, dtype=param_dtype)
    back = from_pretrained(there, model=config, param_dtype=param_dtype)
    assert_same(arrays_of(back), arrays_of(model))
    save_pretrained(again, tmp_path / "saved")  # over what was saved before
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_names_of_classes_come_from_the_caller_or_the_config(tmp_path, caplog) -> None:
    names = [f"flower {i}" for i in range(10)]
    source = write(tmp_path / "hf", "hf")
    config = json.loads((source / "config.json").read_text())

    def with_labels(labels: object) -> Path:
        (source / "config.json").write_text(json.dumps({**config, "id2label": labels}))
        return source

    numbers = {str(i): f"LABEL_{i}" for i in range(10)}
    assert from_pretrained(with_labels(numbers)).classes is None
    labels = dict(sorted(((str(i), name) for i, name in enumerate(names)), reverse=True))
    assert from_pretrained(with_labels(labels)).classes == tuple(names)
    converted = convert(source, tmp_path / "converted")
    model = from_pretrained(converted)
    assert model.classes == tuple(names)
    [prediction] = Predictor(model, topk=10)([PIXELS])
    assert all(one.name == names[one.index] for one in prediction.classes)
    assert from_pretrained(converted, num_classes=3).classes is None
    assert from_pretrained(converted, num_classes=10).classes == tuple(names)
    there = convert(converted, tmp_path / "there.pth", to_torch=True)
    assert from_pretrained(there, model=str(converted)).classes == tuple(names)
    caplog.clear()
    assert from_pretrained(converted, classes=[*"abcdefghij"]).classes == tuple("abcdefghij")
    assert "kept the head, under the names given for its classes" in caplog.text
    of_imagenet = save_pretrained(create_model(CONFIG, num_classes=1000), tmp_path / "1k")
    own = [f"product {i}" for i in range(1000)]
    for classes in ([str(one.wnid) for one in imagenet1k_classes()], own):
        caplog.clear()
        assert from_pretrained(of_imagenet, classes=classes).classes == tuple(classes)
        assert ("kept the head" in caplog.text) == (classes is own)
    three = from_pretrained(converted, classes=["a", "b", "c"])
    assert (three.config.num_classes, three.classes) == (3, ("a", "b", "c"))
    assert create_model(CONFIG, classes=["a", "b"]).config.num_classes == 2
    with pytest.raises(ValueError, match="classes: expected 3 names, got 2"):
        from_pretrained(converted, num_classes=3, classes=["a", "b"])
    for wrong, message in (
        ("ab", "a list of names, got a str"),
        ({"a", "b"}, "a list of names, got a set"),
        (["a", 2], "a list of names, got 2"),
        ([], "at least one name, got none"),
    ):
        with pytest.raises(ValueError, match=f"classes: expected {message}"):
            create_model(CONFIG, classes=wrong)
    for unusable in ({"0": "a", "1": "b"}, {**labels, "9": None}, {**labels, "10": "k"}, []):
        assert from_pretrained(with_labels(unusable)).classes is None
    more = {"num_classes": 12, "id2label": {**labels, "10": "k", "11": "l"}}
    (source / "config.json").write_text(json.dumps({**config, **more}))
    assert from_pretrained(source, num_classes=10).classes is None  # for those are of 12
    settings = json.loads((converted / "config.json").read_text())
    for wrong, message in (
        (["a", "b"], "classes must be 10 names, got 2"),
        ({"0": "a"}, "classes must be a list of names"),
        ([*range(10)], "classes must be a list of names"),
    ):
        (converted / "config.json").write_text(json.dumps({**settings, "classes": wrong}))
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            from_pretrained(converted)


def test_what_cannot_be_saved_is_named_and_nothing_is_left(tmp_path) -> None:
    model = InternImage(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"is not as its config has it; fused models cannot"):
        save_pretrained(model.fused(), tmp_path / "out")
    replaced = InternImage(CONFIG, rngs=nnx.Rngs(0))
    replaced.head = nnx.Linear(replaced.head.in_features, 7, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"got shape \(.*7,?\), expected \(.*10,?\) by model.config"
    ):
        save_pretrained(replaced, tmp_path / "out")
    model.classes = ["only"]
    with pytest.raises(ValueError, match="classes: expected 10 names, got 1"):
        save_pretrained(model, tmp_path / "out")
    model.classes = None
    with pytest.raises(ValueError, match=r"model: .* has no values"):
        save_pretrained(InternImage(CONFIG), tmp_path / "out")
    bias = model.levels[1].blocks[0].mlp.fc1.bias
    bias.set_value(bias[...].at[3].set(jnp.nan))
    with pytest.raises(ValueError, match=r"levels\.1\.blocks\.0\.mlp\.fc1\.bias has values that"):
        save_pretrained(model, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file: is a file"):
        save_pretrained(model, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_module_that_hides_the_converter_is_named(tmp_path: Path) -> None:
    (tmp_path / "convert.py").touch()
    search = os.pathsep.join([str(tmp_path), *sys.path])
    said = f"{tmp_path / 'convert.py'}: hides this package's converter, whose name is convert too"
    for arguments, last in (
        (["-c", "from internimage_jax import from_pretrained"], f"ImportError: {said}"),
        (["-m", "internimage_jax", "demo"], f"error: {said}"),
    ):
        process = subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": search},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 1
        assert process.stderr.splitlines()[-1] == last
        assert ("Traceback" in process.stderr) == (arguments[0] == "-c")


def test_a_model_can_be_pickled() -> None:
    model = InternImage(CONFIG, rngs=nnx.Rngs(0))
    assert_same(arrays_of(pickle.loads(pickle.dumps(model))), arrays_of(model))


def test_a_wrong_name_lists_the_closest() -> None:
    for name in ("internimage_t_1k", "OpenGVLab/internimage_t_1k", "InternImage_T_1K_224"):
        for function in (from_pretrained, create_model):
            message = r"unknown model '.*'; closest: .*_t_1k_224"
            with pytest.raises(ValueError, match=message):
                function(name)


@pytest.mark.parametrize(
    "path", ["models/internimage_t_1k_224", "weights.pth", "model.safetensors", "x.bin", "x.json"]
)
def test_a_path_that_is_not_there_is_no_misspelt_name(path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{path}: no such file or folder$"):
        from_pretrained(path)


def test_another_model_than_named_is_an_error(tmp_path) -> None:
    source = write(tmp_path / "hf", "hf")
    with pytest.raises(ValueError, match="another model than internimage_t_1k_224: channels 8"):
        from_pretrained(source, model="internimage_t_1k_224")


# ---- create_model


@pytest.mark.parametrize("prefix", ["", "OpenGVLab/"])
def test_a_released_model_is_made_by_its_name(prefix, monkeypatch) -> None:
    name = "internimage_l_22kto1k_384"
    small = CONFIG.replace(offset_scale=2.0)
    monkeypatch.setitem(RELEASED, name, ReleasedModel(name, small, 384, "none", None))
    model = create_model(prefix + name, num_classes=5)
    assert model.name == name
    assert model.preprocessing == Preprocessing(384)
    assert model.config == small.replace(num_classes=5)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    first, again, other = (arrays_of(create_model(CONFIG, seed=seed)) for seed in (0, 0, 1))
    assert_same(first, again)
    for name, array in first.items():
        constant = array.min() == array.max()
        assert constant == np.array_equal(array, other[name]), name


def test_a_seed_gives_half_precision_the_weights_of_float32_rounded() -> None:
    full, half = (arrays_of(create_model(CONFIG, seed=1, dtype=d)) for d in ("float32", "bfloat16"))
    for name, array in full.items():
        np.testing.assert_array_equal(half[name], array.astype(half[name].dtype), name)


def test_large_arrays_are_drawn_in_pieces_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "_BLOCKS", (2, 4))  # up to 64 values in twos, more in fours

    def drawn(shape: tuple[int, ...]) -> np.ndarray | jax.Array:
        return initial._draw((jax.random.key(0), 7), shape, np.dtype(np.float32), 0.5)

    for shape, each in (((8, 8), 2), ((7, 13), 4)):
        array = np.asarray(drawn(shape))
        pieces = array.ravel()[: array.size // each * each].reshape(-1, each)
        assert len(np.unique(pieces, axis=0)) == len(pieces)
        traced = jax.jit(drawn, static_argnums=0)(shape)
        np.testing.assert_allclose(array, traced, rtol=1e-6)


def test_no_two_parameters_have_the_same_draws() -> None:
    arrays = [a.ravel()[:16] for a in arrays_of(create_model(CONFIG)).values() if a.std() > 0]
    firsts = {tuple(np.sort(np.abs(a / np.abs(a).max())).round(5)) for a in arrays if a.size == 16}
    assert len(firsts) == sum(a.size == 16 for a in arrays)


def test_fresh_weights_are_distributed_as_the_official_ones() -> None:
    config = InternImageConfig(
        channels=64, depths=(1, 1, 1, 1), groups=(4, 8, 16, 32), layer_scale=1e-5
    )
    arrays = arrays_of(create_model(config.replace(center_feature_scale=True)))
    block = "levels.0.blocks.0."

    def assert_uniform(name: str, bound: float) -> None:
        array = arrays[name]
        assert np.abs(array).max() <= bound
        assert abs(array.std() - bound / 3**0.5) < 0.05 * bound, name
        assert abs(array.mean()) < 0.1 * bound

    # Convolutions: PyTorch's default, uniform within 1 / sqrt(fan-in); biases too.
    assert_uniform("patch_embed.conv2.kernel", (9 * 32) ** -0.5)
    assert_uniform("levels.0.downsample.conv.kernel", (9 * 64) ** -0.5)
    assert_uniform(block + "dcn.dw_conv.conv.kernel", 9**-0.5)
    assert_uniform("conv_head.conv.kernel", 512**-0.5)
    assert np.abs(arrays["patch_embed.conv2.bias"]).max() <= (9 * 32) ** -0.5
    assert arrays["patch_embed.conv2.bias"].std() > 0
    # The projections of DCNv3: Xavier's uniform distribution.
    assert_uniform(block + "dcn.input_proj.kernel", (6 / 128) ** 0.5)
    assert_uniform(block + "dcn.output_proj.kernel", (6 / 128) ** 0.5)
    # Other linear layers: normal with a deviation of 0.02.
    for name in (block + "mlp.fc1.kernel", block + "mlp.fc2.kernel", "head.kernel"):
        assert abs(arrays[name].std() - 0.02) < 0.001
        assert np.abs(arrays[name]).max() > 0.06
    # DCNv3 starts with equal weights, on its grid.
    for name in ("offset", "mask", "center_feature_scale_proj"):
        assert not arrays[f"{block}dcn.{name}.kernel"].any()
        assert not arrays[f"{block}dcn.{name}.bias"].any()
    np.testing.assert_array_equal(arrays[block + "gamma1"], np.full(64, 1e-5, np.float32))
    for name, array in arrays.items():
        if name.endswith((".scale", ".var")):
            np.testing.assert_array_equal(array, np.ones_like(array), err_msg=name)
        elif name.endswith(".mean") or (name.endswith(".bias") and "conv" not in name):
            np.testing.assert_array_equal(array, np.zeros_like(array), err_msg=name)


def test_a_loaded_and_a_fresh_model_have_the_same_state(tmp_path) -> None:
    loaded = nnx.state(from_pretrained(write(tmp_path / "hf", "hf")))
    fresh = nnx.state(create_model(CONFIG))
    assert jax.tree.structure(loaded) == jax.tree.structure(fresh)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(fresh), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert isinstance(a, jax.Array)
        assert isinstance(b, jax.Array)

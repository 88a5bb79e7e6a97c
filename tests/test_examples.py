"""The example of fine-tuning: it learns, its model is one to predict and evaluate with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

import internimage_jax
from examples import finetune
from internimage_jax import create_model, from_pretrained, save_pretrained
from internimage_jax.config import NUM_CLASSES_22K
from internimage_jax.evaluate import evaluate
from internimage_jax.labels import CLASSES_WITHOUT_22K, imagenet1k_classes, map_22k_to_1k
from internimage_jax.preprocess import Preprocessing
from tests.support import SMALLEST

TINTS = {"fig": (90, 40, 120), "lemon": (220, 210, 40), "plum": (40, 40, 160)}


def photos(folder: Path, count: int, seed: int) -> Path:
    """Writes noisy photos of one tint a class."""
    random = np.random.default_rng(seed)
    for name, tint in TINTS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            size = (*random.integers(40, 60, 2), 3)
            pixels = np.clip(tint + random.normal(0, 30, size), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = create_model(SMALLEST, image_size=64, seed=3)
    return save_pretrained(model, tmp_path_factory.mktemp("model") / "before")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("data") / "train", 9, 0)


def test_it_learns_and_is_evaluated(
    checkpoint: Path,
    train: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finetune, "EVERY", 4)
    mine, val = tmp_path / "mine", photos(tmp_path / "val", 4, 1)
    (val / "fig" / "broken.png").write_bytes(b"no image")
    mine.mkdir()  # an empty folder is no other model
    options = "--epochs 4 --batch-size 4 --learning-rate 2e-3 --image-size 32"
    named = ["--model", str(checkpoint), "--validate", str(val)]
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        finetune.main([str(train), str(mine), *named, *options.split()])
    said = capsys.readouterr().out
    device_count = f"{jax.device_count()} device(s)"
    assert said.startswith(f"27 images of 3 classes, {device_count}, 6 steps an epoch\n")
    assert re.findall(r"^  step (\d)/6: loss \S+, rate (\S+)$", said, re.M)[1] == ("4", "1.5e-03")
    losses = [float(found) for found in re.findall(r"epoch \d/4: loss (\S+),", said)]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    top1 = re.findall(rf"top-1 on {val}: (\S+) %, not read: 1\n", said)
    top1 = [float(found) for found in top1]
    assert len(top1) == 4 and 80 < top1[-1] <= 100

    model = from_pretrained(mine)
    assert model.classes == tuple(TINTS) and model.preprocessing.image_size == 32
    report = evaluate(mine, val, batch_size=4, on_error="skip")
    assert report["top1"] == pytest.approx(top1[-1], abs=0.01)


def test_crops_are_parts_of_the_image() -> None:
    gradient = np.zeros((50, 70, 3), np.uint8)
    gradient[..., 0] = np.arange(70) * 3
    gradient[..., 1] = np.arange(50)[:, None] * 5
    image = Image.fromarray(gradient)
    mirrored = 0
    for seed in range(50):
        crop = finetune.random_crop(image, 16, np.random.default_rng(seed)).astype(int)
        assert crop.shape == (16, 16, 3) and (np.diff(crop[..., 1], axis=0) >= 0).all()
        across = np.diff(crop[..., 0], axis=1)
        assert (across >= 0).all() or (across <= 0).all()
        mirrored += (across <= 0).all()
    assert 10 < mirrored < 40
    strip = Image.new("RGB", (300, 2), (9, 9, 9))
    assert (finetune.random_crop(strip, 8, np.random.default_rng(0)) == 9).all()


def test_order_and_crops_are_of_the_seed_and_the_epoch(train: Path) -> None:
    dataset = finetune.open_dataset(train, class_names=list(TINTS))

    def epoch(number: int, seed: int) -> list[finetune.Batch]:
        return list(finetune.random_batches(dataset, 16, 5, number, seed))

    first, again = epoch(1, 0), epoch(1, 0)
    assert [labels.shape for _, labels in first] == [(5,)] * 5  # of 27 images two are left out
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    for other in (epoch(2, 0), epoch(1, 1)):
        assert not np.array_equal(first[0][0], other[0][0])


def test_options_reach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        pass

    def load(name: str, **options: Any) -> None:
        raise Begun({"model": name, **options})

    monkeypatch.setattr(internimage_jax, "from_pretrained", load)

    def begun(*options: str) -> dict[str, Any]:
        with pytest.raises(Begun) as caught:
            finetune.main([str(data), str(tmp_path / "mine"), "--batch-size", "4", *options])
        assert not (tmp_path / "mine").exists()
        return caught.value.args[0]

    data = photos(tmp_path / "data", 2, 0)
    for hidden in (".git", "__MACOSX", "fig/.ipynb_checkpoints"):  # are no classes
        (data / hidden).mkdir()
    wanted = {"classes": list(TINTS), "param_dtype": "float32", "image_size": None}
    by_default = {"model": "internimage_t_1k_224", "drop_path_rate": 0.1, "with_cp": False}
    found = begun()
    assert found.pop("dtype") == ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    assert found == wanted | by_default
    given = {"model": "mine", "drop_path_rate": 0.3, "with_cp": True, "dtype": "bfloat16"}
    options = "--model mine --drop-path-rate 0.3 --recompute --dtype bfloat16 --image-size 96"
    assert begun(*options.split()) == wanted | given | {"image_size": 96}


def test_each_step_has_a_key_and_each_epoch_an_order_of_its_own(
    checkpoint: Path, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = 1.0

    def make(*_: Any) -> Any:
        def step(params, statistics, state, pixels, labels, key, rate):
            seen.append((labels.tolist(), jax.random.key_data(key).tolist()))
            return params, statistics, state, np.float32(loss)

        return step

    monkeypatch.setattr(finetune, "make_step", make)
    options = f"--model {checkpoint} --image-size 32 --batch-size 8 --epochs 2"

    def steps(out: str, seed: str) -> list[tuple[list[int], list[int]]]:
        seen.clear()
        finetune.main([str(train), str(tmp_path / out), *options.split(), "--seed", seed])
        return list(seen)

    seen: list[tuple[list[int], list[int]]] = []
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        first, again, other = steps("a", "0"), steps("b", "0"), steps("c", "1")
        assert len(first) == 6 and first == again
        assert len({tuple(key) for _, key in [*first, *other]}) == 12
        assert [labels for labels, _ in first[:3]] != [labels for labels, _ in first[3:]]
        loss = float("nan")
        with pytest.raises(SystemExit, match="error: the loss is nan; try a smaller"):
            steps("d", "0")
    assert not (tmp_path / "d").exists()


def test_it_goes_on_after_a_kill(
    checkpoint: Path,
    train: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To the same bytes, whether a state was written in the midst of an epoch or at its end."""
    end = 99

    def make(*_: Any) -> Any:
        def step(params, statistics, state, pixels, labels, key, rate):
            if len(seen) == end:
                raise KeyboardInterrupt
            seen.append(labels)
            moved = rate * jax.random.uniform(key) + pixels.mean() / 1e4
            params = jax.tree.map(lambda p: p + moved, params)
            return params, statistics, jax.tree.map(lambda s: s + 1, state), moved

        return step

    monkeypatch.setattr(finetune, "make_step", make)
    monkeypatch.setattr(finetune, "SAVE_EVERY", 0.0)
    options = f"--model {checkpoint} --image-size 32 --batch-size 8 --epochs 2"

    def run(name: str, *more: str) -> None:
        seen.clear()
        finetune.main([str(train), str(tmp_path / name), *options.split(), *more])

    def weights(name: str) -> bytes:
        return (tmp_path / name / "model.safetensors").read_bytes()

    seen: list[Any] = []
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        run("whole", "--resume")  # with nothing to go on from it begins
        assert len(seen) == 6
        # At 3 the state of an epoch's end is there, whose model may not be.
        for end, model_is_there in ((1, False), (3, True), (5, True)):
            name = f"after {end}"
            with pytest.raises(SystemExit, match="130"):
                run(name)
            assert (tmp_path / name).exists() == model_is_there
            stopped, end = end, 99
            with pytest.raises(SystemExit, match=f"{name}.unfinished: of a run .* --resume goes"):
                run(name)
            with pytest.raises(SystemExit, match=r"size: got 4, expected 8, as in .*\.unf"):
                run(name, "--resume", "--batch-size", "4")
            capsys.readouterr()
            if stopped == 3:
                (tmp_path / name / "model.safetensors").unlink()
            run(name, "--resume")
            assert f"goes on after {stopped} of 6 steps\n" in capsys.readouterr().out
            assert len(seen) == 6 - stopped
            assert weights(name) == weights("whole")
            assert not (tmp_path / f"{name}.unfinished").exists()


def test_a_step_trains_smooths_labels_and_returns_new_statistics() -> None:
    class Biases(nnx.Module):
        def __init__(self) -> None:
            self.bias = nnx.Param(jnp.zeros(3))
            self.steps = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, images: jax.Array, *, train: bool, key: jax.Array) -> jax.Array:
            assert train and images.dtype == jnp.float32
            self.steps[...] += 1
            return jnp.tile(self.bias[...][None] + jax.random.uniform(key), (len(images), 1))

    graph, params, statistics = nnx.split(Biases(), nnx.Param, ...)
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        optimizer = optax.identity()
        step = finetune.make_step(graph, optimizer, Preprocessing(4), 0.1)
        pixels, labels = np.zeros((2, 4, 4, 3), np.uint8), np.array([1, 1], np.int32)
        state, key = optimizer.init(params), jax.random.key(0)
        batch = pixels, labels, key, np.float32(0.3)
        params, statistics, state, loss = step(params, statistics, state, *batch)
        assert float(loss) == pytest.approx(np.log(3), rel=1e-5)
        wanted = np.array([0, 1, 0]) * 0.9 + 0.1 / 3
        np.testing.assert_allclose(params["bias"][...], 0.3 * (wanted - 1 / 3), rtol=1e-5)
        assert float(statistics["steps"][...]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "28"], "batch size: got 28, expected at most 27"),
        (["--batch-size", "0"], "batch size: got 0"),
        (["--epochs", "0"], "epochs: got 0, expected at least 1"),
        (["--learning-rate", "-1"], "learning rate: got -1.0, expected more than 0"),
        (["--weight-decay", "nan"], "weight decay: got nan"),
        (["--label-smoothing", "1"], "label smoothing: got 1.0, expected 0 to less than 1"),
        (["--layer-decay", "2"], "layer decay: got 2.0"),
        (["--offset-rate", "-1"], "offset rate: got -1.0"),
        (["--seed", "-1"], "seed: got -1"),
        (["--batch-size", "4", "--to-1k"], "to-1k: .*train has not the class folders of Image"),
        (["--model", "internimage_q", "--batch-size", "4"], "internimage_q"),
    ],
)
def test_bad_input(
    checkpoint: Path, train: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    arguments = [str(train), str(tmp_path / "mine"), "--model", str(checkpoint), *options]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        finetune.main(arguments)
    assert not (tmp_path / "mine").exists()


def test_folders_that_are_not_what_they_should_be(train: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str, out: str = "mine") -> None:
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            finetune.main([str(folder), str(tmp_path / out), "--model", "not looked at"])
        assert not (tmp_path / "mine").exists()

    (tmp_path / "file").write_text("")
    refused(train, "is there already; choose another name", out="")
    refused(train, "Not a directory", out="file/mine")
    refused(tmp_path / "nothing", "No such file")
    refused(train.parent, "expected two class folders or more, got 1")
    photos(tmp_path / "data" / "other", 1, 0)
    photos(tmp_path / "data" / "train", 1, 0)
    refused(tmp_path / "data", "a folder in a class folder")
    loose = photos(tmp_path / "loose", 1, 0)
    (loose / "fig" / "0.png").rename(loose / "0.png")
    refused(loose, r"outside the class folders there is image 0\.png")
    (loose / "0.png").unlink()
    refused(loose, "fig: no images of this class")


def test_matrices_decay_and_vectors_do_not() -> None:
    params = {"kernel": jax.numpy.ones((2, 2)), "bias": jax.numpy.ones(2)}
    optimizer = finetune.adamw(0.1, {"kernel": 1.0, "bias": 1.0})
    nothing = jax.tree.map(jax.numpy.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], 0.1, rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_the_learning_rate_rises_and_falls() -> None:
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        assert finetune.learning_rates(0.5, 1) == pytest.approx([0.5])
        rates = finetune.learning_rates(0.5, 40)
    assert rates[:3] == pytest.approx([0.5 / 3, 0.5 * 2 / 3, 0.5], rel=1e-5)
    assert len(rates) == 40 and all(np.diff(rates[2:]) < 0) and 0 < rates[-1] < 0.01


def test_each_layer_has_its_share_of_the_rate() -> None:
    """By the official rule, whose table goes from the last layer to the first."""
    config = SMALLEST.replace(depths=(1, 2, 3, 1), center_feature_scale=True)
    params = nnx.state(create_model(config), nnx.Param)
    table, count = {}, 0
    for level in (3, 2, 1, 0):
        for layer in reversed(range(config.depths[level])):
            table[f"levels.{level}.blocks.{layer}."] = 0.5**count
            count += 1
    table["patch_embed"] = table["levels.0.blocks.0."]
    for level in range(3):
        for part in ("downsample", "norm"):
            table[f"levels.{level}.{part}"] = table[f"levels.{level + 1}.blocks.0."]
    shares = finetune.shares_of_rate(params, config.depths, 0.5, 0.1)
    optimizer = finetune.adamw(0.0, shares)
    ones = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        updates, _ = optimizer.update(ones, optimizer.init(params), params)
    seen = set()
    for path, update in nnx.to_flat_state(updates):
        name = ".".join(map(str, path))
        wanted = next((share for begin, share in table.items() if name.startswith(begin)), 1.0)
        if ".offset." in name or ".center_feature_scale_proj." in name:
            wanted *= 0.1
        np.testing.assert_allclose(update.get_value(), wanted, rtol=1e-4)
        seen.add(round(wanted, 6))
    assert len(seen) > 10


def test_of_22k_the_classes_of_imagenet_are_kept_and_none_is_masked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = [one.wnid for one in imagenet1k_classes()]
    source = create_model(SMALLEST, num_classes=NUM_CLASSES_22K, seed=5)
    folder = save_pretrained(source, tmp_path / "22k")

    def head(*options: str) -> nnx.Linear:
        arguments = finetune.make_parser().parse_args(
            ["in", "out", "--model", str(folder), *options]
        )
        model = finetune.load_model(arguments, classes)
        assert model.config.num_classes == 1000 and model.classes is None
        return model.head

    rows, without = map_22k_to_1k(), list(CLASSES_WITHOUT_22K)
    kept, new = head("--to-1k"), head()
    others = np.setdiff1d(np.arange(1000), without)
    wanted = source.head.kernel[...][:, rows]
    np.testing.assert_array_equal(kept.kernel[...][:, others], wanted[:, others])
    np.testing.assert_array_equal(kept.bias[...][np.array(without)], 0)
    assert not np.array_equal(new.kernel[...][:, others], wanted[:, others])

    for wnid in classes:
        (tmp_path / "data" / str(wnid)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / str(wnid) / "black.png")
    data, mine = str(tmp_path / "data"), str(tmp_path / "mine")
    options = ["--to-1k", "--epochs", "1", "--batch-size", "500", "--image-size", "32"]
    with jax.numpy_dtype_promotion("standard"):  # optax wants it
        finetune.main([data, mine, "--model", str(folder), "--validate", data, *options])
    assert f"top-1 on {data}: 0.10 %\n" in capsys.readouterr().out

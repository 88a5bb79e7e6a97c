"""Prediction: one compilation for any number of images, in order, errors that name the image."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from internimage_jax.commands.demo import write_checkpoint
from internimage_jax.config import InternImageConfig
from internimage_jax.image_files import IMAGE_SUFFIXES, find_images
from internimage_jax.model import InternImage
from internimage_jax.normalize import normalize
from internimage_jax.predict import Predictor
from internimage_jax.preprocess import load_image, resize_and_crop
from internimage_jax.pretrained import from_pretrained

CONFIG = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), num_classes=12)
CAT = resources.files("internimage_jax") / "data_files" / "cat.jpg"
BATCH = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InternImage:
    folder = tmp_path_factory.mktemp("model") / "released"
    write_checkpoint(folder, CONFIG, image_size=32)
    return from_pretrained(folder)


@pytest.fixture(scope="module")
def predictor(model: InternImage) -> Predictor:
    return Predictor(model, batch_size=BATCH, topk=12)


def noise(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (40, 50, 3)).astype(np.uint8)


def write_images(folder: Path, count: int) -> list[str]:
    paths = [str(folder / f"{i}.png") for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(noise(i)).save(path)
    return paths


def test_a_head_of_other_classes_than_the_config_says_is_an_error(model: InternImage) -> None:
    other = nnx.merge(*nnx.split(model))
    other.head = nnx.Linear(other.head.in_features, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^model: its head makes 5 logits, expected 12 by model"):
        Predictor(other, batch_size=1)


def test_probabilities_are_the_softmax_of_the_logits(
    model: InternImage, predictor: Predictor
) -> None:
    [prediction] = predictor([noise(0)])
    pixels = resize_and_crop(load_image(noise(0)), model.preprocessing)
    images = normalize(pixels, model.preprocessing)[None]
    graph, state = nnx.split(model)
    logits = jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)[0]
    logits = np.asarray(logits, np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    assert [one.index for one in prediction.classes] == np.argsort(-expected).tolist()
    found = [one.probability for one in prediction.classes]
    np.testing.assert_allclose(found, np.sort(expected)[::-1], rtol=1e-4)
    assert {(one.wnid, one.name) for one in prediction.classes} == {
        (None, f"class {i}") for i in range(12)
    }


def test_order_is_kept_and_padding_changes_no_answer(predictor: Predictor, tmp_path: Path) -> None:
    paths = write_images(tmp_path, 7)  # two batches of three, and one
    together = list(predictor(paths))
    assert [one.file for one in together] == paths
    assert len({one.classes for one in together}) == 7
    for path, expected in zip(paths, together, strict=True):
        [alone] = predictor([path])
        assert [one.index for one in alone.classes] == [one.index for one in expected.classes]
        probabilities = [one.probability for one in expected.classes]
        np.testing.assert_allclose([one.probability for one in alone.classes], probabilities, 1e-4)


def test_nothing_is_compiled_after_the_first_compilation(model: InternImage) -> None:
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    model.fused()  # may try the kernels first, which is not what is counted
    jax.monitoring.register_event_duration_secs_listener(listen)
    predictor = Predictor(model, batch_size=2, topk=1)
    assert len(compilations) == 1
    for count in (1, 2, 5):
        assert len(list(predictor([noise(i) for i in range(count)]))) == count
    assert len(compilations) == 1


def test_without_jit_the_answers_are_the_same(model: InternImage, predictor: Predictor) -> None:
    (wanted,) = predictor([noise(3)])
    with jax.disable_jit():
        (got,) = Predictor(model, batch_size=1, topk=12)([noise(3)])
    assert [c.name for c in got.classes] == [c.name for c in wanted.classes]
    for a, b in zip(got.classes, wanted.classes, strict=True):
        assert a.probability == pytest.approx(b.probability, rel=1e-4)


def test_a_predictor_keeps_the_parameters_that_it_began_with(model: InternImage) -> None:
    graph, state = nnx.split(model)
    changed = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
    predictor = Predictor(changed, batch_size=1, topk=3)
    nnx.update(changed, state)  # vectors, which are constants in it, and kernels
    [prediction] = predictor([noise(1)])
    probabilities = [one.probability for one in prediction.classes]
    np.testing.assert_allclose(probabilities, [1 / model.config.num_classes] * 3, rtol=1e-6)


def test_every_kind_of_source_gives_the_same_prediction(predictor: Predictor) -> None:
    with resources.as_file(CAT) as path, path.open("rb") as file, Image.open(path) as image:
        sources = [str(path), path, path.read_bytes(), file, image, np.asarray(image)]
        predictions = list(predictor(sources))
    named = ["image 2", "image 3", "image 4", "image 5"]
    assert [one.file for one in predictions] == [str(path), str(path), *named]
    assert {one.classes for one in predictions} == {predictions[0].classes}


def test_no_images_give_no_predictions(predictor: Predictor) -> None:
    assert list(predictor([])) == []


def test_a_broken_image_is_an_error_that_names_it_after_the_batches_before_it(
    predictor: Predictor, tmp_path: Path
) -> None:
    paths = write_images(tmp_path, 8)
    Path(paths[4]).write_bytes(Path(paths[4]).read_bytes()[:100])
    predictions = predictor(paths)
    assert [one.file for one in itertools.islice(predictions, 3)] == paths[:3]
    with pytest.raises(ValueError, match=r"4\.png: "):
        next(predictions)
    assert not decoding_threads()


def test_a_broken_image_can_be_skipped_and_has_its_error_in_its_place(
    predictor: Predictor, tmp_path: Path
) -> None:
    paths = write_images(tmp_path, 5)
    whole = list(predictor(paths))
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:100])
    Path(paths[4]).unlink()
    predictions = list(predictor(paths, on_error="skip"))
    assert [one.file for one in predictions] == paths
    assert predictions[1].classes == predictions[4].classes == ()
    assert predictions[1].error is not None
    assert predictions[1].error.startswith(f"{paths[1]}: ")
    assert predictions[4].error == f"{paths[4]}: no such file"
    assert [predictions[i] for i in (0, 2, 3)] == [whole[i] for i in (0, 2, 3)]


def test_what_to_do_about_a_broken_image_is_one_of_two_words(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="on_error: got 'ignore', expected 'fail' or 'skip'"):
        predictor([noise(0)], on_error="ignore")  # type: ignore[arg-type]


def test_an_image_in_memory_is_named_by_its_position(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match=r"^image 1: the file is empty$"):
        list(predictor([noise(0), b""]))


def test_a_missing_image_is_an_error_that_names_it(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such file"):
        list(predictor([str(tmp_path / "none.png")]))


def test_endless_images_are_read_a_bounded_number_ahead_and_stop_when_the_caller_does(
    predictor: Predictor,
) -> None:
    read = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal read
        while True:
            read += 1
            yield noise(read)

    predictions = predictor(endless())
    next(predictions)
    assert BATCH < read <= 4 * BATCH
    predictions.close()  # type: ignore[attr-defined]
    assert not decoding_threads()


def decoding_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("decode")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 13}, "topk: got 13, expected 1 to 12"),
        ({"topk": 0}, "topk: got 0, expected 1 to 12"),
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
    ],
)
def test_numbers_out_of_range_are_named(
    model: InternImage, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(model, **options)


def test_a_model_without_classes_cannot_predict() -> None:
    with pytest.raises(ValueError, match="no classes"):
        Predictor(InternImage(CONFIG.replace(num_classes=0)))


def test_a_single_image_in_place_of_several_is_an_error(predictor: Predictor) -> None:
    for single in ("cat.jpg", Path("cat.jpg"), b"", noise(0), Image.fromarray(noise(0))):
        with pytest.raises(ValueError, match="expected several images"):
            predictor(single)  # type: ignore[arg-type]


def test_an_output_that_is_not_finite_is_an_error_that_names_the_image(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [array * np.float32("nan") for array in predictor._arguments]
    monkeypatch.setattr(predictor, "_arguments", broken)
    with pytest.raises(ValueError, match="image 0: the model's output is not finite"):
        list(predictor([noise(0)]))
    compiled = predictor._compiled

    def last_is_nan(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        probabilities, classes = map(np.array, compiled(*arguments))
        probabilities[0, -1] = np.nan
        return probabilities, classes

    monkeypatch.undo()
    monkeypatch.setattr(predictor, "_compiled", last_is_nan)
    with pytest.raises(ValueError, match="image 0: the model's output is not finite"):
        list(predictor([noise(0)]))


# Folders


def test_a_folder_stands_for_all_images_below_it_sorted(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/c/1.jpeg", "a.JPEG", "z.webp", "notes.txt", ".x.png", ".git/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [str(tmp_path / name) for name in ("a.JPEG", "b/2.PNG", "b/c/1.jpeg", "z.webp")]
    assert find_images([tmp_path]) == expected
    named = [tmp_path / "notes.txt", tmp_path / "b" / "c"]  # in the order they are named in
    assert find_images(named) == [str(named[0]), expected[2]]


def test_a_folder_that_links_to_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    os.symlink(tmp_path, tmp_path / "loop")
    assert find_images([tmp_path]) == [str(tmp_path / "a.png")]


def test_a_folder_without_images_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=f"^{tmp_path}: no image"):
        find_images([tmp_path])


@pytest.mark.parametrize(("path", "name"), [("none", "none"), ("", "''"), ("a\nb", r"'a\\nb'")])
def test_a_missing_path_is_an_error_that_names_it_on_one_line(path: str, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such file or folder$"):
        find_images([path])


def test_pil_can_read_what_counts_as_an_image() -> None:
    known = Image.registered_extensions()
    Image.init()
    assert set(IMAGE_SUFFIXES) - {".avif", ".jp2"} <= {
        suffix for suffix, kind in known.items() if kind in Image.OPEN
    }

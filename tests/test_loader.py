"""The input pipeline: every image once, in order, whatever fails; and no thread left behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internimage_jax.data import Dataset, open_dataset
from internimage_jax.loader import Batch, load_batches, map_ahead, prefetch_to_device
from internimage_jax.preprocess import Preprocessing, preprocess
from tests.dataset_files import TENCH, encoded, write_folder, write_tar

SIDE = 8
COUNT = 11
BROKEN = {2: b"", 7: encoded(7)[:200]}  # empty, and cut off


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    # Wide and tall, so that both axes are resized and cropped.
    files = {f"{TENCH}/{i:02}.jpg": encoded(i, (20, 30 - 2 * i)) for i in range(COUNT)}
    return open_dataset(write_tar(tmp_path_factory.mktemp("data") / "x.tar", files))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    files = {f"{TENCH}/{i:02}.jpg": BROKEN.get(i, encoded(i)) for i in range(COUNT)}
    return open_dataset(write_folder(tmp_path_factory.mktemp("damaged"), files))


def load(dataset: Dataset, indices: Any = range(COUNT), size: int = 4, **options: Any) -> Any:
    return load_batches(dataset, Preprocessing(SIDE), indices, batch_size=size, **options)


def decoding_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("decode")]


@pytest.mark.parametrize("size", [1, 4, 11, 16])
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_have_every_image_in_order_and_zeros_after_the_last(
    dataset: Dataset, size: int, workers: int
) -> None:
    indices = [*range(COUNT - 1, -1, -1), 3, 3]  # any order, and an image again
    batches = list(load(dataset, np.array(indices), size, workers=workers))
    assert len(batches) == -(-len(indices) // size)
    assert all(batch.pixels.shape == (size, SIDE, SIDE, 3) for batch in batches)
    assert all(batch.pixels.dtype == np.uint8 and batch.failed == () for batch in batches)
    numbers = np.concatenate([batch.indices for batch in batches])
    assert numbers.dtype == np.int64
    assert numbers.tolist() == indices + [-1] * (len(numbers) - len(indices))
    pixels = np.concatenate([batch.pixels for batch in batches])
    for i, image in zip(numbers, pixels, strict=True):
        expected = preprocess(dataset.read(i), Preprocessing(SIDE)) if i >= 0 else 0
        np.testing.assert_array_equal(image, expected)
    assert not decoding_threads()


def test_no_indices_give_no_batches(dataset: Dataset) -> None:
    assert list(load(dataset, [])) == []


def test_a_corrupt_image_is_an_error_that_names_it_after_the_batches_before_it(
    damaged: Dataset,
) -> None:
    batches = load(damaged, range(3, COUNT))
    assert next(batches).indices.tolist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match=rf"^{TENCH}/07\.jpg: cannot be decoded \("):
        next(batches)
    assert not decoding_threads()


def test_corrupt_images_are_skipped_and_listed_on_demand(damaged: Dataset) -> None:
    batches: list[Batch] = list(load(damaged, on_error="skip"))
    assert [batch.indices.tolist() for batch in batches] == [
        [0, 1, 3, -1],
        [4, 5, 6, -1],
        [8, 9, 10, -1],
    ]
    (empty,), (cut,), none = [batch.failed for batch in batches]
    assert empty == (2, f"{TENCH}/02.jpg: the file is empty") and none == ()
    assert cut[0] == 7 and cut[1].startswith(f"{TENCH}/07.jpg: cannot be decoded (")
    assert not batches[0].pixels[3].any()
    # A batch of nothing but failures is there, so that none is lost and batches can be counted.
    [batch] = load(damaged, [2, 7], on_error="skip")
    assert batch.indices.tolist() == [-1] * 4 and [i for i, _ in batch.failed] == [2, 7]


def test_a_file_that_vanishes_is_skipped_too(tmp_path: Path) -> None:
    dataset = open_dataset(write_folder(tmp_path, {f"{TENCH}/a.jpg": encoded(0)}))
    (tmp_path / TENCH / "a.jpg").unlink()
    [batch] = load(dataset, [0], on_error="skip")
    assert batch.failed == ((0, f"{TENCH}/a.jpg: no such file"),)
    with pytest.raises(FileNotFoundError, match=f"^{TENCH}/a.jpg: no such file$"):
        list(load(dataset, [0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "batch_size: got 0, expected at least 1"),
        ({"workers": 0}, "workers: got 0, expected at least 1"),
        ({"on_error": "ignore"}, "on_error: got 'ignore', expected 'fail' or 'skip'"),
        ({"indices": [0, COUNT]}, "indices: got 11, expected 0 to 10"),
        ({"indices": [-1]}, "indices: got -1, expected 0 to 10"),
    ],
)
def test_numbers_out_of_range_are_errors_at_once(
    dataset: Dataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(dataset, **options)


def test_a_caller_that_stops_early_leaves_no_thread(dataset: Dataset) -> None:
    batches = load(dataset, list(range(COUNT)) * 100)
    next(batches)
    assert decoding_threads()
    batches.close()
    assert not decoding_threads()


def test_results_ahead_are_bounded_and_computed_at_once() -> None:
    asked = 0
    meeting = threading.Barrier(3, timeout=20)

    def endless() -> Iterator[int]:
        nonlocal asked
        for i in itertools.count():
            asked += 1
            yield i

    def function(i: int) -> int:
        if i < 3:
            meeting.wait()  # passed only if three threads are here together
        return 2 * i

    results = map_ahead(function, endless(), workers=3, ahead=10)
    assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
    assert asked == 14
    results.close()
    assert not decoding_threads()


def test_an_interrupt_leaves_no_thread(dataset: Dataset) -> None:
    def interrupted() -> Iterator[int]:
        yield from range(COUNT)
        raise KeyboardInterrupt

    results = map_ahead(lambda i: i, interrupted(), workers=2, ahead=5)
    with pytest.raises(KeyboardInterrupt):
        list(results)
    assert not decoding_threads()


def test_the_next_batch_is_put_before_it_is_asked_for() -> None:
    put: list[int] = []

    def remember(i: int) -> str:
        put.append(i)
        return str(i)

    results = prefetch_to_device(range(5), remember, ahead=2)
    assert next(results) == "0" and put == [0, 1, 2]
    assert list(results) == ["1", "2", "3", "4"] and put == [0, 1, 2, 3, 4]
    assert list(prefetch_to_device([], remember)) == []
    with pytest.raises(ValueError, match="ahead: got -1, expected 0 or more"):
        next(prefetch_to_device([1], remember, ahead=-1))


def test_what_was_put_before_an_error_is_yielded_before_it(damaged: Dataset) -> None:
    results = prefetch_to_device(load(damaged, range(3, COUNT)), lambda batch: batch.indices)
    assert next(results).tolist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"07\.jpg"):
        next(results)


def test_closing_the_prefetch_closes_the_pipeline(dataset: Dataset) -> None:
    results = prefetch_to_device(load(dataset, list(range(COUNT)) * 100), lambda batch: batch)
    next(results)
    results.close()
    assert not decoding_threads()


def test_what_is_put_ahead_is_closed_with_it() -> None:
    closed = []

    def batches() -> Iterator[int]:
        try:
            yield from range(9)
        finally:
            closed.append(True)

    source = batches()
    put = prefetch_to_device(source, lambda batch: batch)
    assert next(put) == 0
    put.close()
    assert closed == [True]

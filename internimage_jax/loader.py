"""The input pipeline: images decoded ahead in threads, in order, in batches of one shape.

Threads, not processes: PIL lets go of the interpreter's lock while it decodes and resizes, which
is nearly all there is to do, and pixels need no copy from one process to another.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np

from internimage_jax.messages import one_line
from internimage_jax.preprocess import Preprocessing, preprocess

if TYPE_CHECKING:
    from internimage_jax.data import Dataset

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batch(NamedTuple):
    """Images that are ready for the model.

    Args:
        pixels: uint8 (batch_size, image_size, image_size, 3), RGB, zeros where there is no image.
        indices: int64 (batch_size,), the images' positions in the data set; -1 where there is no
            image, which is after the last one only.
        failed: Position and one-line message of each image that could not be read. It would have
            been in this batch.
    """

    pixels: np.ndarray
    indices: np.ndarray
    failed: tuple[tuple[int, str], ...]


def load_batches(
    dataset: Dataset,
    preprocessing: Preprocessing,
    indices: Sequence[int],
    *,
    batch_size: int,
    workers: int | None = None,
    on_error: Literal["fail", "skip"] = "fail",
) -> Generator[Batch, None, None]:
    """Returns a generator over batches of images, while threads decode those that follow.

    There are `ceil(len(indices) / batch_size)` batches whatever happens: batch i has the images of
    `indices[i * batch_size : (i + 1) * batch_size]`, in that order, less those that failed. The
    images ahead, decoded or being decoded, are two batches (four times `workers` if that is more).

    Args:
        dataset: Where to read.
        preprocessing: The size of the images.
        indices: Positions in `dataset`, in the order to read them.
        batch_size: Images a batch.
        workers: Threads; None for one per core, at most 32.
        on_error: "fail" raises the error of an image that cannot be read, after the batches
            before it; "skip" leaves the image out and lists it in its batch's `failed`.

    Raises:
        ValueError: A number is out of range. While iterating: an image cannot be read or decoded.
        FileNotFoundError: While iterating, a file is missing. Both name the image.
    """
    workers = default_workers() if workers is None else workers
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    check_on_error(on_error)
    outside = [i for i in indices if not 0 <= i < len(dataset)]
    if outside:
        raise ValueError(f"indices: got {outside[0]}, expected 0 to {len(dataset) - 1}")
    return _batches(dataset, preprocessing, indices, batch_size, workers, on_error)


def _batches(
    dataset: Dataset,
    preprocessing: Preprocessing,
    indices: Sequence[int],
    batch_size: int,
    workers: int,
    on_error: str,
) -> Generator[Batch, None, None]:
    def decode(index: int) -> tuple[int, np.ndarray | str]:
        return index, or_message(
            lambda: preprocess(dataset.read(index), preprocessing, dataset.names[index]), on_error
        )

    side = preprocessing.image_size
    ahead = max(2 * batch_size, 4 * workers)
    with contextlib.closing(
        map_ahead(decode, map(int, indices), workers=workers, ahead=ahead)
    ) as images:
        while batch := list(itertools.islice(images, batch_size)):
            pixels = np.zeros((batch_size, side, side, 3), np.uint8)
            numbers = np.full(batch_size, -1, np.int64)
            failed = []
            count = 0
            for index, image in batch:
                if isinstance(image, str):
                    failed.append((index, image))
                    continue
                pixels[count], numbers[count] = image, index
                count += 1
            yield Batch(pixels, numbers, tuple(failed))


def prefetch_to_device(
    batches: Iterable[Item], put: Callable[[Item], Result], *, ahead: int = 1
) -> Generator[Result, None, None]:
    """Yields `put(batch)` of each batch, in order; the next ones are put before they are asked for.

    JAX's transfers are asynchronous, so the next batch travels while the device computes. At an
    error in `batches`, what has been put before it is yielded first.

    Args:
        batches: What to put; closed at the end if it can be.
        put: Sends a batch to the device, e.g. `jax.device_put`.
        ahead: How many batches are put ahead of the one that is yielded.
    """
    if ahead < 0:
        raise ValueError(f"ahead: got {ahead}, expected 0 or more")
    waiting: deque[Result] = deque()
    source = iter(batches)
    try:
        for batch in source:
            waiting.append(put(batch))
            if len(waiting) > ahead:
                yield waiting.popleft()
    except (ValueError, OSError):
        yield from waiting
        raise
    else:
        yield from waiting
    finally:
        if isinstance(source, Generator):
            source.close()


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, ahead: int
) -> Generator[Result, None, None]:
    """Yields `function(item)` of each item, in order, while threads compute those that follow.

    Args:
        function: Called in `workers` threads.
        items: Asked for in the caller's thread, no more than `ahead` in advance.
        workers: Number of threads.
        ahead: How many results are held or being computed, at most.

    An exception of `function` is raised in its item's place. The threads end with the generator:
    at its last item, at an error, at Ctrl-C, and where the caller closes it.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    pending: deque[Future[Result]] = deque()
    iterator: Iterator[Item] = iter(items)
    try:
        for item in iterator:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def or_message(read: Callable[[], Result], on_error: str) -> Result | str:
    """What `read` returns; unless `on_error` is "fail", in one line why an image cannot be read."""
    try:
        return read()
    except (ValueError, OSError) as error:
        if on_error == "fail":
            raise
        return one_line(error)


def check_on_error(value: str) -> None:
    """Raises ValueError if `value` does not say what an image does that cannot be read."""
    if value not in ("fail", "skip"):
        raise ValueError(f"on_error: got {value!r}, expected 'fail' or 'skip'")


def default_workers() -> int:
    """The number of cores that this process may use, at most 32."""
    # Beyond that, the little that needs the interpreter's lock is what threads wait for.
    return min(32, len(os.sched_getaffinity(0)))

"""Evaluates a model on ImageNet or its own classes: every image counted once, on all devices.

    from internimage_jax.evaluate import evaluate

    report = evaluate("internimage_t_1k_224", "imagenet/val", output="t-on-val")
    print(report["top1"], report["top1_interval"])

The report is made of the predictions; the integer sums that the devices return have to agree.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import DTypeLike

import xla_ops
from convert.source import open_source
from internimage_jax.data import Dataset, open_dataset
from internimage_jax.evaluation_folder import EvaluationFolder
from internimage_jax.evaluation_settings import (
    array_digests,
    conversion_notes,
    dataset_settings,
    file_digests,
    model_settings,
    versions,
)
from internimage_jax.evaluation_step import (
    Outputs,
    Parallel,
    Step,
    class_notes,
    make_step,
)
from internimage_jax.labels import LabelClasses, own_classes
from internimage_jax.loader import Batch, load_batches, prefetch_to_device
from internimage_jax.messages import printable
from internimage_jax.model import InternImage
from internimage_jax.predictions import ImageResult, from_lines, to_lines
from internimage_jax.pretrained import from_pretrained, locate, released_named
from internimage_jax.processes import Group
from internimage_jax.report import make_report
from internimage_jax.report_html import make_page

# Called with the numbers of images done, of all images, of images that were right, and of images
# evaluated, which are those done but not skipped.
Progress = Callable[[int, int, int, int], None]


def evaluate(
    model: InternImage | str | os.PathLike[str],
    data: Dataset | str | os.PathLike[str],
    *,
    batch_size: int = 32,
    dtype: DTypeLike = "float32",
    implementation: xla_ops.Implementation | None = None,
    image_size: int | None = None,
    workers: int | None = None,
    num_images: int | None = None,
    labels: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    parallel: Parallel = "pmap",
    on_error: Literal["fail", "skip"] = "fail",
    group: Group | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluates a model on images with labels.

    Args:
        model: A released name, a checkpoint's path, or a model; its classes are ImageNet's 1,000 or
            21,841, or have names.
        data: A path, see `internimage_jax.data.open_dataset`, or what that returns; with the
            model's classes.
        batch_size: Images at a time on each device.
        dtype: Of parameters and computation; a model that is given has its own.
        implementation: Of DCNv3, see `xla_ops.dcnv3`; a model that is given has its own.
        image_size: Side of the images, in pixels; None is the checkpoint's, and a model that is
            given has its own.
        workers: How many images are decoded at a time; None is one per core, at most 32.
        num_images: Evaluates that many, evenly spaced through the dataset; None is all.
        labels: A file of labels, see `internimage_jax.data.open_dataset`.
        output: Folder for predictions.jsonl, report.json, report.html and settings.json; None
            writes nothing.
        resume: Goes on where an evaluation with the same settings in `output` was ended.
        parallel: "pmap", or "fsdp" for models that do not fit one device; see `make_step`.
        on_error: What an image that cannot be decoded does: "fail" ends the evaluation, "skip"
            leaves the image out and lists it.
        group: The processes that share the work, see `internimage_jax.processes`; None is this one
            alone.
        progress: Called after each batch with four counts of this process: images done, all images,
            images that were right, and images evaluated (those done but not skipped).

    Returns:
        The report, as docs/evaluation.md describes it and report.json holds it; the same in every
        process of a group.

    Raises:
        FileNotFoundError: There is no such data or model.
        FileExistsError: `output` holds an evaluation and `resume` is not set.
        ValueError: Model, data and settings do not fit together, an image cannot be decoded, or the
            model's output is not finite; one line. The predictions so far are in `output`.
        OSError: `output` cannot be written, or another process of the group has ended.
    """
    group = Group() if group is None else group
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if resume and output is None:
        raise ValueError("resume: needs the output folder of the evaluation to go on with")
    folder = None
    if output is not None:
        folder = EvaluationFolder(output, resume, group.index, group.count)
    own = _own_classes(model)
    dataset = _opened(data, labels, own)
    chosen = _evenly_spaced(len(dataset), num_images)
    model, weights, conversion = _loaded(model, dtype, implementation, image_size)
    notes = (*dataset.notes, *conversion, *class_notes(model.config.num_classes, own))
    settings = {
        **model_settings(model, weights, own),
        **dataset_settings(dataset, chosen),
        "batch_size": batch_size,
        "parallel": parallel,
        "on_error": on_error,
        "processes": group.count,
        "versions": versions(),
    }
    group.check_same(settings)
    part = np.array_split(chosen, group.count)[group.index].tolist()

    together = batch_size * jax.local_device_count()
    done = [] if folder is None else folder.done(settings, together, len(part))
    _check_done(done, dataset, part, output)
    loop = _Loop(dataset, model, done, len(part), folder, group, progress)
    if len(done) < len(part):
        batches = load_batches(
            dataset,
            model.preprocessing,
            part[len(done) :],
            batch_size=together,
            workers=workers,
            on_error=on_error,
        )
        step = make_step(
            model,
            batch_size=batch_size,
            restricted_to=dataset.classes,
            labels=max(len(dataset.labels[i]) for i in chosen),
            parallel=parallel,
        )
        with contextlib.closing(batches), folder or contextlib.nullcontext():
            if folder is not None:  # nothing is written before all this is known to fit
                folder.open(settings, done)
            loop.run(step, batches)

    results, images, seconds = _of_all(group, loop)
    report = make_report(
        results,
        settings,
        source=dataset.source,
        notes=notes,
        images_per_second=images / seconds if images else None,
        seconds=seconds,
    )
    if folder is not None:
        page = make_page(report, results, dataset.read) if group.index == 0 else ""
        folder.finish(report, page, results)
    return report


def _own_classes(model: InternImage | str | os.PathLike[str]) -> tuple[str, ...] | None:
    """As `own_classes`; of a checkpoint nothing but its description is read."""
    if isinstance(model, InternImage):
        return own_classes(model.name, model.config.num_classes, model.classes)
    if released_named(model) is not None:
        return None
    with open_source(model) as opened:
        return own_classes(opened.name, opened.config.num_classes, opened.classes)


def _opened(
    data: Dataset | str | os.PathLike[str],
    labels: str | os.PathLike[str] | None,
    own: tuple[str, ...] | None,
) -> Dataset:
    """The dataset, whose classes are the model's: its `own`, or ImageNet's."""
    if labels is not None and isinstance(data, Dataset):
        raise ValueError("labels: the data set given has labels, expected a path as data or None")
    if not isinstance(data, Dataset):
        data = open_dataset(data, labels=labels, class_names=own)
    if data.class_names != own:
        raise ValueError(
            f"{printable(data.source)}: its labels are of {_whose(data.class_names)}, and "
            f"the model has {_whose(own)}; open_dataset takes `class_names`"
        )
    return data


def _loaded(
    model: InternImage | str | os.PathLike[str],
    dtype: DTypeLike,
    implementation: xla_ops.Implementation | None,
    image_size: int | None,
) -> tuple[InternImage, Any, tuple[str, ...]]:
    """The model, digests of its weights, and what a report has to say of its conversion."""
    if isinstance(model, InternImage):
        return model, array_digests(model), ()
    path = locate(model)
    loaded = from_pretrained(
        path, dtype=dtype, implementation=implementation, image_size=image_size
    )
    return loaded, file_digests(path), conversion_notes(path)


def _check_done(
    done: Sequence[ImageResult],
    dataset: Dataset,
    part: Sequence[int],
    output: str | os.PathLike[str] | None,
) -> None:
    """Raises unless these predictions are of the first images of this process's part."""
    wanted = [(i, dataset.names[i], tuple(dataset.labels[i])) for i in part[: len(done)]]
    classes = LabelClasses(dataset.class_names).count
    if [(one.index, one.file, one.labels) for one in done] != wanted or any(
        best >= classes for one in done for best in one.top5
    ):
        raise ValueError(f"{output}: its predictions are not of these images, in this order")


def _whose(names: tuple[str, ...] | None) -> str:
    return "ImageNet's classes" if names is None else f"{len(names)} classes such as {names[0]!r}"


class _Loop:
    """Evaluates batches, checks the results and keeps them."""

    def __init__(
        self,
        dataset: Dataset,
        model: InternImage,
        done: Sequence[ImageResult],
        total: int,
        folder: EvaluationFolder | None,
        group: Group,
        progress: Progress | None,
    ):
        self.results = list(done)
        self.images = 0  # evaluated by this loop; those in `done` were before
        self.seconds = 0.0
        self._right = sum(one.right for one in done)
        self._before = sum(one.error is None for one in done)  # evaluated before
        self._dataset, self._model, self._total = dataset, model, total
        self._folder, self._group, self._progress = folder, group, progress

    def run(self, step: Step, batches: Iterable[Batch]) -> None:
        """Evaluates all batches; the devices are two ahead of what is being written."""

        def begin(batch: Batch) -> tuple[Batch, Outputs]:
            self._group.check()
            labels = [self._dataset.labels[i] for i in batch.indices if i >= 0]
            return batch, step(batch.pixels, labels)

        start = time.perf_counter()
        # An error in the batches is raised after the ones before it have been kept.
        for batch, outputs in prefetch_to_device(batches, begin, ahead=2):
            self._keep(batch, step.read(outputs))
        self.seconds = time.perf_counter() - start

    def _keep(self, batch: Batch, outputs: Outputs) -> None:
        new = [self._skipped(index, message) for index, message in batch.failed]
        for row, index in enumerate(batch.indices):
            if index >= 0:
                new.append(
                    self._result(int(index), outputs.classes[row], outputs.probabilities[row])
                )
        new.sort(key=lambda one: one.index)
        right = sum(one.right for one in new)
        evaluated = len(new) - len(batch.failed)
        counted = [right, sum(one.right5 for one in new), evaluated]
        if counted != outputs.sums.tolist():
            raise ValueError(
                f"the devices counted {outputs.sums.tolist()} right, right among five and images, "
                f"the predictions of the same batch give {counted}: one of them is wrong"
            )
        if self._folder is not None:
            self._folder.write(new)
        self.results += new
        self.images += evaluated
        self._right += right
        if self._progress is not None:
            evaluated = self._before + self.images
            self._progress(len(self.results), self._total, self._right, evaluated)

    def _skipped(self, index: int, message: str) -> ImageResult:
        names, labels = self._dataset.names, self._dataset.labels
        return ImageResult(index, names[index], tuple(labels[index]), error=message)

    def _result(self, index: int, classes: np.ndarray, probabilities: np.ndarray) -> ImageResult:
        name = self._dataset.names[index]
        if not np.isfinite(probabilities).all():
            raise ValueError(f"{name}: the model's output is not finite (in {self._model.dtype})")
        return ImageResult(
            index,
            name,
            tuple(self._dataset.labels[index]),
            tuple(classes.tolist()),
            # The shortest digits that give the same float32 again.
            tuple(float(str(one)) for one in probabilities),
        )


def _of_all(group: Group, loop: _Loop) -> tuple[list[ImageResult], int, float]:
    """The results of all processes in the dataset's order, images evaluated now, and seconds."""
    if group.count == 1:
        return loop.results, loop.images, loop.seconds
    head = f"{loop.images} {loop.seconds!r}\n".encode()
    results: list[ImageResult] = []
    images, seconds = 0, 0.0
    for index, message in enumerate(group.exchange(head + to_lines(loop.results))):
        first, _, lines = message.partition(b"\n")
        results += from_lines(lines, f"process {index}")
        images += int(first.split()[0])
        seconds = max(seconds, float(first.split()[1]))
    return results, images, seconds


def _evenly_spaced(count: int, wanted: int | None) -> list[int]:
    """Which images are evaluated; the first ones alone would all be of a few classes."""
    if wanted is None:
        return list(range(count))
    if not 1 <= wanted <= count:
        raise ValueError(f"num_images: expected 1 to {count}, the dataset's images, got {wanted}")
    return [i * count // wanted for i in range(wanted)]

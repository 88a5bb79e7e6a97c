"""Labels images: decoded ahead in threads, batched, and classified by one compiled function."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from PIL import Image

from internimage_jax.labels import ImageClass, class_names
from internimage_jax.loader import check_on_error, default_workers, map_ahead, or_message
from internimage_jax.messages import printable
from internimage_jax.model import InternImage, check_logits
from internimage_jax.normalize import normalize
from internimage_jax.preprocess import ImageSource, preprocess


@dataclass(frozen=True, slots=True)
class PredictedClass:
    """A class with its probability; `wnid` is its WordNet id, None if unknown."""

    index: int
    wnid: str | None
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable classes of one image, best first.

    Args:
        file: Path of the image, or "image 3" for the fourth one if it does not come from a path.
        classes: As many as `topk`; none where the image could not be read.
        error: Why it could not be read, None if it was.
    """

    file: str
    classes: tuple[PredictedClass, ...]
    error: str | None = None


def is_argument(parameter: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether it is an argument of a predictor's compiled function, not a constant in it.

    On a CPU it takes 187 of T's 572 arrays; the rest are vectors, half a megabyte in all. For a GPU
    XLA makes more launches of a program that has constants, T's 378 for 362, so there it takes all.
    """
    return len(parameter.shape) > 1 or jax.default_backend() != "cpu"


class Predictor:
    """Labels images with a model: `for prediction in predictor(["cat.jpg"]): ...`

    Building one compiles the model for `batch_size` images, once: the last batch is filled up with
    blank images. The compiled function takes the kernels as arguments, so predictors of the same
    `model.fused()` share them; on a CPU biases and other vectors are constants in it, so a program
    in the compilation cache serves one checkpoint only.

    Args:
        model: With classes. The predictor keeps the parameters that it has now.
        batch_size: Images at a time.
        topk: How many classes a prediction has; None is five, or all of fewer.

    Raises:
        ValueError: The model has no classes, or a number is out of range.
    """

    def __init__(self, model: InternImage, *, batch_size: int = 8, topk: int | None = None):
        num_classes = model.config.num_classes
        if num_classes == 0:
            raise ValueError("model: has no classes (num_classes is 0), predictions need some")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        topk = min(5, num_classes) if topk is None else topk
        if not 1 <= topk <= num_classes:
            raise ValueError(
                f"topk: got {topk}, expected 1 to {num_classes}, the model's number of classes"
            )
        self.batch_size = batch_size
        self._preprocessing = preprocessing = model.preprocessing
        self._classes = class_names(num_classes)
        if model.classes is not None:
            self._classes = tuple(
                known if known.name == name else ImageClass(known.index, None, name)
                for known, name in zip(self._classes, model.classes, strict=True)
            )
        self._dtype = model.dtype

        # Compiled by hand, and called with a plain list of arrays: a call then costs no walk over
        # the model's modules, and another shape would be an error instead of a second compilation.
        # What is left of its cost grows with the arrays it takes, hence the constants.
        graph, state = nnx.split(model.fused())
        leaves, tree = jax.tree.flatten(state)
        self._arguments = [leaf for leaf in leaves if is_argument(leaf)]
        constants = [None if is_argument(leaf) else np.asarray(leaf) for leaf in leaves]

        def top_classes(
            arguments: list[jax.Array], pixels: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            rest = iter(arguments)
            parameters = [next(rest) if c is None else jnp.asarray(c) for c in constants]
            merged = nnx.merge(graph, jax.tree.unflatten(tree, parameters))
            logits = merged(normalize(pixels, preprocessing))  # (N, num_classes)
            check_logits(logits, num_classes)
            return lax.top_k(jax.nn.softmax(logits), topk)  # twice (N, topk)

        side = preprocessing.image_size
        self._shape = (batch_size, side, side, 3)
        pixels = jax.ShapeDtypeStruct(self._shape, np.uint8)
        self._compiled = jitted = jax.jit(top_classes)
        # Whoever debugs may have switched `jit` off.
        if not jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            self._compiled = jitted.lower(self._arguments, pixels).compile()

    def __call__(
        self, sources: Iterable[ImageSource], *, on_error: Literal["fail", "skip"] = "fail"
    ) -> Iterator[Prediction]:
        """Returns an iterator over the predictions, one an image, in the order of the images.

        Args:
            sources: Paths, bytes, open files, PIL images or NumPy arrays. They are read two batches
                ahead; no more are held.
            on_error: "fail" raises the error of an image that cannot be read, after the predictions
                of the batches before it; "skip" gives a prediction that has it as its `error`.

        Raises:
            ValueError: `sources` is a single image, or `on_error` is neither of these. While
                iterating: an image cannot be read, or the model's output is not finite, whatever
                `on_error` is. The message names the image.
            FileNotFoundError: While iterating, a file is missing.
        """
        check_on_error(on_error)
        array = isinstance(sources, np.ndarray) and sources.ndim < 4
        if array or isinstance(sources, str | bytes | os.PathLike | Image.Image):
            kind = type(sources).__name__
            raise ValueError(f"sources: expected several images, such as a list, got one {kind}")
        return self._predictions(sources, on_error)

    def _predictions(self, sources: Iterable[ImageSource], on_error: str) -> Iterator[Prediction]:
        def decode(item: tuple[int, ImageSource]) -> tuple[str, np.ndarray | str]:
            position, source = item
            is_path = isinstance(source, str | os.PathLike)
            file = os.fsdecode(source) if is_path else f"image {position}"
            return file, or_message(
                lambda: preprocess(source, self._preprocessing, printable(file)), on_error
            )

        workers, ahead = default_workers(), 2 * self.batch_size
        decoded = map_ahead(decode, enumerate(sources), workers=workers, ahead=ahead)
        with contextlib.closing(decoded) as images:
            while batch := list(itertools.islice(images, self.batch_size)):
                yield from self._classify(batch)

    def _classify(self, batch: list[tuple[str, np.ndarray | str]]) -> Iterator[Prediction]:
        pixels = np.zeros(self._shape, np.uint8)
        for row, (_, image) in zip(pixels, batch, strict=False):
            row[...] = 0 if isinstance(image, str) else image
        probabilities, indices = map(np.asarray, self._compiled(self._arguments, pixels))
        for (file, image), values, numbers in zip(batch, probabilities, indices, strict=False):
            if isinstance(image, str):
                yield Prediction(file, (), image)
                continue
            if not np.isfinite(values).all():
                name = printable(file)
                raise ValueError(f"{name}: the model's output is not finite (in {self._dtype})")
            labelled = zip(values.tolist(), numbers, strict=True)
            yield Prediction(file, tuple(self._labelled(*pair) for pair in labelled))

    def _labelled(self, probability: float, index: int) -> PredictedClass:
        one = self._classes[index]
        return PredictedClass(one.index, one.wnid, one.name, probability)

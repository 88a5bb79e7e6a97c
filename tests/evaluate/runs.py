"""What the tests of evaluation share: a small model's figures, and how they are counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from internimage_jax.config import InternImageConfig
from internimage_jax.model import InternImage
from internimage_jax.normalize import normalize
from internimage_jax.report import TIMES

CONFIG = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))
COUNT = 23  # images: with batches of 8 an uneven rest, and with 4 devices an uneven share
EACH = 2  # images on each of the four devices


class Finished(NamedTuple):
    """What an evaluation that nothing disturbed leaves behind."""

    report: dict[str, Any]
    predictions: bytes


def one_at_a_time(model: InternImage) -> Callable[[np.ndarray], np.ndarray]:
    """The oracle: the logits of a single image's pixels (H, W, 3), in float64."""
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images))

    def logits(pixels: np.ndarray) -> np.ndarray:
        images = normalize(pixels, model.preprocessing)[None]
        return np.asarray(forward(state, images)[0], np.float64)

    return logits


def expected_counts(
    logits: np.ndarray, labels: list[tuple[int, ...]], classes: np.ndarray | None = None
) -> tuple[int, int, int]:
    """Top-1, top-5 and images, counted one at a time."""
    classes = np.arange(logits.shape[1]) if classes is None else classes
    order = classes[np.argsort(-logits[:, classes], axis=1)[:, :5]]
    right = [[one in wanted for one in row] for row, wanted in zip(order, labels, strict=True)]
    return sum(row[0] for row in right), sum(map(any, right)), len(labels)


def counts(report: dict[str, Any]) -> tuple[int, int, int]:
    return report["correct_top1"], report["correct_top5"], report["num_images"]


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in TIMES}

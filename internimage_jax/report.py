"""From predictions to figures: accuracies with their intervals, by class, and calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from internimage_jax.labels import ImageClass, imagenet1k_classes
from internimage_jax.predictions import ImageResult

CALIBRATION_BINS = 15
_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
# What differs between two evaluations of the same settings.
TIMES = ("images_per_second", "seconds", "finished")


def make_report(
    results: Sequence[ImageResult],
    settings: Mapping[str, Any],
    *,
    source: str,
    notes: Sequence[str] = (),
    images_per_second: float | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Computes the report of an evaluation.

    Args:
        results: In the dataset's order.
        settings: What the results depend on; they are part of the report.
        source: Where the images are from.
        notes: What a reader should know, a sentence each.
        images_per_second: Measured, without compilation; None if no image was evaluated now.
        seconds: That took.

    Returns:
        JSON values, as docs/evaluation.md lists them. Accuracies are in percent.

    Raises:
        ValueError: There is no result to report on.
    """
    evaluated = [one for one in results if one.error is None]
    skipped = [one for one in results if one.error is not None]
    if not evaluated:
        raise ValueError(f"{source}: no image could be evaluated, {len(skipped)} were skipped")
    count = len(evaluated)
    correct = sum(one.right for one in evaluated), sum(one.right5 for one in evaluated)
    return {
        "top1": 100 * correct[0] / count,
        "top5": 100 * correct[1] / count,
        "top1_interval": wilson_interval(correct[0], count),
        "top5_interval": wilson_interval(correct[1], count),
        "num_images": count,
        "correct_top1": correct[0],
        "correct_top5": correct[1],
        "num_skipped": len(skipped),
        "images_per_second": images_per_second,
        "seconds": seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **settings,
        "source": source,
        "notes": list(notes),
        "calibration": calibration(evaluated),
        "per_class": per_class(evaluated, classes_of(settings)),
        "skipped": [{"file": one.file, "error": one.error} for one in skipped],
    }


def wilson_interval(right: int, count: int) -> list[float]:
    """The 95 % interval of a proportion, in percent (Wilson's score interval, 1927)."""
    z2 = _Z * _Z
    middle = (right + z2 / 2) / (count + z2)
    half = _Z * math.sqrt(right * (count - right) / count + z2 / 4) / (count + z2)
    return [100 * max(0.0, middle - half), 100 * min(1.0, middle + half)]


def calibration(results: Sequence[ImageResult]) -> dict[str, Any]:
    """How well the probability of the first class tells how often it is right.

    Returns:
        "expected_calibration_error": in percent, the mean over the images of |accuracy -
        confidence| of their bin; "method": in words; "bins": of equal width, each with its bounds,
        images, mean confidence and accuracy in percent (None where there is no image).

    Reference: Guo et al., On Calibration of Modern Neural Networks (ICML 2017), equation 5.
    """
    counts = [0] * CALIBRATION_BINS
    right = [0] * CALIBRATION_BINS
    confidences: list[list[float]] = [[] for _ in range(CALIBRATION_BINS)]
    for one in results:
        confidence = one.probabilities[0]
        # Bins are open below and closed above, as in the reference.
        place = min(max(math.ceil(confidence * CALIBRATION_BINS) - 1, 0), CALIBRATION_BINS - 1)
        counts[place] += 1
        right[place] += one.right
        confidences[place].append(confidence)
    bins: list[dict[str, Any]] = []
    error = 0.0
    for place, count in enumerate(counts):
        total = math.fsum(confidences[place])  # exact, so the order of the images plays no part
        error += abs(right[place] - total) / len(results)
        bins.append(
            {
                "low": place / CALIBRATION_BINS,
                "high": (place + 1) / CALIBRATION_BINS,
                "images": count,
                "confidence": 100 * total / count if count else None,
                "accuracy": 100 * right[place] / count if count else None,
            }
        )
    return {
        "expected_calibration_error": 100 * error,
        "method": f"ECE, {CALIBRATION_BINS} bins of equal width over the probability of the first "
        "class",
        "bins": bins,
    }


def classes_of(settings: Mapping[str, Any]) -> Sequence[ImageClass]:
    """The classes that an evaluation's labels index, from its settings or report."""
    names = settings.get("classes", "ImageNet")  # once there were no others
    if names == "ImageNet":
        return imagenet1k_classes()
    return [ImageClass(i, None, name) for i, name in enumerate(names)]


def per_class(
    results: Sequence[ImageResult], classes: Sequence[ImageClass]
) -> list[dict[str, Any]]:
    """Accuracy by class, in the order of the classes; only those that have images.

    An image with several labels counts for each of them: it is right for all or for none.
    """
    images: dict[int, list[ImageResult]] = {}
    for one in results:
        for label in one.labels:
            images.setdefault(label, []).append(one)
    return [
        {
            "index": label,
            "wnid": classes[label].wnid,
            "name": classes[label].name,
            "images": len(images[label]),
            "correct_top1": sum(one.right for one in images[label]),
            "correct_top5": sum(one.right5 for one in images[label]),
            "top1": 100 * sum(one.right for one in images[label]) / len(images[label]),
            "top5": 100 * sum(one.right5 for one in images[label]) / len(images[label]),
        }
        for label in sorted(images)
    ]

"""Compares the predictions of two evaluations of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internimage_jax.predictions import ImageResult


def compare(a: Sequence[ImageResult], b: Sequence[ImageResult]) -> dict[str, Any]:
    """Compares two evaluations image by image; images are the same if their names are.

    Args:
        a, b: Predictions. Images that one of them has not, or has skipped, are left out.

    Returns:
        JSON values: "num_images" compared; "only_in_a", "only_in_b"; "top1_a", "top1_b" in percent
        of those compared; how many were "both_right", "only_a_right", "only_b_right" and
        "both_wrong"; "same_class", how many got the same class; "p_value" of McNemar's exact test;
        "differences", the images where one alone was right.

    Raises:
        ValueError: They have no image in common, or differ in an image's labels.

    Reference: McNemar, Note on the sampling error of the difference between correlated proportions
    (1947), in its exact form.
    """
    first, second = ({one.file: one for one in results if one.error is None} for results in (a, b))
    pairs = [(one, second[name]) for name, one in first.items() if name in second]
    if not pairs:
        raise ValueError("the two have no image in common")
    for one, other in pairs:
        if set(one.labels) != set(other.labels):
            raise ValueError(
                f"{one.file}: its labels are {list(one.labels)} in the one and "
                f"{list(other.labels)} in the other"
            )
    differences = [(one, other) for one, other in pairs if one.right != other.right]
    only_a = sum(one.right for one, _ in differences)
    only_b = len(differences) - only_a
    both = sum(one.right and other.right for one, other in pairs)
    return {
        "num_images": len(pairs),
        "only_in_a": len(first) - len(pairs),
        "only_in_b": len(second) - len(pairs),
        "top1_a": 100 * (both + only_a) / len(pairs),
        "top1_b": 100 * (both + only_b) / len(pairs),
        "both_right": both,
        "only_a_right": only_a,
        "only_b_right": only_b,
        "both_wrong": len(pairs) - both - len(differences),
        "same_class": sum(one.top5[0] == other.top5[0] for one, other in pairs),
        "p_value": mcnemar(only_a, only_b),
        "differences": [
            {
                "file": one.file,
                "labels": list(one.labels),
                "a": {"class": one.top5[0], "probability": one.probabilities[0]},
                "b": {"class": other.top5[0], "probability": other.probabilities[0]},
            }
            for one, other in differences
        ],
    }


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's test, exact and two-sided: how likely a split so uneven is if both are as good.

    Args:
        only_a, only_b: How many images the one alone, and the other alone, got right.
    """
    count, smaller = only_a + only_b, min(only_a, only_b)
    term = tail = 1  # binomial coefficients (count, k), whole numbers
    for k in range(1, smaller + 1):
        term = term * (count - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**count)

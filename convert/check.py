"""Holds the tensors of a checkpoint against the model they are to fill."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from convert.rules import BATCH_COUNTER, rules
from convert.torch_file import CheckpointError, LazyTensor
from internimage_jax.config import RELEASED, InternImageConfig
from internimage_jax.shapes import Shape

FLOATS = tuple(
    np.dtype(dtype) for dtype in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)
)


def check(path: str, wanted: Mapping[str, Shape], tensors: Mapping[str, LazyTensor]) -> None:
    """Raises CheckpointError unless `tensors` have just the names and shapes `wanted`, and floats.

    Args:
        path: What the message begins with.
        wanted: Shape by name.
        tensors: By name.
    """
    missing = [name for name in wanted if name not in tensors]
    left_over = [name for name in tensors if name not in wanted and not _is_counter(name, wanted)]
    misshapen = [
        f"{name} {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    odd = [f"{n} {t.dtype}" for n, t in tensors.items() if n in wanted and t.dtype not in FLOATS]
    problems = [
        f"{len(items)} {kind}: {text}"
        for kind, items, text in (
            ("missing", missing, _summary(missing)),
            ("left over", left_over, _summary(left_over)),
            ("misshapen", misshapen, _some(misshapen)),
            ("of a dtype that is no float", odd, _some(odd)),
        )
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{path}: does not fit the model{_hint(wanted, tensors)}: {'; '.join(problems)}"
        )


def fitting_models(
    tensors: Mapping[str, LazyTensor],
    adapt: Callable[[InternImageConfig], InternImageConfig] = lambda config: config,
) -> list[str]:
    """Names of the released models that have just these tensors, once their config is adapted."""
    shapes = {name: t.shape for name, t in tensors.items() if not name.endswith(BATCH_COUNTER)}
    return [
        name
        for name, model in RELEASED.items()
        if shapes == {rule.torch: rule.torch_shape for rule in rules(adapt(model.config))}
    ]


def _is_counter(name: str, wanted: Mapping[str, Shape]) -> bool:
    """Whether a tensor is the counter that PyTorch keeps beside a BatchNorm's statistics."""
    return (
        name.endswith(BATCH_COUNTER) and name.removesuffix(BATCH_COUNTER) + "running_mean" in wanted
    )


def _summary(names: list[str]) -> str:
    """All the names in few words: those alike but for their indices are counted."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[re.sub(r"\d+", "#", name[:120])].append(name[:120])
    shown = [
        pattern + f" ({len(group)})" if len(group) > 2 else ", ".join(group)
        for pattern, group in groups.items()
    ]
    return _some(shown, limit=40)


def _some(items: list[str], limit: int = 8) -> str:
    rest = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def _hint(wanted: Mapping[str, Shape], tensors: Mapping[str, LazyTensor]) -> str:
    """What may be the matter: another released model, or another number of classes."""
    fits = fitting_models(tensors)
    if fits:
        return f" (the tensors fit {' or '.join(fits)})"
    head = tensors.get("head.bias")
    if head is not None and len(head.shape) == 1 and head.shape != wanted.get("head.bias"):
        count = head.shape[0]
        return f" (its head is of {count} classes: num_classes={count}, or convert --num-classes)"
    return ""

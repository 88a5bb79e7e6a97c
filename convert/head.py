"""Other classes than the checkpoint has: a new head, none, or 1,000 of the 21,841 classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from convert.rules import Rule, rules
from convert.source import Source, check_tensors
from convert.torch_file import CheckpointError
from internimage_jax.config import NUM_CLASSES_1K, NUM_CLASSES_22K
from internimage_jax.labels import CLASSES_WITHOUT_22K, map_22k_to_1k

# The logit of a class without counterpart: its probability is 0 in every dtype, without infinities.
MASKED = -1e4


def with_classes(source: Source, num_classes: int | None, to_1k: bool) -> Source:
    """Returns the source with the head that was asked for, its tensors checked.

    Args:
        source: An open checkpoint.
        num_classes: Classes wanted; None keeps what is there. A head of another size is left out,
            and a new one made: kernels normal with deviation 0.02, biases 0. 0 leaves out the head.
        to_1k: Takes the 1,000 ImageNet-1K classes out of a head of 21,841, by the released map.

    Raises:
        ValueError: The checkpoint is not of the model, or has not the classes; one line.
    """
    if num_classes is not None and to_1k:
        raise ValueError("num_classes and to_1k exclude each other, got both")
    if num_classes is not None and (type(num_classes) is not int or num_classes < 0):
        raise ValueError(f"num_classes: expected an integer of at least 0, got {num_classes!r}")
    present = _classes(source)
    if num_classes is not None and num_classes == present:
        # The caller vouches for the size of the head, which config or name may give differently.
        classes = source.classes if source.config.num_classes == present else None
        config = source.config.replace(num_classes=num_classes)
        source = replace(source, config=config, classes=classes)
    elif num_classes is not None:
        source = _new_head(source, num_classes)
    check_tensors(source)
    return _mapped(source) if to_1k else source


def _classes(source: Source) -> int:
    """How many classes the file's own head has; 0 without one."""
    head = source.tensors.get("head.bias")
    return head.shape[0] if head is not None and len(head.shape) == 1 else 0


def _new_head(source: Source, num_classes: int) -> Source:
    wide, bare = source.config.replace(num_classes=1), source.config.replace(num_classes=0)
    within_backbone = {rule.flax for rule in rules(bare)}
    behind = [rule for rule in rules(wide) if rule.flax not in within_backbone]
    modules = {source.name_of(rule).split(".")[0] for rule in behind}
    has_pooling = any(name.split(".")[0] in modules - {"head"} for name in source.tensors)
    if num_classes and has_pooling:  # it has the same shapes whatever the number of classes
        modules = {"head"}
        behind = [rule for rule in behind if rule.flax.startswith("head.")]
    config = source.config.replace(num_classes=num_classes)
    new = {rule.flax for rule in behind} if num_classes else set()
    stream = np.random.RandomState(0)
    made = {r.flax: _initial(r, stream) for r in rules(config) if r.flax in new}
    tensors = {n: t for n, t in source.tensors.items() if n.split(".")[0] not in modules}
    before = _classes(source)
    note = f"left out the head of {before} classes" if before else "the file has no head"
    note += f"; made a new one of {num_classes} classes, not trained" if num_classes else ""
    return replace(
        source, config=config, tensors=tensors, made=made, notes=(*source.notes, note), classes=None
    )


def _initial(rule: Rule, stream: np.random.RandomState) -> np.ndarray:
    if rule.flax.endswith(".kernel"):
        return (0.02 * stream.standard_normal(rule.flax_shape)).astype(np.float32)
    values = np.ones if rule.flax.endswith((".scale", ".var")) else np.zeros
    return values(rule.flax_shape, np.float32)


def _mapped(source: Source) -> Source:
    if source.config.num_classes != NUM_CLASSES_22K:
        raise CheckpointError(
            f"{source.path}: to_1k needs a head of {NUM_CLASSES_22K} classes, got one of "
            f"{source.config.num_classes}"
        )
    head = {r.flax: source.read(r) for r in rules(source.config) if r.flax.startswith("head.")}
    kernel = head["head.kernel"][:, map_22k_to_1k()]  # (C, 1000)
    bias = head["head.bias"][map_22k_to_1k()]
    kernel[:, list(CLASSES_WITHOUT_22K)] = 0
    bias[list(CLASSES_WITHOUT_22K)] = MASKED
    made = {**source.made, "head.kernel": kernel, "head.bias": bias}
    masked = ", ".join(map(str, sorted(CLASSES_WITHOUT_22K)))
    note = (
        f"took the 1,000 classes of ImageNet-1K out of {NUM_CLASSES_22K}; class {masked} has no "
        "counterpart and is masked"
    )
    config = source.config.replace(num_classes=NUM_CLASSES_1K)
    notes = (*source.notes, note)
    return replace(source, config=config, made=made, notes=notes, classes=None)

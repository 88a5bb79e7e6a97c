"""The compiled step of an evaluation: a batch in, integer sums and each image's best classes out.

`make_step` is the one place that knows how a batch is spread over devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.head import MASKED
from internimage_jax.config import NUM_CLASSES_1K, NUM_CLASSES_22K
from internimage_jax.labels import CLASSES_WITHOUT_22K, map_22k_to_1k, own_classes
from internimage_jax.model import InternImage, check_logits
from internimage_jax.normalize import normalize

Parallel = Literal["pmap", "fsdp"]
TOP = 5  # classes kept of each image
NO_LABEL = -1  # fills a row of labels; a row of nothing else is padding
_AXIS = "devices"


class Outputs(NamedTuple):
    """What a step gives: `sums` over all its images, the rest for each image.

    With fewer than five classes to choose among, their number takes the place of 5.
    """

    sums: Any  # int32 (3,): right in the first place, right among the first five, images
    classes: Any  # int32 (N, 5), ImageNet-1K's or the model's own, most probable first
    probabilities: Any  # float32 (N, 5)


class Step:
    """A compiled step; make one with `make_step`.

    Args:
        run: Called with what `place` returns; does not wait for the result.
        sharding: Of a batch (devices, images on each, ...).
        devices: The devices that share a batch.
        batch_size: Images of a batch, over all devices.
        labels: Most labels that an image has.
    """

    def __init__(
        self,
        run: Callable[[jax.Array, jax.Array], Outputs],
        sharding: NamedSharding,
        devices: Sequence[Any],
        batch_size: int,
        labels: int,
    ):
        self._run = run
        self._sharding = sharding
        self.devices = devices
        self.batch_size = batch_size
        self.labels = labels

    def __call__(self, pixels: np.ndarray | jax.Array, labels: Sequence[Sequence[int]]) -> Outputs:
        """Starts the step.

        Args:
            pixels: uint8 (batch_size, H, W, 3), or what `place` made of it.
            labels: For each image of the batch, the classes that count as right; those of padding
                at the end are left out.

        Returns:
            Arrays that `read` waits for.
        """
        rows = np.full((self.batch_size, self.labels), NO_LABEL, np.int32)
        for row, right in zip(rows, labels, strict=False):
            row[: len(right)] = right
        if isinstance(pixels, np.ndarray):
            pixels = self.place(pixels)
        return self._run(pixels, self.place(rows))

    def place(self, array: np.ndarray) -> jax.Array:
        """Puts a batch on the devices: (batch_size, ...) to (devices, images on each, ...)."""
        spread = array.reshape(len(self.devices), -1, *array.shape[1:])
        return jax.device_put(spread, self._sharding)

    def read(self, outputs: Outputs) -> Outputs:
        """Waits for a step and returns its results in NumPy: (3,), (batch_size, 5) twice."""
        sums = np.asarray(outputs.sums.addressable_shards[0].data).reshape(-1)
        return Outputs(sums, *(_gathered(array) for array in outputs[1:]))


def make_step(
    model: InternImage,
    *,
    batch_size: int,
    restricted_to: Sequence[int] | None = None,
    labels: int = 1,
    parallel: Parallel = "pmap",
) -> Step:
    """Compiles the evaluation of one batch on all devices of this process.

    Args:
        model: With the 1,000 classes of ImageNet-1K, or the 21,841 of ImageNet-22K: of those the
            1,000 are taken by the released map, and the one without counterpart is never chosen.
            Or with classes of its own, which have names.
        batch_size: Images on each device.
        restricted_to: Classes to choose among; None is all.
        labels: Most labels that an image has.
        parallel: "pmap" gives each device all parameters. "fsdp" spreads each parameter over the
            devices, and they fetch one from each other when they need it: for models that do not
            fit one device.

    Raises:
        ValueError: The model's classes are unknown, or a number is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if parallel not in get_args(Parallel):
        raise ValueError(f"parallel: expected 'pmap' or 'fsdp', got {parallel!r}")
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), (_AXIS,))
    spread = NamedSharding(mesh, PartitionSpec(_AXIS))
    whole = NamedSharding(mesh, PartitionSpec())
    graph, state = nnx.split(model.fused())
    leaves, tree = jax.tree.flatten(state)
    own = own_classes(model.name, model.config.num_classes, model.classes)
    choose = _chooser(model.config.num_classes, own is None, restricted_to)
    side = model.preprocessing.image_size
    shapes = (
        jax.ShapeDtypeStruct((len(devices), batch_size, side, side, 3), np.uint8, sharding=spread),
        jax.ShapeDtypeStruct((len(devices), batch_size, labels), np.int32, sharding=spread),
    )

    def counted(leaves: list[jax.Array], pixels: jax.Array, labels: jax.Array) -> Outputs:
        images = normalize(pixels, model.preprocessing)  # (N, H, W, 3)
        logits = nnx.merge(graph, jax.tree.unflatten(tree, leaves))(images)
        check_logits(logits, model.config.num_classes)
        classes, probabilities = choose(logits)  # (N, 5) twice
        right = (classes[:, :, None] == labels[:, None, :]).any(-1)  # (N, 5); NO_LABEL is no class
        marks = right[:, 0], right.any(-1), labels[:, 0] != NO_LABEL
        sums = jnp.stack([mark.sum(dtype=jnp.int32) for mark in marks])
        return Outputs(sums, classes, probabilities)

    def on_each(leaves: list[jax.Array], pixels: jax.Array, labels: jax.Array) -> Outputs:
        outputs = counted(leaves, pixels, labels)
        return outputs._replace(sums=lax.psum(outputs.sums, _AXIS))

    def on_all(leaves: list[jax.Array], pixels: jax.Array, labels: jax.Array) -> Outputs:
        # The images stay apart and the parameters come together, not the other way round.
        leaves = [lax.with_sharding_constraint(leaf, whole) for leaf in leaves]
        joined = [array.reshape(-1, *array.shape[2:]) for array in (pixels, labels)]
        return counted(leaves, *(lax.with_sharding_constraint(one, spread) for one in joined))

    if parallel == "pmap":
        leaves = [jax.device_put(leaf, whole) for leaf in leaves]
        mapped = jax.pmap(on_each, _AXIS, in_axes=(None, 0, 0), devices=devices)
        compiled = mapped.lower(leaves, *shapes).compile()
    else:
        leaves = [jax.device_put(leaf, _largest_axis_spread(leaf, mesh)) for leaf in leaves]
        given = ([leaf.sharding for leaf in leaves], spread, spread)
        jitted = jax.jit(on_all, in_shardings=given, out_shardings=Outputs(whole, spread, spread))
        compiled = jitted.lower(leaves, *shapes).compile()

    def run(pixels: jax.Array, labels: jax.Array) -> Outputs:
        return compiled(leaves, pixels, labels)

    return Step(run, spread, devices, batch_size * len(devices), labels)


def class_notes(num_classes: int, own: Sequence[str] | None) -> tuple[str, ...]:
    """What a report has to say of how a model is evaluated.

    Args:
        num_classes: How many classes it has.
        own: Their names where they are its own, see `own_classes`.
    """
    if own is not None:
        always = f"The model has {num_classes} classes: top-5 is right for every image."
        return (always,) if num_classes <= TOP else ()
    if num_classes == NUM_CLASSES_1K:
        return ()
    without = ", ".join(map(str, sorted(CLASSES_WITHOUT_22K)))
    return (
        f"The model has {NUM_CLASSES_22K:,} classes; the {NUM_CLASSES_1K:,} of ImageNet-1K were "
        f"taken by the released map. Class {without} has no counterpart: it is masked, so its "
        "images count as wrong.",
    )


def _chooser(
    num_classes: int, of_imagenet: bool, restricted_to: Sequence[int] | None
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A function from logits (N, num_classes) to classes and probabilities (N, 5).

    The classes are ImageNet-1K's or the model's own; of fewer than five all.
    """
    count = NUM_CLASSES_1K if of_imagenet else num_classes
    within = np.arange(count) if restricted_to is None else np.array(restricted_to)
    columns, masked = within, np.zeros(len(within), bool)
    if of_imagenet and num_classes == NUM_CLASSES_22K:
        columns, masked = map_22k_to_1k()[within], np.isin(within, list(CLASSES_WITHOUT_22K))

    def choose(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        if len(within) != num_classes:
            logits = logits[:, columns]  # (N, classes to choose among)
        if masked.any():
            logits = jnp.where(masked[None], jnp.asarray(MASKED, logits.dtype), logits)
        probabilities, order = lax.top_k(jax.nn.softmax(logits), min(TOP, len(within)))
        return jnp.asarray(within, jnp.int32)[order], probabilities.astype(jnp.float32)

    return choose


def _largest_axis_spread(leaf: jax.Array, mesh: Mesh) -> NamedSharding:
    """Spreads an array over the devices along the longest axis that they divide, if there is one"""
    divided = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0 and size]
    if not divided:
        return NamedSharding(mesh, PartitionSpec())
    axis = max(divided, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, _AXIS))


def _gathered(array: jax.Array) -> np.ndarray:
    """An array spread along its first axis, as (N, 5); reading x[0] under `pmap` would be slow."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    parts = [np.asarray(shard.data) for shard in shards]
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])

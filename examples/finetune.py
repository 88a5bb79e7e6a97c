"""Fine-tunes a model on classes of your own, on all devices of this machine.

    python examples/finetune.py flowers/train mine --validate flowers/val
    python -m internimage_jax evaluate flowers/val --model mine --output mine-on-val

The training set is a folder of class folders, whose names become the model's classes. Images are
cropped and mirrored at random; the rest is AdamW with a warm-up and a cosine, label smoothing and
stochastic depth. After each epoch the model is written to the output folder, which predict,
evaluate, `from_pretrained` and this example's --model take, and evaluated on the images to
validate with, if there are any. The first step compiles, which for T takes a minute on a GPU. It is
an example: change what you like.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # flax brings it
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

import internimage_jax
from internimage_jax.cache import cache_folder
from internimage_jax.data import Dataset, open_dataset
from internimage_jax.evaluate import evaluate
from internimage_jax.loader import default_workers, map_ahead, prefetch_to_device
from internimage_jax.normalize import normalize
from internimage_jax.preprocess import Preprocessing, load_image

Batch = tuple[np.ndarray, np.ndarray]  # uint8 (N, side, side, 3), int32 (N,)


def random_crop(image: Image.Image, side: int, random: np.random.Generator) -> np.ndarray:
    """Cuts out 8 to 100 % of an image, three quarters to four thirds as wide as high, resizes it to
    a square, and mirrors it half of the time; uint8 (side, side, 3)."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # a strip, of which no such part was found
        w = h = min(width, height)
    left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
    box = (left, top, left + w, top + h)
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box))
    return pixels[:, ::-1] if random.random() < 0.5 else pixels


def random_batches(
    dataset: Dataset, side: int, batch_size: int, epoch: int, seed: int
) -> Iterator[Batch]:
    """Yields an epoch's batches, all of one size, while threads decode those that follow.

    Images that fill no batch are left out: others in each epoch, since the order is random.
    """

    def decode(i: int) -> np.ndarray:
        random = np.random.default_rng((seed, epoch, i))
        return random_crop(load_image(dataset.read(i), dataset.names[i]), side, random)

    order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
    order = order[: len(order) // batch_size * batch_size].tolist()
    decoded = map_ahead(decode, order, workers=default_workers(), ahead=2 * batch_size)
    with contextlib.closing(decoded) as images:
        for first in range(0, len(order), batch_size):
            labels = [dataset.labels[i][0] for i in order[first : first + batch_size]]
            pixels = list(itertools.islice(images, batch_size))
            yield np.stack(pixels), np.array(labels, np.int32)


def adamw(learning_rate: float, weight_decay: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up of a twentieth of all steps, then a cosine; vectors do not decay."""
    warmup = steps // 20
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate / (warmup + 1), learning_rate, warmup, steps
    )
    return optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.adamw(
            schedule,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    smoothing: float,
) -> Callable[..., Any]:
    """The step, compiled: from parameters, statistics, the optimizer's state, pixels, labels and a
    key to the first three anew, and the loss. It takes over the memory of the first three."""

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, statistics, state, pixels, labels, key):
        def loss_of(params):
            model = nnx.merge(graphdef, params, statistics, copy=True)
            logits = model(normalize(pixels, preprocessing), train=True, key=key)
            logits = logits.astype(jnp.float32)
            wanted = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
            loss = optax.softmax_cross_entropy(logits, wanted).mean()
            return loss, nnx.state(model, nnx.BatchStat)

        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), statistics, state, loss

    return step


def open_training_set(folder: Path) -> tuple[Dataset, list[str]]:
    """The images in the folders in `folder`, and the names of these, which are the classes."""
    found = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(found) < 2:
        raise ValueError(f"{folder}: expected two class folders or more, got {len(found)}")
    for inner in (inner for path in found for inner in path.iterdir()):
        if inner.is_dir():
            raise ValueError(f"{inner}: a folder in a class folder; give the one of class folders")
    dataset = open_dataset(folder, class_names=[path.name for path in found])
    seen = {label for labels in dataset.labels for label in labels}
    if empty := [path for i, path in enumerate(found) if i not in seen]:
        raise ValueError(f"{empty[0]}: no images of this class")
    return dataset, [path.name for path in found]


def finetune(args: argparse.Namespace) -> None:
    dataset, classes = open_training_set(args.train)
    validation = open_dataset(args.validate, class_names=classes) if args.validate else None
    devices = jax.local_device_count()
    if args.epochs < 1:
        raise ValueError(f"epochs: got {args.epochs}, expected at least 1")
    if not 1 <= args.batch_size <= len(dataset) or args.batch_size % devices:
        raise ValueError(
            f"batch size: got {args.batch_size}, expected at most {len(dataset)}, the number of "
            f"images, and a multiple of {devices}, the number of devices"
        )
    model = internimage_jax.from_pretrained(
        args.model,
        classes=classes,
        drop_path_rate=args.drop_path_rate,
        image_size=args.image_size,
        dtype=args.dtype,
        param_dtype="float32",
        with_cp=args.recompute,
    )
    print(f"{len(dataset)} images of {len(classes)} classes, {devices} device(s)", flush=True)

    steps = len(dataset) // args.batch_size  # an epoch
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)
    optimizer = adamw(args.learning_rate, args.weight_decay, steps * args.epochs)
    step = make_step(graphdef, optimizer, model.preprocessing, args.label_smoothing)
    # Parameters on each device, batches spread over all: XLA adds up the gradients.
    mesh = jax.make_mesh((devices,), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec("data"))
    held = jax.device_put((params, statistics, optimizer.init(params)), everywhere)
    key = jax.random.key(args.seed)

    for epoch in range(1, args.epochs + 1):
        start, losses = time.perf_counter(), []
        side = model.preprocessing.image_size
        batches = random_batches(dataset, side, args.batch_size, epoch, args.seed)
        for pixels, labels in prefetch_to_device(batches, lambda b: jax.device_put(b, spread)):
            key, own = jax.random.split(key)
            *held, loss = step(*held, pixels, labels, own)
            losses.append(loss)  # read when the epoch is over: to read it now would be to wait
        loss = float(np.mean(jax.device_get(losses)))
        rate = steps * args.batch_size / (time.perf_counter() - start)
        print(f"epoch {epoch}/{args.epochs}: loss {loss:.4f}, {rate:.1f} images/s", flush=True)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}; try a smaller --learning-rate")
        nnx.update(model, *held[:2])
        internimage_jax.save_pretrained(model, args.output)
        if validation:
            report = evaluate(model, validation, batch_size=args.batch_size // devices)
            print(f"top-1 on {args.validate}: {report['top1']:.2f} %", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path, help="folder of class folders")
    parser.add_argument("output", type=Path, help="folder for the model, a new one")
    parser.add_argument("--model", default="internimage_t_1k_224", help="released name, or a path")
    parser.add_argument("--validate", type=Path, help="folder of class folders, after each epoch")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="of all devices together")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--drop-path-rate", type=float, default=0.1)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--image-size", type=int, help="pixels (default: the model's)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16" if jax.default_backend() == "gpu" else "float32",
        help="of the computation; parameters are float32 (default: bfloat16 on a GPU)",
    )
    parser.add_argument("--recompute", action="store_true", help="saves memory for some time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        if args.output.exists():
            raise ValueError(f"{args.output}: is there already; choose another name")
        args.output.mkdir(parents=True)  # now, not after an epoch, it is an error if it cannot be
        try:
            finetune(args)
        finally:
            with contextlib.suppress(OSError):  # that it is not empty
                args.output.rmdir()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the next run need not compile anew
        with contextlib.suppress(OSError):  # that there is no home folder
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    main()

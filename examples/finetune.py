"""Fine-tunes a model on classes of your own, on all devices of this machine.

    python examples/finetune.py flowers/train mine --validate flowers/val
    python -m internimage_jax evaluate flowers/val --model mine --output mine-on-val

The training set is a folder of class folders, whose names become the model's classes. Images are
cropped and mirrored at random; the rest is AdamW with a warm-up and a cosine, label smoothing and
stochastic depth. After each epoch the model is written to the output folder, over that of the epoch
before, and evaluated on the images of --validate, if it is given. predict, evaluate,
`from_pretrained` and this example's --model take the folder. The first step compiles, which for T
takes a minute on a GPU. It is an example: change what you like.

Until training ends, a folder beside the output, `mine.unfinished`, holds its state, saved after
each epoch and every ten minutes. After a kill, the same command with --resume continues from it, as
if there had been no kill.

Large models need smaller learning rates. The official recipe for L to H on ImageNet, which starts
from the weights of 21,841 classes, is, except for its moving average and its augmentation,

    --to-1k --batch-size 512 --learning-rate 2e-5 --layer-decay 0.9 --offset-rate 0.1 --epochs 20
    --label-smoothing 0.3
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # flax brings it
import orbax.checkpoint as ocp  # flax brings it too
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

import internimage_jax
from convert.head import MASKED
from internimage_jax import InternImage
from internimage_jax.cache import cache_folder
from internimage_jax.commands import no_devices
from internimage_jax.data import Dataset, open_dataset
from internimage_jax.data_sources import is_hidden
from internimage_jax.evaluate import evaluate
from internimage_jax.labels import imagenet1k_classes
from internimage_jax.loader import default_workers, map_ahead, prefetch_to_device
from internimage_jax.normalize import normalize
from internimage_jax.preprocess import Preprocessing, load_image

EVERY = 50  # steps between lines that are printed
SAVE_EVERY = 600.0  # seconds between saved states; each epoch ends with one too
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
    dataset: Dataset, side: int, batch_size: int, epoch: int, seed: int, first: int = 0
) -> Iterator[Batch]:
    """Yields an epoch's batches from `first` on, all of one size, while threads decode those that
    follow.

    Images that fill no batch are left out: others in each epoch, since the order is random.
    """

    def decode(i: int) -> np.ndarray:
        random = np.random.default_rng((seed, epoch, i))
        return random_crop(load_image(dataset.read(i), dataset.names[i]), side, random)

    order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
    batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)[first:]
    decoded = map_ahead(
        decode, batches.ravel().tolist(), workers=default_workers(), ahead=2 * batch_size
    )
    with contextlib.closing(decoded) as images:
        for batch in batches.tolist():
            labels = [dataset.labels[i][0] for i in batch]
            pixels = list(itertools.islice(images, batch_size))
            yield np.stack(pixels), np.array(labels, np.int32)


def learning_rates(highest: float, steps: int) -> np.ndarray:
    """That of each step: rising for a twentieth of them, then falling as a cosine does."""
    warmup = steps // 20
    schedule = optax.warmup_cosine_decay_schedule(highest / (warmup + 1), highest, warmup, steps)
    return np.asarray(schedule(np.arange(steps)), np.float32)


def shares_of_rate(
    params: nnx.State, depths: tuple[int, ...], layer_decay: float, offset_rate: float
) -> nnx.State:
    """Returns a factor on each parameter's learning rate: `layer_decay` for each layer that comes
    after its own, times `offset_rate` for the products that make offsets and centre scales."""

    def share(path: tuple[Any, ...], _: jax.Array) -> float:
        names = [part.key for part in path if hasattr(part, "key")]
        if names[0] not in ("patch_embed", "levels"):
            return 1.0
        if names[0] == "patch_embed":
            level, layer = 0, 0
        elif names[2] == "blocks":
            level, layer = names[1], names[3]
        else:  # between two levels, as the first layer of the next one
            level, layer = names[1], depths[names[1]]
        after = max(sum(depths[level:]) - layer - 1, 0)
        of_points = {"offset", "center_feature_scale_proj"} & set(names)
        return layer_decay**after * (offset_rate if of_points else 1.0)

    return jax.tree_util.tree_map_with_path(share, params)


def adamw(weight_decay: float, shares: Any) -> optax.GradientTransformation:
    """AdamW without the learning rate: scales updates by `shares`, and decays no vectors."""
    return optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(
            weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
        ),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: s * u, updates, shares)),
    )


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    smoothing: float,
) -> Callable[..., Any]:
    """Returns the compiled step. It takes parameters, statistics, the optimizer's state, pixels,
    labels, a key and the learning rate, and returns the first three anew, in the memory of the old
    ones, and the loss. The rate is an argument so that one program serves all rates."""

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, statistics, state, pixels, labels, key, rate):
        def loss_of(params):
            model = nnx.merge(graphdef, params, statistics, copy=True)
            logits = model(normalize(pixels, preprocessing), train=True, key=key)
            logits = logits.astype(jnp.float32)
            wanted = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
            loss = optax.softmax_cross_entropy(logits, wanted).mean()
            return loss, nnx.state(model, nnx.BatchStat)

        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(params, updates), statistics, state, loss

    return step


def open_training_set(folder: Path) -> tuple[Dataset, list[str]]:
    """The images in the folders in `folder`, and the names of these, which are the classes."""
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    if len(found) < 2:
        raise ValueError(f"{folder}: expected two class folders or more, got {len(found)}")
    for inner in (inner for path in found for inner in path.iterdir()):
        if inner.is_dir() and not is_hidden(inner.name):
            raise ValueError(f"{inner}: a folder in a class folder; give the one of class folders")
    dataset = open_dataset(folder, class_names=[path.name for path in found])
    seen = {label for labels in dataset.labels for label in labels}
    if empty := [path for i, path in enumerate(found) if i not in seen]:
        raise ValueError(f"{empty[0]}: no images of this class")
    return dataset, [path.name for path in found]


def load_model(args: argparse.Namespace, classes: list[str]) -> InternImage:
    """The model to begin with, its head of these classes; ImageNet's need no names."""
    head: dict[str, Any]
    if classes == [one.wnid for one in imagenet1k_classes()]:
        head = {"to_1k": True} if args.to_1k else {"num_classes": len(classes)}
    elif args.to_1k:
        raise ValueError(f"to-1k: {args.train} has not the class folders of ImageNet-1K")
    else:
        head = {"classes": classes}
    on_gpu = jax.default_backend() == "gpu"
    model = internimage_jax.from_pretrained(
        args.model,
        **head,
        drop_path_rate=args.drop_path_rate,
        image_size=args.image_size,
        dtype=args.dtype or ("bfloat16" if on_gpu else "float32"),
        param_dtype="float32",
        with_cp=args.recompute,
    )
    # A masked class, which has no counterpart among the 21,841, could not be learned.
    bias = model.head.bias
    assert bias is not None
    bias[...] = jnp.where(bias[...] == MASKED, 0, bias[...])
    return model


class States(contextlib.AbstractContextManager):
    """What training goes on from after a kill, in a folder that is there until it ends."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """`settings`, of JSON values, have to be those of the states that are there already."""
        self.folder, self.settings = folder, settings
        self.saved, self.ended = time.perf_counter(), False
        self.gone = folder.with_name(folder.name + ".ended")
        shutil.rmtree(self.gone, ignore_errors=True)  # of a run that was killed as it went away
        options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, held: Any) -> None:
        """Copies the state to the host, where a thread writes it."""
        state = ocp.args.StandardSave(jax.tree.leaves(held))
        settings = ocp.args.JsonSave(self.settings)
        self.manager.save(step, args=ocp.args.Composite(state=state, settings=settings))
        self.saved = time.perf_counter()

    def restore(self, held: Any) -> tuple[int, Any]:
        """Returns the number of steps done and the last saved state, laid out as `held`; 0 and
        `held` itself if there is none."""
        step = self.manager.latest_step()
        if step is None:
            return 0, held
        wanted = ocp.args.Composite(settings=ocp.args.JsonRestore())
        before = self.manager.restore(step, args=wanted)["settings"]
        for name, value in self.settings.items():
            if value != (had := before.get(name)):
                name = name.replace("_", " ")
                raise ValueError(
                    f"{name}: got {value}, expected {had}, as in {self.folder}; delete that to "
                    "begin anew"
                )
        leaves, tree = jax.tree.flatten(held)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, leaves)
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        return step, jax.tree.unflatten(tree, self.manager.restore(step, args=wanted)["state"])

    def __exit__(self, *_: object) -> None:
        self.manager.close()  # waits until all is written
        if self.ended:  # at once, and not file by file under its name
            self.folder.rename(self.gone)
            shutil.rmtree(self.gone)
        with contextlib.suppress(OSError):  # that it is not empty
            self.folder.rmdir()


def check(loss: float) -> float:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}; try a smaller --learning-rate")
    return loss


def check_numbers(args: argparse.Namespace, images: int, devices: int) -> None:
    for name, fits, expected in (
        ("epochs", args.epochs >= 1, "at least 1"),
        ("learning rate", args.learning_rate > 0, "more than 0"),
        ("weight decay", args.weight_decay >= 0, "at least 0"),
        ("label smoothing", 0 <= args.label_smoothing < 1, "0 to less than 1"),
        ("layer decay", 0 < args.layer_decay <= 1, "more than 0, at most 1"),
        ("offset rate", args.offset_rate >= 0, "at least 0"),
        ("seed", args.seed >= 0, "at least 0"),
    ):
        if not fits:
            got = getattr(args, name.replace(" ", "_"))
            raise ValueError(f"{name}: got {got}, expected {expected}")
    if not 1 <= args.batch_size <= images or args.batch_size % devices:
        raise ValueError(
            f"batch size: got {args.batch_size}, expected at most {images}, the number of "
            f"images, and a multiple of {devices}, the number of devices"
        )


def finetune(args: argparse.Namespace, unfinished: Path) -> None:
    if reason := no_devices():
        raise ValueError(f"no device: {reason}")
    dataset, classes = open_training_set(args.train)
    devices = jax.local_device_count()
    check_numbers(args, len(dataset), devices)
    model = load_model(args, classes)
    validation = open_dataset(args.validate, class_names=model.classes) if args.validate else None
    steps = len(dataset) // args.batch_size  # an epoch
    print(
        f"{len(dataset)} images of {len(classes)} classes, {devices} device(s), "
        f"{steps} steps an epoch",
        flush=True,
    )

    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)
    shares = shares_of_rate(params, model.config.depths, args.layer_decay, args.offset_rate)
    optimizer = adamw(args.weight_decay, shares)
    step = make_step(graphdef, optimizer, model.preprocessing, args.label_smoothing)
    rates = learning_rates(args.learning_rate, steps * args.epochs)
    # Parameters on each device, batches spread over all: XLA adds up the gradients.
    mesh = jax.make_mesh((devices,), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec("data"))
    held = jax.device_put((params, statistics, optimizer.init(params)), everywhere)
    key = jax.random.key(args.seed)

    others = {"train", "output", "validate", "resume", "recompute"}  # change no result
    settings = {name: value for name, value in vars(args).items() if name not in others}
    settings |= {"dtype": model.dtype.name, "images": len(dataset), "classes": classes}

    def write_and_validate(params: nnx.State, statistics: nnx.State) -> None:
        nnx.update(model, params, statistics)
        internimage_jax.save_pretrained(model, args.output)
        if validation:
            each = args.batch_size // devices
            report = evaluate(model, validation, batch_size=each, on_error="skip")
            skipped = f", not read: {n}" if (n := report["num_skipped"]) else ""
            print(f"top-1 on {args.validate}: {report['top1']:.2f} %{skipped}", flush=True)

    with States(unfinished, settings) as states:
        done, held = states.restore(held)  # steps, of all epochs together
        if done:
            print(f"goes on after {done} of {len(rates)} steps", flush=True)
            if done % steps == 0:  # which the kill may have come before
                write_and_validate(*held[:2])
        for epoch in range(done // steps + 1, args.epochs + 1):
            start, losses = time.perf_counter(), []
            side, first = model.preprocessing.image_size, done % steps
            batches = random_batches(dataset, side, args.batch_size, epoch, args.seed, first)
            for pixels, labels in prefetch_to_device(batches, lambda b: jax.device_put(b, spread)):
                own, rate = jax.random.fold_in(key, done), rates[done]
                *held, loss = step(*held, pixels, labels, own, rate)
                losses.append(loss)  # read later: to read it now would be to wait
                done += 1
                if len(losses) % EVERY == 0 and done % steps:
                    loss = check(float(np.mean(jax.device_get(losses[-EVERY:-2]))))
                    progress = f"  step {done % steps}/{steps}"
                    print(f"{progress}: loss {loss:.4f}, rate {rate:.1e}", flush=True)
                if time.perf_counter() - states.saved > SAVE_EVERY and done % steps:
                    check(float(losses[-1]))
                    states.save(done, held)
            loss = check(float(np.mean(jax.device_get(losses))))
            speed = len(losses) * args.batch_size / (time.perf_counter() - start)
            print(f"epoch {epoch}/{args.epochs}: loss {loss:.4f}, {speed:.1f} images/s", flush=True)
            states.save(done, held)
            write_and_validate(*held[:2])
        states.ended = True


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path, help="folder of class folders")
    parser.add_argument("output", type=Path, help="folder for the model, a new one")
    parser.add_argument("--model", default="internimage_t_1k_224", help="released name, or a path")
    parser.add_argument("--validate", type=Path, help="folder of class folders, after each epoch")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="of all devices together")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-4, help="the highest (default: 1e-4, for T to B)"
    )
    parser.add_argument(
        "--layer-decay", type=float, default=1.0, help="factor on the learning rate per later layer"
    )
    parser.add_argument(
        "--offset-rate", type=float, default=1.0, help="factor on the learning rate of offsets"
    )
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--drop-path-rate", type=float, default=0.1)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--image-size", type=int, help="pixels (default: the model's)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation; parameters are float32 (default: bfloat16 on a GPU, float32 on "
        "a CPU, where bfloat16 is the faster one if `internimage-jax info` names it or AMX)",
    )
    parser.add_argument("--recompute", action="store_true", help="save memory, take more time")
    parser.add_argument(
        "--to-1k", action="store_true", help="start from the 1,000 classes of a 21,841-class head"
    )
    parser.add_argument("--seed", type=int, default=0, help="of crops, order and stochastic depth")
    parser.add_argument("--resume", action="store_true", help="go on with a run that did not end")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    try:
        unfinished = args.output.resolve().with_name(args.output.resolve().name + ".unfinished")
        if unfinished.exists() and not args.resume:
            raise ValueError(
                f"{unfinished}: of a run that did not end; --resume goes on with it, or delete it"
            )
        if args.output.exists() and any(args.output.iterdir()) and not unfinished.exists():
            raise ValueError(f"{args.output}: is there already; choose another name")
        args.output.mkdir(parents=True, exist_ok=True)  # so that an error shows before training
        try:
            finetune(args, unfinished)
        finally:
            with contextlib.suppress(OSError):  # that it is not empty
                args.output.rmdir()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the next run need not compile anew
        with contextlib.suppress(OSError):  # that there is no home folder
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    main()

"""Label images with their most probable classes. Results go to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING

from internimage_jax.commands import add_model_arguments, output, say

if TYPE_CHECKING:
    from internimage_jax.predict import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE_OR_FOLDER",
        help="an image, or a folder for all images below it",
    )
    add_model_arguments(parser)
    parser.add_argument("--topk", type=int, metavar="K", help="classes an image (default: up to 5)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="images at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="an image that cannot be read ends the run, or is named on stderr (with --json by an "
        "object with an error) and left out (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object an image")


def run(args: argparse.Namespace) -> None:
    from PIL.Image import DecompressionBombWarning

    with warnings.catch_warnings():
        # Of an image this large PIL warns first; the error that follows says it all.
        warnings.simplefilter("error", DecompressionBombWarning)
        _run(args)


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from internimage_jax.image_files import find_images
    from internimage_jax.predict import Predictor
    from internimage_jax.pretrained import from_pretrained

    images = find_images(args.images)
    say(f"Loading {args.model}")
    model = from_pretrained(
        args.model,
        dtype=args.dtype,
        implementation=args.implementation,
        image_size=args.image_size,
    )
    batch_size = min(args.batch_size, len(images))  # a few images need no large batch
    say(f"Compiling for batches of {batch_size}")
    predictor = Predictor(model, batch_size=batch_size, topk=args.topk)
    with Progress(
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        # Where the results go to a terminal, they show the progress and a bar would be in the way.
        disable=sys.stdout.isatty() or not sys.stderr.isatty(),
    ) as progress:
        predictions = predictor(images, on_error=args.on_error)
        skipped = 0
        for prediction in progress.track(predictions, len(images), description="Images"):
            skipped += prediction.error is not None
            if args.json:
                print_json(prediction, model.name)
            elif prediction.error is not None:
                print("skipped:", prediction.error, file=sys.stderr)
            else:
                print_table(prediction)
    if skipped == len(images):
        raise ValueError(f"none of the {skipped} images could be read")


def print_json(prediction: Prediction, model: str) -> None:
    """Prints {"file", "model", "predictions": [{"index", "wnid", "name", "probability"}, ...]}.

    Of an image that could not be read there are no predictions, and "error" says why.
    """
    classes = [asdict(one) for one in prediction.classes]
    line = {"file": prediction.file, "model": model, "predictions": classes}
    if prediction.error is not None:
        line["error"] = prediction.error
    print(json.dumps(line), flush=True)


def print_table(prediction: Prediction) -> None:
    """Prints the image's path and its classes, a row each."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from internimage_jax.messages import printable

    table = Table(box=SIMPLE_HEAD)
    table.add_column("class", justify="right")
    table.add_column("WordNet id", no_wrap=True)
    table.add_column("probability", justify="right")
    table.add_column("name")
    for one in prediction.classes:
        table.add_row(str(one.index), one.wnid or "", f"{one.probability:.2%}", one.name)
    console = output()
    console.print(printable(prediction.file), style="bold", soft_wrap=True)
    console.print(table)

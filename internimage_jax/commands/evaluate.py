"""Evaluate a model on ImageNet, or on classes of its own; the result goes to stdout."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from internimage_jax.commands import add_model_arguments, output

if TYPE_CHECKING:
    from internimage_jax.processes import Group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="images with labels: a folder or a file")
    add_model_arguments(parser)
    parser.add_argument(
        "--labels", metavar="FILE", help="labels of the images where DATA has none, or ReaL's"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="images at a time on each device (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="images decoded at a time (default: as many as there are cores, at most 32)",
    )
    parser.add_argument(
        "--num-images", type=int, metavar="N", help="so many, evenly spaced (default: all)"
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="what a damaged image does (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the predictions, as they come, and the report in JSON and HTML",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where the evaluation in --output was ended"
    )
    parser.add_argument(
        "--parallel",
        choices=("pmap", "fsdp"),
        default="pmap",
        help="fsdp spreads the parameters over the devices (default: %(default)s)",
    )
    processes = parser.add_argument_group(
        "several processes", "the same command on each host; together they count every image once"
    )
    processes.add_argument(
        "--distributed",
        action="store_true",
        help="find the others as jax.distributed does: under Slurm, Open MPI or on TPUs",
    )
    processes.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 can be reached"
    )
    processes.add_argument("--num-processes", type=int, metavar="N")
    processes.add_argument("--process-id", type=int, metavar="K", help="0 to N - 1")
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object")


def run(args: argparse.Namespace) -> None:
    from internimage_jax.processes import Group, join

    alone = not args.distributed and args.coordinator is None
    if alone and (args.num_processes is not None or args.process_id is not None):
        raise ValueError("--num-processes and --process-id: need --coordinator HOST:PORT")
    if args.distributed and args.coordinator is not None:
        raise ValueError("--distributed and --coordinator exclude each other, got both")
    if alone:
        try:
            report = _evaluate(args, Group())
        except KeyboardInterrupt:
            if args.output is not None and os.path.isdir(args.output):
                print(f"interrupted; --resume goes on with {args.output}", file=sys.stderr)
            raise
    else:
        # Of what the runtime logs while the processes meet and part, nothing is an error of theirs.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with join(args.coordinator, args.num_processes, args.process_id) as group:
            report = _evaluate(args, group)
            if group.index > 0:
                return
    if args.json:
        print(json.dumps(report))
    else:
        print_table(report, args.output)


def _evaluate(args: argparse.Namespace, group: Group) -> dict[str, Any]:
    from PIL.Image import DecompressionBombWarning
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from internimage_jax.evaluate import evaluate

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with (
        warnings.catch_warnings(),
        Progress(
            *columns,
            console=console,
            transient=True,
            redirect_stdout=False,
            disable=not console.is_terminal or group.index > 0,
        ) as bar,
    ):
        # Of an image this large PIL warns first; the error that follows says it all.
        warnings.simplefilter("error", DecompressionBombWarning)
        task = bar.add_task("Loading and compiling", total=None, figures="")
        first: list[float] = []  # when the first batch was done, and how many images there were

        def show(done: int, total: int, right: int, evaluated: int) -> None:
            now = time.monotonic()
            if not first:
                first.extend((now, done))
            rate = (done - first[1]) / (now - first[0]) if now > first[0] else 0
            figures = f"top-1 {100 * right / evaluated:.2f} %" if evaluated else ""
            figures += f"  {rate:.1f} images/s" if rate else ""
            bar.update(task, description="Images", completed=done, total=total, figures=figures)

        return evaluate(
            args.model,
            args.data,
            batch_size=args.batch_size,
            dtype=args.dtype,
            implementation=args.implementation,
            image_size=args.image_size,
            workers=args.workers,
            num_images=args.num_images,
            labels=args.labels,
            output=args.output,
            resume=args.resume,
            parallel=args.parallel,
            on_error=args.on_error,
            group=group,
            progress=show,
        )


def print_table(report: dict[str, Any], folder: str | None) -> None:
    """Prints the figures of a report, and where the rest is."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for key, name in (("top1", "top-1"), ("top5", "top-5")):
        low, high = report[f"{key}_interval"]
        table.add_row(name, f"{report[key]:.3f} %  (95 % interval {low:.2f} to {high:.2f})")
    skipped = f", {report['num_skipped']:,} skipped" if report["num_skipped"] else ""
    table.add_row("images", f"{report['num_images']:,}{skipped}")
    error = report["calibration"]["expected_calibration_error"]
    table.add_row("calibration error", f"{error:.2f} %")
    if report["images_per_second"] is not None:
        table.add_row("speed", f"{report['images_per_second']:,.1f} images/s")
    table.add_section()
    table.add_row("model", f"{report['model']}, {report['dtype']}, {report['implementation']}")
    table.add_row("data", f"{report['source']} ({report['dataset']['kind']})")
    for note in report["notes"]:
        table.add_row("note", note)
    if folder is not None:
        table.add_row("report", os.path.join(folder, "report.html"))
    output().print(table)

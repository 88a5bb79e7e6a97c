"""Evaluate a model on ImageNet, in any form it comes in. Results go to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from internimage_jax.commands import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="images with labels: a folder or a file")
    parser.add_argument(
        "--model",
        default="internimage_t_1k_224",
        metavar="NAME_OR_PATH",
        help="a released model (see `list`), or a checkpoint's path (default: %(default)s)",
    )
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
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of parameters and computation (default: %(default)s)",
    )
    parser.add_argument(
        "--implementation",
        choices=("kernel", "gather"),
        help="of DCNv3 (default: the kernel where there is one, see `info`)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="images decoded at a time (default: as many as there are cores)",
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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn

    from internimage_jax.evaluate import evaluate
    from internimage_jax.processes import Group

    report = evaluate(
        args.model,
        args.data,
        batch_size=args.batch_size,
        dtype=args.dtype,
        implementation=args.implementation,
        workers=args.workers,
        num_images=args.num_images,
        labels=args.labels,
        output=args.output,
        resume=args.resume,
        parallel=args.parallel,
        on_error=args.on_error,
    )
    print(json.dumps(report))

"""Compare two evaluations image by image, with McNemar's test."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from internimage_jax.commands import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(
            name, metavar=name.upper(), help="output folder of `evaluate`, or predictions.jsonl"
        )
    parser.add_argument(
        "--show",
        type=int,
        default=20,
        metavar="N",
        help="images where one alone was right to list (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object, with all images")


def run(args: argparse.Namespace) -> None:
    from internimage_jax.comparison import compare
    from internimage_jax.evaluation_folder import classes_beside
    from internimage_jax.predictions import read_predictions

    if args.show < 0:
        raise ValueError(f"--show: expected at least 0, got {args.show}")

    found = compare(read_predictions(args.a), read_predictions(args.b))
    classes = [one for one in map(classes_beside, (args.a, args.b)) if one is not None]
    names = [[one.name for one in several] for several in classes]
    if len(names) == 2 and names[0] != names[1]:
        raise ValueError(f"{args.a} and {args.b}: are of different classes")
    unfinished = [path for path in (args.a, args.b) if _is_unfinished(path)]
    if args.json:
        print(json.dumps({"a": args.a, "b": args.b, "unfinished": unfinished, **found}))
        return
    _print(found, args.a, args.b, args.show, names[0] if names else ())
    for path in unfinished:
        output().print(f"{path}: the evaluation is not finished; --resume goes on with it")


def _is_unfinished(path: str) -> bool:
    from internimage_jax.evaluation_folder import REPORT

    return os.path.isdir(path) and not os.path.exists(os.path.join(path, REPORT))


def _print(found: dict[str, Any], a: str, b: str, shown: int, names: Sequence[str]) -> None:
    from rich.box import SIMPLE, SIMPLE_HEAD
    from rich.table import Table

    count = found["num_images"]
    table = Table(box=SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("A", a)
    table.add_row("B", b)
    left_out = found["only_in_a"], found["only_in_b"]
    also = f"; {left_out[0]:,} more in A, {left_out[1]:,} more in B" if any(left_out) else ""
    table.add_row("images", f"{count:,} in both{also}")
    table.add_row("top-1", f"A {found['top1_a']:.3f} %, B {found['top1_b']:.3f} %")
    table.add_row(
        "same class", f"{found['same_class']:,} ({100 * found['same_class'] / count:.2f} %)"
    )
    table.add_section()
    for key, name in (
        ("both_right", "both right"),
        ("only_a_right", "A alone right"),
        ("only_b_right", "B alone right"),
        ("both_wrong", "both wrong"),
    ):
        table.add_row(name, f"{found[key]:,}")
    table.add_row("McNemar's test", f"p = {found['p_value']:.4g} (exact, two-sided)")
    output().print(table)
    if not (differences := found["differences"][:shown]):
        return
    table = Table(box=SIMPLE_HEAD)
    for heading in ("file", "label", "A", "B"):
        table.add_column(heading)

    def called(index: int) -> str:
        return names[index] if index < len(names) else f"class {index}"

    for one in differences:
        labels = ", ".join(map(called, one["labels"]))
        said = (f"{called(one[side]['class'])} {one[side]['probability']:.1%}" for side in "ab")
        table.add_row(one["file"], labels, *said)
    output().print(table)
    if left := len(found["differences"]) - len(differences):
        output().print(f"and {left:,} more; --show {len(found['differences'])} lists them all")

"""List the released models with their sizes, costs and accuracies."""

from __future__ import annotations

import argparse
import json
from typing import Any

from internimage_jax.commands import output
from internimage_jax.config import ReleasedModel, list_models, released_model
from internimage_jax.shapes import multiply_adds, num_parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="such as 'internimage_l*'"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a model")


def run(args: argparse.Namespace) -> None:
    names = list_models(args.pattern)
    if not names:
        everything = ", ".join(list_models())
        raise ValueError(f"no released model matches {args.pattern!r}, out of {everything}")
    rows = [_describe(released_model(name)) for name in names]
    if args.json:
        for row in rows:
            print(json.dumps(row))
    else:
        _print_table(rows)


def _describe(model: ReleasedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "image_size": model.image_size,
        "num_classes": model.config.num_classes,
        "parameters": num_parameters(model.config),
        "multiply_adds": multiply_adds(model.config, model.image_size),
        "top1": model.accuracy,
        "pretraining": model.pretraining,
        "license": model.license,
        "repository": model.repository,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, caption="top-1 in percent on ImageNet-1K, as the model cards have it")
    table.add_column("model", no_wrap=True)
    for heading in ("image size", "classes", "parameters", "multiply-adds", "top-1"):
        table.add_column(heading, justify="right")
    table.add_column("licence")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["image_size"]),
            f"{row['num_classes']:,}",
            f"{row['parameters'] / 1e6:,.1f} M",
            f"{row['multiply_adds'] / 1e9:,.0f} G",
            "" if row["top1"] is None else f"{row['top1']:.1f}",
            row["license"],
        )
    output().print(table)

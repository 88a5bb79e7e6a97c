"""The commands of `python -m internimage_jax`, a module each.

A module's docstring is the command's help; `add_arguments(parser)` declares its arguments and
`run(args)` is what it does. The modules are imported at every start, so JAX, and whatever imports
it, is imported where it is used.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def output() -> Console:
    """Returns the console for tables; it takes no name for markup and folds no line in a pipe."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    return Console(markup=False, emoji=False, highlight=False, width=width)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments by which a command is told its model."""
    parser.add_argument(
        "--model",
        default="internimage_t_1k_224",
        metavar="NAME_OR_PATH",
        help="a released model (see `list`), or a checkpoint's path (default: %(default)s)",
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
        "--image-size", type=int, metavar="PIXELS", help="side of the images (default: the model's)"
    )


def no_devices() -> str | None:
    """Returns why JAX finds no device, or None where it finds some."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX has both where a platform is missing
        reason = " ".join(str(error).split()) or "JAX finds none"
        if asked := os.environ.get("JAX_PLATFORMS"):
            reason += f" (JAX_PLATFORMS is {asked})"
        return reason
    return None


def say(text: str) -> None:
    """Tells who watches a terminal what is going on."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)

"""The commands of `python -m internimage_jax`, a module each.

A module's docstring is the command's help; `add_arguments(parser)` declares its arguments and
`run(args)` is what it does. The modules are imported at every start, so JAX, and whatever imports
it, is imported where it is used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def output() -> Console:
    """Returns the console for tables; it takes no name for markup and folds no line in a pipe."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    return Console(markup=False, emoji=False, highlight=False, width=width)


def say(text: str) -> None:
    """Tells who watches a terminal what is going on."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)

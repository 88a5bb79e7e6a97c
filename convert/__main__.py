"""The command line: python -m convert SOURCE OUT."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from typing import Any, NoReturn

from convert.conversion import DTYPES, convert


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts a checkpoint of InternImage, or converts it back.",
    )
    parser.add_argument("source", help="checkpoint: a file, an index of shards, or a folder")
    parser.add_argument("out", help="folder to write, or with --to-torch the .pth file")
    parser.add_argument(
        "--model",
        help="released name, or config.json, of the model; needed where neither a config.json "
        "nor the file's name says it",
    )
    parser.add_argument(
        "--weights",
        choices=("model", "ema"),
        default="model",
        help="which weights of a training run",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the arrays written"
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="K",
        help="keep a head of K classes, else make a new one; 0 for none",
    )
    parser.add_argument(
        "--to-1k", action="store_true", help="take the 1,000 ImageNet-1K classes out of 21,841"
    )
    parser.add_argument(
        "--to-torch", action="store_true", help="write a .pth that the official code loads"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    signal.signal(signal.SIGTERM, _stop)
    try:
        out = convert(**vars(options))
    except (ValueError, OSError) as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(out)
    return 0


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)  # lets `convert` clean up


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m internimage_jax COMMAND ...`, or `internimage-jax COMMAND ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from internimage_jax.cache import keep_compiled_programs
from internimage_jax.commands import compare, demo, evaluate, info, models, no_devices, predict
from internimage_jax.evaluation_settings import versions
from internimage_jax.messages import one_line

COMMANDS = {
    "predict": predict,
    "evaluate": evaluate,
    "compare": compare,
    "list": models,
    "info": info,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit status: 0, 1 after an error (one line on stderr), or 130 after Ctrl-C.

    Raises:
        SystemExit: `argv` is no valid command line (status 2), or asks for help (0).
    """
    args = _parser().parse_args(argv)
    if not args.no_compilation_cache:
        keep_compiled_programs()
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its exit
        return 1
    except (RuntimeError, AssertionError):
        if args.traceback or not (reason := no_devices()):
            raise
        print("error: no device:", reason, file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print("error:", one_line(error), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="internimage-jax", description="InternImage image classification in JAX."
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the version of internimage-jax"
    )
    parser.set_defaults(traceback=False, no_compilation_cache=False)
    _add_common_arguments(parser)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        summary = text[:1].lower() + text[1:].partition(".")[0]
        command = commands.add_parser(name, help=summary, description=text)
        module.add_arguments(command)
        _add_common_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    # Before the command and after it: no default, with which the second would undo the first.
    parser.add_argument(
        "--traceback",
        action="store_true",
        default=argparse.SUPPRESS,
        help="after an error, show where it came from",
    )
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        default=argparse.SUPPRESS,
        help="compile anew; otherwise compiled programs are kept in the user's cache folder",
    )


class _Version(argparse.Action):
    """As argparse's own, but the version is looked up where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print("internimage-jax", versions()["internimage-jax"] or "(not installed)")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())

"""Converts in processes of its own that are struck at a chosen moment, and says what they left.

Run as `python -m tests.interrupted_conversions FOLDER`, FOLDER having the checkpoints "old" and
"new"; it writes one JSON object a strike.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from convert.__main__ import main

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
NOT_STRUCK = 99
# What is struck, and how.
# "new": the output is not there before; "replaced": it is; "torch": it is, and is a .pth.
# "kill", "terminate" and "interrupt" are signals, "error" is a full disk: before the first, the
# second, ... operation on a file, until a conversion has no more of them. "any moment" is a kill
# in the midst of one of many conversions.
STRIKES = (
    *((kind, how) for kind in ("new", "replaced", "torch") for how in ("kill", "error")),
    *(("replaced", how) for how in ("terminate", "interrupt", "any moment")),
    ("torch", "any moment"),
)


def strike_before(operation: int, how: str, folder: Path) -> list[int]:
    """Lets the process be struck; returns a list of one item, the number of operations so far."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(str(folder)):
            count[0] += 1
            if count[0] == operation and how == "error":
                raise OSError(28, "No space left on device", str(arguments[0]))
            if count[0] == operation:
                os.kill(os.getpid(), SIGNALS[how])

    sys.addaudithook(hook)
    return count


def converted(source: Path, out: Path) -> int:
    """Runs the command in this process and returns its exit status."""
    try:
        return main([str(source), str(out), *["--to-torch"][: int(out.suffix == ".pth")]])
    except SystemExit as stop:
        return int(str(stop.code))


def in_a_process(how: str, operation: int, folder: Path, source: Path, out: Path) -> int:
    """Converts in a process that is struck; returns its exit status, or minus its signal."""
    process = os.fork()
    if process == 0:
        error = os.open(folder / "stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(error, 2)
        os.dup2(error, 1)
        count = strike_before(operation, how, folder / "place")
        status = converted(source, out)
        os._exit(status if count[0] >= operation else NOT_STRUCK)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_at_any_moment(folder: Path, sources: list[Path], out: Path) -> int:
    """Kills a process that converts again and again; returns minus the signal."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        while True:
            for source in sources:
                converted(source, out)
    time.sleep(random.uniform(0, 0.15))
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(path: Path) -> dict[str, bytes] | bytes | None:
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    return path.read_bytes() if path.exists() else None


def run(folder: Path, kind: str, how: str) -> None:
    """Strikes conversions of folder/new to a place where folder/old was converted to."""
    out = folder / "place" / ("out.pth" if kind == "torch" else "out")
    states: dict[str, Any] = {"none": None}
    for name in ("old", "new"):
        converted(folder / name, folder / name / out.name)
        states[name] = content(folder / name / out.name)
    if kind == "new":
        del states["old"]
    for operation in range(1, 200):
        shutil.rmtree(folder / "place", ignore_errors=True)
        (folder / "place").mkdir()
        if kind == "replaced":
            shutil.copytree(folder / "old" / out.name, out)
        elif kind == "torch":
            shutil.copyfile(folder / "old" / out.name, out)
        if how == "any moment":
            status = killed_at_any_moment(folder, [folder / "new", folder / "old"], out)
        else:
            status = in_a_process(how, operation, folder, folder / "new", out)
        found = content(out)
        report = {
            "strike": [kind, how],
            "status": status,
            "out": next((name for name, state in states.items() if state == found), "half"),
            "beside": sorted(path.name for path in out.parent.iterdir() if path != out),
            "message": (folder / "stderr").read_text() if how != "any moment" else "",
        }
        report["next status"] = converted(folder / "new", out)
        report["next"] = "new" if content(out) == states["new"] else "half"
        report["then beside"] = sorted(p.name for p in out.parent.iterdir() if p != out)
        print(json.dumps(report), file=sys.stderr, flush=True)
        if status == NOT_STRUCK or (how == "any moment" and operation == 12):
            return


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # that a process with JAX in it forks
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    for strike in STRIKES:
        run(Path(sys.argv[1]), *strike)

"""Whatever stops a conversion, there is the old output, or none, or the new one; never half."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import convert
from convert.__main__ import main
from convert.export import moved_when_done
from internimage_jax.config import InternImageConfig
from tests.recipe_checkpoints import CONFIG, weights, write

ROOT = Path(__file__).parent.parent
TINY = InternImageConfig(channels=4, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), num_classes=2)


Reports = dict[tuple[str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What conversions left that were struck; see the module that strikes them."""
    folder = tmp_path_factory.mktemp("struck")
    write(folder / "old", "hf", TINY)
    write(folder / "new", "hf-bin", TINY, arrays={n: a * 2 for n, a in weights(TINY).items()})
    command = [sys.executable, "-m", "tests.interrupted_conversions", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: Reports = {}
    for line in done.stderr.splitlines():
        report = json.loads(line)
        found.setdefault(tuple(report["strike"]), []).append(report)
    return found


def assert_recovered(report: dict[str, Any]) -> None:
    """The next conversion succeeds and removes what the last one left."""
    assert report["next status"] == 0
    assert report["next"] == "new"
    assert report["then beside"] == []


@pytest.mark.parametrize("kind", ["new", "replaced", "torch"])
def test_killed_before_any_file_operation_leaves_no_half(kind: str, reports: Reports) -> None:
    *struck, last = reports[kind, "kill"]
    assert len(struck) >= 2
    for report in struck:
        assert report["status"] == -9
        assert_recovered(report)
        if report["out"] == "none" and kind != "new":
            # One folder cannot replace another in one step. The old one is there, and put back.
            assert any(name.endswith(".replaced") for name in report["beside"])
        else:
            assert report["out"] in ("old", "new", "none")
    assert any(name.endswith(".unfinished") for report in struck for name in report["beside"])
    assert last["out"] == "new"
    assert last["beside"] == []


@pytest.mark.parametrize("kind", ["replaced", "torch"])
def test_killed_at_any_moment_leaves_no_half(kind: str, reports: Reports) -> None:
    for report in reports[kind, "any moment"]:
        assert report["status"] == -9
        assert report["out"] in ("old", "new", "none")
        assert report["out"] != "none" or report["beside"]
        assert_recovered(report)


@pytest.mark.parametrize(("how", "status"), [("terminate", 143), ("interrupt", 130)])
def test_terminated_or_interrupted_leaves_nothing_behind(
    how: str, status: int, reports: Reports
) -> None:
    *struck, last = reports["replaced", how]
    assert last["out"] == "new"
    for report in struck:
        assert report["status"] == status
        assert report["out"] in ("old", "new")
        assert report["beside"] == []
        assert report["message"] in ("", "interrupted\n")
        assert_recovered(report)


@pytest.mark.parametrize("kind", ["new", "replaced", "torch"])
def test_an_error_of_any_file_operation_is_one_line_and_leaves_nothing_behind(
    kind: str, reports: Reports
) -> None:
    *struck, last = reports[kind, "error"]
    assert last["out"] == "new"
    assert [report for report in struck if report["out"] != "new"]
    for report in struck:
        assert report["beside"] == []
        if (
            report["out"] == "new"
        ):  # the old one could not be removed, or a second attempt went well
            continue
        assert report["out"] == ("none" if kind == "new" else "old")
        assert report["status"] == 1
        named = report["message"].removeprefix("error: [Errno 28] No space left on device: ")
        assert re.fullmatch(r"'.*/place/out.*'\n", named)
        assert_recovered(report)


# ---- in this process


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Makes writes fail beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to_torch", [False, True])
@pytest.mark.parametrize("size", [0, 100, 10_000, 100_000])
def test_a_full_disk_is_one_line_that_names_the_output(size, to_torch, tmp_path, capsys) -> None:
    source = write(tmp_path / "hf", "hf")
    arguments = [str(source), str(tmp_path / "out"), *["--to-torch"][: int(to_torch)]]
    with largest_file(size):
        assert main(arguments) == 1
    assert list(tmp_path.iterdir()) == [source]
    message = f"error: [Errno 27] File too large: '{tmp_path / 'out'}'\n"
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize("to_torch", [False, True])
def test_an_error_midway_keeps_the_old_output(to_torch, tmp_path) -> None:
    out = tmp_path / "out"
    convert(write(tmp_path / "good", "hf"), out, to_torch=to_torch)
    before = {path: path.read_bytes() for path in (out, *out.rglob("*")) if path.is_file()}
    arrays = weights(CONFIG)
    arrays["head.bias"] = np.full(10, np.nan, np.float32)  # the last that is read
    bad = write(tmp_path / "bad", "hf", arrays=arrays)
    with pytest.raises(ValueError, match="not finite"):
        convert(bad, out, to_torch=to_torch)
    assert {p: p.read_bytes() for p in (out, *out.rglob("*")) if p.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "out"]


def write_folder(folder: Path, text: str) -> None:
    """Writes what passes for a converted folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"format": "internimage_jax", "text": text}))


def text_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["text"]


def name_beside(out: Path, pid: int, suffix: str, host: str = socket.gethostname()) -> Path:
    return out.with_name(f".{out.name}.{host}.{pid}-00000000{suffix}")


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_was_replacing_is_put_back_even_if_the_next_one_fails(
    tmp_path, dead
) -> None:
    out = tmp_path / "out"
    write_folder(name_beside(out, dead, ".replaced"), "old")
    write_folder(name_beside(out, dead, ".unfinished"), "half")
    with pytest.raises(ValueError, match="no good"), moved_when_done(out):
        raise ValueError("no good")
    assert text_of(out) == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_what_other_processes_are_writing_is_left_alone(tmp_path, dead) -> None:
    out = tmp_path / "out"
    others = [
        name_beside(out, os.getppid(), ".unfinished"),
        name_beside(out, os.getpid(), ".unfinished"),  # of another thread
        name_beside(out, dead, ".unfinished", host="another"),
        name_beside(tmp_path / "out2", dead, ".unfinished"),
        name_beside(tmp_path / f"out.{socket.gethostname()}.{dead}", dead, ".unfinished"),
        name_beside(out, dead, ".txt"),
        tmp_path / ".out.mine.unfinished",
    ]
    for path in others:
        path.mkdir()
    with moved_when_done(out) as unfinished:
        write_folder(unfinished, "new")
    assert text_of(out) == "new"
    assert sorted(tmp_path.iterdir()) == sorted([out, *others])


def test_threads_may_write_the_same_output_at_once(tmp_path) -> None:
    out, both_inside = tmp_path / "out", threading.Barrier(2)
    outcomes = []

    def run(text: str) -> None:
        try:
            with moved_when_done(out) as unfinished:
                write_folder(unfinished, text)
                both_inside.wait()
            outcomes.append("done")
        except OSError as error:  # lost a race for the last step
            outcomes.append(f"{error.filename}")

    threads = [threading.Thread(target=run, args=(text,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "done" in outcomes
    assert set(outcomes) <= {"done", str(out)}
    assert text_of(out) in ("a", "b")
    assert list(tmp_path.iterdir()) == [out]

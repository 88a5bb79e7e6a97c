"""The predictions file: a JSON object a line for each image, written as an evaluation goes.

    {"index": 0, "file": "n01440764/a.JPEG", "labels": [0], "top5": [0, 391, 389, 394, 758],
     "probabilities": [0.93, 0.02, 0.01, 0.01, 0.0]}
    {"index": 1, "file": "n01440764/b.JPEG", "labels": [0], "error": "the file is empty"}

A process that is killed leaves at most one torn line, the last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What an evaluation found for one image.

    Args:
        index: Its place in the dataset.
        file: Its name in the dataset.
        labels: The classes that count as right.
        top5: The most probable classes, best first; none for a skipped image.
        probabilities: Of `top5`, float32 values.
        error: Why the image was skipped, or None.
    """

    index: int
    file: str
    labels: tuple[int, ...]
    top5: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None

    @property
    def right(self) -> bool:
        """Whether the most probable class is among the labels."""
        return self.top5[:1] != () and self.top5[0] in self.labels

    @property
    def right5(self) -> bool:
        """Whether one of the five most probable classes is among the labels."""
        return any(one in self.labels for one in self.top5)


def to_lines(results: Iterable[ImageResult]) -> bytes:
    """The lines of `results`."""
    return "".join(json.dumps(_values(one)) + "\n" for one in results).encode("ascii")


def from_lines(data: bytes, name: str, *, torn: bool = False) -> list[ImageResult]:
    """Reads what `to_lines` wrote.

    Args:
        data: The lines.
        name: What errors call them.
        torn: Leaves out a last line that is not complete.

    Raises:
        ValueError: A line is not of this format; the message has its number.
    """
    lines = data.split(b"\n")
    if lines.pop() and not torn:
        raise ValueError(f"{name}, line {len(lines) + 1}: ends in the middle")
    return [_read_line(line, f"{name}, line {number}") for number, line in enumerate(lines, 1)]


def read_predictions(path: str | os.PathLike[str]) -> list[ImageResult]:
    """Reads a predictions file, or that of an evaluation's output folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A line is not of this format; the message has its number.
    """
    file = Path(path)
    if file.is_dir():
        file = file / PREDICTIONS
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; `evaluate --output` writes it") from None
    results = from_lines(data, str(file))
    if not results:
        raise ValueError(f"{file}: has no predictions")
    return results


class PredictionsWriter:
    """Appends to a predictions file.

    Args:
        path: Of the file.
        kept: Results that the file begins with; whatever else it holds is dropped.

    Raises:
        OSError: The file cannot be written; so while writing, and what was written before stays.
    """

    def __init__(self, path: Path, kept: Sequence[ImageResult]):
        self._path = path
        start = to_lines(kept)
        present = path.read_bytes() if path.exists() else b""
        if present[: len(start)] != start:  # impossible, unless somebody edited the file
            raise ValueError(
                f"{path}: was not written by this version; start anew without --resume"
            )
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
            self._file.truncate(len(start))
        except OSError as error:
            raise cannot_write(path, error) from None

    def write(self, results: Sequence[ImageResult]) -> None:
        """Writes a line for each result, at once: nothing waits in a buffer of this process."""
        data = memoryview(to_lines(results))
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise cannot_write(self._path, error) from None

    def close(self) -> None:
        self._file.close()


def cannot_write(path: Path, error: OSError) -> OSError:
    """`error` in words that name the file or folder."""
    return OSError(f"{path}: cannot be written ({error.strerror})")


def _values(result: ImageResult) -> dict[str, Any]:
    start = {"index": result.index, "file": result.file, "labels": result.labels}
    if result.error is not None:
        return start | {"error": result.error}
    return start | {"top5": result.top5, "probabilities": result.probabilities}


def _read_line(line: bytes, name: str) -> ImageResult:
    try:
        values = json.loads(line)
        result = ImageResult(
            int(values["index"]),
            str(values["file"]),
            tuple(map(int, values["labels"])),
            tuple(map(int, values.get("top5", ()))),
            tuple(map(float, values.get("probabilities", ()))),
            values.get("error"),
        )
        classes = {*result.labels, *result.top5}
        whole = (
            result.labels
            and min(classes) >= 0
            and (result.error is None) == bool(result.top5)
            and len(result.top5) == len(result.probabilities)
            and all(0 <= one <= 1 for one in result.probabilities)
            and isinstance(result.error, str | None)
        )
        if not whole:
            raise ValueError
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        shown = line[:60].decode("ascii", "replace")
        raise ValueError(
            f"{name}: got {shown!r}, expected an object with index, file, labels, top5 and "
            "probabilities, or error"
        ) from None
    return result

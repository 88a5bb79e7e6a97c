"""The folder that an evaluation writes: settings, predictions as they come, and the report."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internimage_jax.evaluation_settings import differences
from internimage_jax.labels import ImageClass
from internimage_jax.predictions import (
    PREDICTIONS,
    ImageResult,
    PredictionsWriter,
    cannot_write,
    from_lines,
    to_lines,
)
from internimage_jax.report import classes_of

SETTINGS = "settings.json"
REPORT = "report.json"
PAGE = "report.html"


def classes_beside(predictions: str | os.PathLike[str]) -> Sequence[ImageClass] | None:
    """The classes that an evaluation's predictions index, from the settings beside them.

    predictions: The file, or the folder that it is in.

    Returns None where there are no settings. Raises ValueError where they are damaged.
    """
    path = Path(predictions)
    file = (path if path.is_dir() else path.parent) / SETTINGS
    try:
        return classes_of(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{file}: is damaged") from None


class EvaluationFolder:
    """Keeps what an evaluation has done, so that another process can go on.

    Of several processes, each writes a predictions file of its own, and the first one joins them at
    the end. The folder may be one that all see, or one on each host.

    Args:
        path: Made where it is not there.
        resume: Goes on with the evaluation that is in it.
        index: Of this process.
        count: Of processes.

    Raises:
        FileExistsError: There is an evaluation and `resume` is not set, or there is a file in the
            folder's place.
        OSError: The folder may not be written.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool, index: int = 0, count: int = 1):
        self.path = Path(path)
        self._resume, self._first = resume, index == 0
        self._own = self.path / PREDICTIONS
        if count > 1:
            self._own = self.path / f"predictions-{index}-of-{count}.jsonl"
        self._writer: PredictionsWriter | None = None
        there = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not there.is_dir():
            raise FileExistsError(f"{there}: is a file; the output is a folder")
        if not os.access(there, os.W_OK):
            raise OSError(f"{there}: cannot be written (Permission denied)")
        if not resume and any(self.path.glob("predictions*.jsonl")):
            raise FileExistsError(
                f"{self.path}: holds an evaluation; --resume (resume=True) goes on with it, or "
                "choose another folder"
            )

    def done(self, settings: dict[str, Any], batch: int, images: int) -> list[ImageResult]:
        """Returns what can be kept of the evaluation that is resumed; writes nothing.

        Args:
            settings: What the results depend on; JSON values.
            batch: Images of a batch. A last batch that is not complete is evaluated again: with
                other neighbours the last digits of its probabilities might be others.
            images: How many there are for this process.

        Raises:
            ValueError: The folder's evaluation had other settings, or its files are damaged.
        """
        if not self._resume or not self.path.exists():
            return []
        if self._own.exists() or (self.path / SETTINGS).exists():
            self._check_settings(settings)
        if not self._own.exists():
            return []
        found = from_lines(self._own.read_bytes(), str(self._own), torn=True)
        return found if len(found) >= images else found[: len(found) // batch * batch]

    def open(self, settings: dict[str, Any], done: Sequence[ImageResult]) -> None:
        """Opens the predictions file, which is to begin with `done`; used as a context manager,
        the folder closes it.

        Raises:
            OSError: A file cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        if self._first or not (self.path / SETTINGS).exists():
            self._write(SETTINGS, json.dumps(settings, indent=2) + "\n")
        self._writer = PredictionsWriter(self._own, done)

    def write(self, results: Sequence[ImageResult]) -> None:
        """Appends to the predictions; after this, a kill does not lose them."""
        assert self._writer is not None
        self._writer.write(results)

    def finish(self, report: dict[str, Any], page: str, results: Sequence[ImageResult]) -> None:
        """Writes the report and, of several processes, the predictions of all."""
        if not self._first:
            return
        if self._own.name != PREDICTIONS:
            self._write(PREDICTIONS, to_lines(results).decode("ascii"))
        self._write(PAGE, page)
        self._write(REPORT, json.dumps(report, indent=2) + "\n")

    def __enter__(self) -> EvaluationFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self.path / SETTINGS
        try:
            before = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ValueError(
                f"{self.path}: has predictions and no {SETTINGS} that says what of; choose another "
                "folder"
            ) from None
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(f"{file}: is damaged; choose another folder")
        if before.get("on_error") == "fail":  # the image that ended it may be left out now
            before["on_error"] = settings["on_error"]
        if found := differences(before, settings):
            raise ValueError(
                f"{self.path}: cannot be resumed with other settings: {'; '.join(found)}"
            )

    def _write(self, name: str, text: str) -> None:
        """Writes a file beside its name and moves it into place; an error leaves nothing of it."""
        # Not by the process's number: containers that share the folder may have the same.
        unfinished = self.path / f".{name}.{secrets.token_hex(4)}"
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(self.path / name)
        except OSError as error:
            raise cannot_write(self.path / name, error) from None
        finally:
            unfinished.unlink(missing_ok=True)

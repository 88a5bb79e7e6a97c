"""Evaluation after kills, full disks and damage: it ends with the same report, or says why not."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from internimage_jax.data import Dataset
from internimage_jax.evaluate import evaluate
from internimage_jax.evaluation_folder import EvaluationFolder
from internimage_jax.initial import fill
from internimage_jax.model import InternImage
from internimage_jax.predictions import ImageResult, PredictionsWriter, to_lines
from tests.evaluate.runs import COUNT, EACH, Finished, without_times


@pytest.mark.parametrize("part", [0.0, 0.03, 0.34, 0.35, 0.6, 0.99, 1.0])
def test_resuming_after_a_kill_ends_with_the_same_report_and_predictions(
    run: Callable[..., dict[str, Any]],
    finished: Finished,
    part: float,
    tmp_path: Path,
) -> None:
    report, predictions = finished
    run(output=tmp_path)
    for name in ("report.json", "report.html"):
        (tmp_path / name).unlink()
    (tmp_path / "predictions.jsonl").write_bytes(predictions[: int(part * len(predictions))])
    again = run(output=tmp_path, resume=True)
    assert without_times(again) == without_times(report)
    assert (tmp_path / "predictions.jsonl").read_bytes() == predictions
    assert (again["images_per_second"] is None) == (part == 1.0)
    assert (tmp_path / "report.html").exists()


def test_resuming_where_nothing_was_begun_is_an_evaluation(
    run: Callable[..., dict[str, Any]], finished: Finished, tmp_path: Path
) -> None:
    report = run(output=tmp_path / "new", resume=True)
    assert without_times(report) == without_times(finished.report)


def test_an_evaluation_is_not_overwritten(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(output=tmp_path, num_images=1)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds an evaluation; --resume .* goes on"):
        run(output=tmp_path)
    assert (tmp_path / "predictions.jsonl").read_bytes() == before


def test_resuming_with_other_settings_is_an_error_that_names_them(
    run: Callable[..., dict[str, Any]], dataset: Dataset, model: InternImage, tmp_path: Path
) -> None:
    run(output=tmp_path)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    other = dataclasses.replace(dataset, labels=[(i,) for i in range(COUNT)])
    changed = fill_copy(model, "head.bias")
    for settings, named in (
        ({"batch_size": 1}, "batch_size was 2 and is 1"),
        ({"model": other_config(model)}, "config.offset_scale was 1.0 and is 2.0"),
        ({"num_images": 3}, "dataset.images was 23 and is 3"),
        ({"parallel": "fsdp"}, 'parallel was "pmap" and is "fsdp"'),
        ({"data": other}, "dataset.names_and_labels_sha256 was"),
        ({"model": changed}, "weights was"),
    ):
        given = {"model": model, "data": dataset, "batch_size": EACH, **settings}
        with pytest.raises(ValueError, match="cannot be resumed with other settings: ") as caught:
            evaluate(given.pop("model"), given.pop("data"), output=tmp_path, resume=True, **given)
        assert named in str(caught.value)
        assert (tmp_path / "predictions.jsonl").read_bytes() == before


def other_config(model: InternImage) -> InternImage:
    """A model with the same arrays that computes something else with them."""
    copy = nnx.clone(model)
    copy.config = model.config.replace(offset_scale=2.0)
    return copy


def fill_copy(model: InternImage, name: str) -> InternImage:
    """A model like `model`, but for one array."""
    copy = nnx.clone(model)
    fill(copy, {name: np.asarray(model.head.bias[...]) + 1})
    return copy


def test_damaged_predictions_are_an_error_that_names_the_line(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(output=tmp_path, num_images=9)
    path = tmp_path / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"index": 1}\n' + b"".join(lines[2:]))
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 2: got"):
        run(output=tmp_path, num_images=9, resume=True)
    path.write_bytes(lines[1] + lines[0] + b"".join(lines[2:]))
    with pytest.raises(ValueError, match="not of these images, in this order"):
        run(output=tmp_path, num_images=9, resume=True)
    beyond = {**json.loads(lines[0]), "top5": [1000], "probabilities": [1.0]}
    path.write_bytes(json.dumps(beyond).encode() + b"\n" + b"".join(lines[1:]))
    with pytest.raises(ValueError, match="not of these images, in this order"):
        run(output=tmp_path, num_images=9, resume=True)


def test_only_whole_batches_are_kept_unless_all_is_done(tmp_path: Path) -> None:
    with EvaluationFolder(tmp_path, resume=False) as folder:
        folder.open({}, [])
        folder.write([ImageResult(i, f"{i}.jpg", (0,), (0,), (1.0,)) for i in range(11)])
    resumed = EvaluationFolder(tmp_path, resume=True)
    for batch, images, kept in ((8, 23, 8), (4, 23, 8), (16, 23, 0), (1, 23, 11), (8, 11, 11)):
        assert len(resumed.done({}, batch, images)) == kept


def test_what_is_kept_is_what_the_file_begins_with(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    kept = [ImageResult(i, f"{i}.jpg", (0,), (0,), (1.0,)) for i in range(2)]
    for before in (b"", b"edited", to_lines(kept).replace(b"1.0", b"1.00", 1)):
        path.write_bytes(before)
        with pytest.raises(ValueError, match=r"predictions\.jsonl: was not written by this"):
            PredictionsWriter(path, kept)
        assert path.read_bytes() == before


def test_an_evaluation_is_told_by_its_settings_and_finished_by_its_report(tmp_path: Path) -> None:
    with EvaluationFolder(tmp_path, resume=False) as folder:
        folder.open({"batch_size": 2}, [])
    for text in ("[]", "{", "null"):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=r"settings\.json: is damaged; choose another folder"):
            EvaluationFolder(tmp_path, resume=True).done({}, 8, 23)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has predictions and no settings\.json"):
        EvaluationFolder(tmp_path, resume=True).done({}, 8, 23)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        for name, report, page in (("html", "", "x" * 4000), ("json", "x" * 4000, "")):
            with pytest.raises(OSError, match=rf"report\.{name}: cannot be written"):
                folder.finish({"report": report}, page, [])
            # The page comes first: where there is a report, the evaluation is finished.
            there = {"predictions.jsonl", *["report.html"][: int(name == "json")]}
            assert {path.name for path in tmp_path.iterdir()} == there
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_may_not_be_written_is_an_error_before_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OSError, match=rf"^{tmp_path}: cannot be written \(Permission denied\)$"):
        evaluate("not looked at", "nor this", output=tmp_path / "a" / "b")


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_what_there_is(
    run: Callable[..., dict[str, Any]], finished: Finished, tmp_path: Path
) -> None:
    room = 3000  # bytes a file may have; all predictions need more
    assert len(finished.predictions) > room
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"predictions\.jsonl: cannot be written \(File too large\)"
        ):
            run(output=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = (tmp_path / "predictions.jsonl").read_bytes()
    assert kept and finished.predictions.startswith(kept)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["predictions.jsonl", "settings.json"]
    again = run(output=tmp_path, resume=True)
    assert without_times(again) == without_times(finished.report)

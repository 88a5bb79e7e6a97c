"""Bad input to evaluation: damaged images, settings, outputs that cannot be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internimage_jax.__main__ import main
from internimage_jax.data import Dataset, open_dataset
from internimage_jax.evaluate import evaluate
from internimage_jax.evaluation_step import Outputs, Step
from internimage_jax.model import InternImage
from internimage_jax.predictions import read_predictions
from tests.evaluate.runs import COUNT, EACH, counts, expected_counts, without_times


@pytest.fixture
def with_broken_image(folder: Path, tmp_path: Path) -> tuple[Dataset, str]:
    """A dataset whose twelfth image is cut off."""
    whole = open_dataset(folder)
    for name in whole.names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes((folder / name).read_bytes())
    broken = tmp_path / "data" / whole.names[11]
    broken.write_bytes(broken.read_bytes()[:200])
    return open_dataset(tmp_path / "data"), whole.names[11]


def test_a_damaged_image_ends_the_evaluation_after_the_batches_before_it(
    model: InternImage, with_broken_image: tuple[Dataset, str], tmp_path: Path
) -> None:
    broken, name = with_broken_image
    with pytest.raises(ValueError, match=f"^{name}: "):
        evaluate(model, broken, batch_size=EACH, output=tmp_path / "out")
    assert [one.index for one in read_predictions(tmp_path / "out")] == list(range(8))


def test_a_damaged_image_is_skipped_and_listed_and_a_kill_changes_nothing(
    model: InternImage,
    with_broken_image: tuple[Dataset, str],
    logits: np.ndarray,
    tmp_path: Path,
) -> None:
    broken, name = with_broken_image
    options: dict[str, Any] = {"batch_size": EACH, "on_error": "skip", "output": tmp_path / "out"}
    report = evaluate(model, broken, **options)
    others = [i for i in range(COUNT) if i != 11]
    assert counts(report) == expected_counts(logits[others], [broken.labels[i] for i in others])
    assert report["num_skipped"] == 1
    assert [one["file"] for one in report["skipped"]] == [name]
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert without_times(evaluate(model, broken, resume=True, **options)) == without_times(report)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"num_images": 24}, "num_images: expected 1 to 23, the dataset's images, got 24"),
        ({"num_images": 0}, "num_images: expected 1 to 23"),
        ({"resume": True}, "resume: needs the output folder"),
        ({"workers": 0}, "workers: got 0, expected at least 1"),
        ({"on_error": "ignore"}, "on_error: got 'ignore', expected 'fail' or 'skip'"),
        ({"parallel": "tensor"}, "parallel: expected 'pmap' or 'fsdp', got 'tensor'"),
    ],
)
def test_settings_out_of_range_are_named_and_nothing_is_written(
    model: InternImage, dataset: Dataset, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    output = None if "resume" in options else tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        evaluate(model, dataset, output=output, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_finite_is_an_error_that_names_the_image(
    run: Callable[..., dict[str, Any]], dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Step.read

    def overflowed(step: Step, outputs: Outputs) -> Outputs:
        found = read(step, outputs)
        found.probabilities[3] = np.nan
        return found

    monkeypatch.setattr(Step, "read", overflowed)
    with pytest.raises(ValueError, match=f"^{dataset.names[3]}: the model's output is not finite"):
        run()


def test_sums_of_the_devices_that_disagree_with_the_predictions_are_an_error(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Step.read
    monkeypatch.setattr(
        Step, "read", lambda self, outputs: (o := read(self, outputs))._replace(sums=o.sums + 1)
    )
    with pytest.raises(ValueError, match=r"the devices counted .* one of them is wrong"):
        run()


# The command; tests/test_processes.py has runs of it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA/none"], "DATA/none: no such file or folder"),
        (["DATA", "--model", "DATA/none"], "DATA/none: no such file or folder"),
        (["DATA", "--resume"], "resume: needs the output folder"),
        (["DATA", "--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["DATA", "--labels", "DATA/none.txt"], "DATA/none.txt: no such file"),
        (["DATA", "--output", "FILE"], "FILE: is a file; the output is a folder"),
        (["DATA", "--output", "FILE/below"], "FILE: is a file; the output is a folder"),
        (["DATA", "--num-processes", "2"], "need --coordinator HOST:PORT"),
        (["DATA", "--coordinator", "localhost:1"], "expected all three, or none"),
        (["DATA", "--coordinator", "a:1", "--distributed"], "exclude each other"),
    ],
)
def test_bad_input_is_one_line_and_status_1(
    folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "file").touch()

    def named(text: str) -> str:
        return text.replace("DATA", str(folder)).replace("FILE", str(tmp_path / "file"))

    command = ["evaluate", *map(named, arguments)]
    if "--model" not in command:
        command += ["--model", str(checkpoint)]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert named(message) in err

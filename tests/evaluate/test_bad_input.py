"""Bad input to evaluation: damaged images, settings, outputs that cannot be right."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from internimage_jax import evaluate as evaluation
from internimage_jax.__main__ import main
from internimage_jax.data import Dataset, open_dataset
from internimage_jax.evaluate import evaluate
from internimage_jax.evaluation_folder import EvaluationFolder
from internimage_jax.evaluation_settings import array_digests
from internimage_jax.evaluation_step import Outputs, Step
from internimage_jax.model import InternImage
from internimage_jax.predictions import read_predictions
from internimage_jax.processes import Group
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
    seen: list[tuple[int, ...]] = []
    options["progress"] = lambda *figures: seen.append(figures)
    report = evaluate(model, broken, **options)
    assert seen[-1] == (COUNT, COUNT, report["correct_top1"], COUNT - 1)
    others = [i for i in range(COUNT) if i != 11]
    assert counts(report) == expected_counts(logits[others], [broken.labels[i] for i in others])
    assert report["num_skipped"] == 1
    assert [one["file"] for one in report["skipped"]] == [name]
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert without_times(evaluate(model, broken, resume=True, **options)) == without_times(report)
    assert path.read_bytes() == whole
    assert seen[-1] == (COUNT, COUNT, report["correct_top1"], COUNT - 1)


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


def test_processes_with_other_settings_do_not_begin(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def others(self: Group, settings: dict[str, Any]) -> None:
        raise ValueError(f"process 1 has another batch_size than {settings['batch_size']}")

    monkeypatch.setattr(Group, "check_same", others)
    with pytest.raises(ValueError, match=f"another batch_size than {EACH}"):
        run(output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_process_that_ends_ends_the_others_after_what_they_have_begun(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = itertools.count()

    def check(self: Group) -> None:
        if next(calls) == 2:
            raise OSError("process 1 has ended")

    monkeypatch.setattr(Group, "check", check)
    with pytest.raises(OSError, match="process 1 has ended"):
        run(output=tmp_path / "out")
    assert [one.index for one in read_predictions(tmp_path / "out")] == list(range(16))


def test_where_a_process_has_a_folder_of_its_own_it_can_resume(tmp_path: Path) -> None:
    def second(resume: bool) -> EvaluationFolder:
        return EvaluationFolder(tmp_path / "mine", resume, 1, 2)

    with second(resume=False) as folder:
        folder.open({"batch_size": 2}, [])
    assert second(resume=True).done({"batch_size": 2}, 8, 23) == []
    with pytest.raises(ValueError, match="batch_size"):
        second(resume=True).done({"batch_size": 3}, 8, 23)


def test_options_of_a_checkpoint_reach_the_model(
    checkpoint: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loaded(Exception):
        pass

    def load(path: str, **options: Any) -> None:
        raise Loaded(options)

    monkeypatch.setattr(evaluation, "from_pretrained", load)
    options = {"dtype": "bfloat16", "implementation": "gather", "image_size": 48}
    with pytest.raises(Loaded) as caught:
        evaluate(checkpoint, dataset, **options)
    assert caught.value.args == (options,)


def test_weights_in_memory_are_told_apart_by_their_names_and_shapes() -> None:
    def digest(**arrays: np.ndarray) -> list[dict[str, str]]:
        model = nnx.Dict({name: nnx.Param(array) for name, array in arrays.items()})
        return array_digests(model)  # type: ignore[arg-type]

    one, two = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert digest(a=one, b=two) == digest(a=one.copy(), b=two)
    for other in ({"a": two, "b": one}, {"a": one, "c": two}, {"a": one.reshape(3, 2), "b": two}):
        assert digest(**other) != digest(a=one, b=two)


# The command; tests/test_processes.py has runs of it


def test_options_of_the_command_reach_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        pass

    def begin(model: str, data: str, **options: Any) -> None:
        del options["group"], options["progress"]
        raise Begun({"model": model, "data": data, **options})

    monkeypatch.setattr(evaluation, "evaluate", begin)

    def begun(*options: str) -> dict[str, Any]:
        with pytest.raises(Begun) as caught:
            main(["evaluate", "val", *options])
        return caught.value.args[0]

    by_default = {
        **{"model": "internimage_t_1k_224", "data": "val", "dtype": "float32", "batch_size": 32},
        **dict.fromkeys(("implementation", "image_size", "workers", "num_images", "labels")),
        **{"output": None, "resume": False, "parallel": "pmap", "on_error": "fail"},
    }
    assert begun() == by_default
    given = {
        **{"model": "mine", "dtype": "float16", "implementation": "gather", "image_size": 48},
        **{"labels": "real.json", "batch_size": 3, "workers": 5, "num_images": 7},
        **{"on_error": "skip", "output": "out", "parallel": "fsdp"},
    }
    words = (word for name, value in given.items() for word in (f"--{name}", str(value)))
    options = [word.replace("_", "-") if word[:2] == "--" else word for word in words]
    assert begun(*options, "--resume") == {"data": "val", "resume": True, **given}


def test_an_evaluation_that_is_interrupted_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    assert main(["evaluate", "val"]) == 130
    assert main(["evaluate", "val", "--output", str(tmp_path / "not begun")]) == 130
    assert capsys.readouterr().err == ""
    assert main(["evaluate", "val", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"interrupted; --resume goes on with {tmp_path}\n"


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
        (["DATA", "--process-id", "1"], "need --coordinator HOST:PORT"),
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

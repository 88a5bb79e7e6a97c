"""The benchmarks but for their times: what fails costs its own rows, the page is the results'."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xla_ops
from benchmarks import gpu_check, gpu_model, gpu_op, gpu_target, page, training
from benchmarks.gpu_check import Check, Section, serve, summary_of
from benchmarks.growth import SMALL
from benchmarks.model import DRAWN, random_values
from convert.rules import rules
from tests.support import SMALLEST


def rows(options: argparse.Namespace) -> Iterator:
    def fail() -> dict:
        raise RuntimeError("out of memory")

    yield {"n": 1}, lambda: {"us": 2.0}
    yield {"n": 2}, fail
    yield {"n": 3}, lambda: {"us": 4.0}


def test_a_row_that_fails_does_not_end_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    serve(Section("rows", f"{__name__}:rows", 1), argparse.Namespace())
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row.pop("took") >= 0 for row in found)
    assert found == [
        {"n": 1, "us": 2.0},
        {"n": 2, "error": "RuntimeError: out of memory"},
        {"n": 3, "us": 4.0},
    ]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(argparse.Namespace(output=tmp_path / "gpu.json", platform="cpu"))


def test_what_was_measured_before_a_crash_is_kept(check: Check) -> None:
    code = "import os, sys; print('{\"us\": 3}', flush=True); sys.stderr.write('bad'); os.abort()"
    status, _ = check.run("operator", [sys.executable, "-c", code], 60)
    assert status == -6
    written = json.loads(check.options.output.read_text())
    assert written["operator"][0] == {"us": 3}
    assert "exits with -6" in written["operator"][1]["error"]
    assert written["operator"][1]["printed"].endswith("bad")


def test_a_section_that_hangs_is_stopped_with_what_it_started(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "least_seconds", 1)
    late = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(late)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.perf_counter()
    status, _ = check.run("models", [sys.executable, "-c", code], 1)
    assert status is None and time.perf_counter() - start < 3
    assert "stopped after 1 s" in check.results["models"][0]["error"]
    time.sleep(max(0, start + 4 - time.perf_counter()))
    assert not late.exists()


@pytest.mark.parametrize(
    ("printed", "summary"),
    [
        (
            ["...\n", "5 passed, 1 skipped in 3s\n", "E0000 cuda: closing\n"],
            "5 passed, 1",
        ),
        (["1 failed, 4 passed in 2s\n"], "1 failed"),
        (["Segmentation fault\n"], "no summary"),
    ],
)
def test_the_summary_is_found_among_other_lines(printed: list[str], summary: str) -> None:
    assert summary_of(printed).startswith(summary)


def test_each_section_is_there() -> None:
    for section in gpu_check.SECTIONS:
        module, _, function = section.place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_a_long_call_is_made_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model, "TIMING", 0.2)
    monkeypatch.setattr(gpu_model, "IN_A_ROW", 0.1)
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for seconds, calls, rounds in ((0.001, range(3, 11), range(4, 21)), (0.1, [2], [3])):
        made: list[None] = []

        def call(seconds: float = seconds, made: list[None] = made) -> None:
            now[0] += seconds
            made.append(None)

        row = gpu_model.time_calls(call, 4)
        assert row["calls_in_a_row"] in calls and row["rounds"] in rounds
        assert len(made) == 1 + row["rounds"] * (1 + row["calls_in_a_row"])
        assert row["milliseconds_in_a_row"] == pytest.approx(1e3 * seconds)
        assert row["images_per_second"] == pytest.approx(4e3 / row["milliseconds_in_a_row"])


def test_random_weights_keep_their_scale_and_differ() -> None:
    values = random_values(SMALL.replace(num_classes=20000))  # a kernel of more than are drawn
    kernels = [value for path, value in values.items() if path.endswith("kernel")]
    assert max(kernel.size for kernel in kernels) > DRAWN
    for kernel in kernels:
        fan_in = kernel.size // kernel.shape[-1]
        assert kernel.std() * fan_in**0.5 == pytest.approx(1, abs=0.2)
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)


def test_the_page_has_the_tables_of_the_results() -> None:
    results = sorted(Path(page.__file__).parent.glob("results/*.jsonl"))
    written = page.PAGE.read_text()
    assert page.with_tables(written, page.read(results)) == written
    assert all(f"<!-- table {name} -->" in written for name in page.TABLES)


@pytest.mark.parametrize(
    "module", ["cuda_code", "growth", "loader", "model", "op", "page", "programs", "startup"]
)
def test_each_benchmark_says_what_it_takes(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    main = importlib.import_module(f"benchmarks.{module}").main
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out


def test_what_is_no_checkout_of_the_official_code_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["op", "--official", str(tmp_path)])
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.op").main()
    assert "has no classification/models/intern_image.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "printed", "correct"),
    [
        (0, ["....\n", "4 passed in 3s\n"], True),
        (1, ["..F.\n", "1 failed, 3 passed in 3s\n"], False),
        (0, ["ss..\n", "SKIPPED [2] tests: no such instructions\n", "2 passed, 2 skipped\n"], True),
        (0, ["ss..\n", "SKIPPED [2] tests: no kernel\n", "2 passed, 2 skipped\n"], False),
        (0, ["no tests ran\n"], False),
        (None, ["....\n", "....\n"], True),
        (None, ["....\n", "..F.\n"], False),
    ],
)
def test_nothing_is_timed_unless_the_tests_are_good(
    check: Check,
    status: int | None,
    printed: list[str],
    correct: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check.options.platform = "cuda"
    monkeypatch.setattr(check, "run", lambda *_, **__: (status, printed))
    assert gpu_check.test(check) == correct


def test_steps_are_counted_within_command_buffers() -> None:
    class Lowered:
        def compile(self, options: dict[str, str]) -> str:
            step = "kGemm [prev=001 | next=003] gemm.1"
            folder = Path(options["xla_dump_to"])
            before = f"001: {step}\n002: kCustomCall [prev=001] call\n"
            (folder / "module_0001.jit_f.thunk_sequence.txt").write_text(before)
            after = f"001: kCommandBuffer [prev=000] buffer\n    001: {step}\n    002: {step}\n"
            after += "002: kConvolution [prev=001] conv\n"
            after_name = "module_0001.jit_f.thunk_sequence_after_thunk_passes.txt"
            (folder / after_name).write_text(after)
            return "compiled"

    compiled, counts = gpu_target.compiled_with_steps(Lowered())  # type: ignore[arg-type]
    assert compiled == "compiled"
    some = {name: count for name, count in counts.items() if count}
    assert some == {
        "steps": 3, "command_buffers": 1, "outside": 1, "products": 2, "convolutions": 1
    }  # fmt: skip


def test_a_peer_gets_what_ours_gets() -> None:
    torch = pytest.importorskip("torch")

    def peer(x: Any, offset: Any, mask: Any, group: int) -> Any:
        ours = xla_ops.dcnv3(
            *(jnp.asarray(a.detach().numpy()) for a in (x, offset, mask)), group=group
        )
        return torch.from_numpy(np.array(ours)) + 0 * (x.sum() + offset.sum() + mask.sum())

    (stage,) = gpu_op.TINY
    found = gpu_op.time_peer(peer, stage, "float32", 1.0, "cpu")
    assert found["difference"] == 0 and found["forward_us"] > 0 and found["backward_us"] > 0
    with pytest.raises(RuntimeError, match="differs from ours"):
        gpu_op.time_peer(lambda *a: 2 * peer(*a), stage, "float32", 1.0, "cpu")


def test_a_training_step_gives_the_gradients_of_all_parameters() -> None:
    lowered, operands = training.random_step(SMALLEST, 2, 32, "float32")
    (loss, _), gradients = lowered.compile()(*operands)
    assert np.isfinite(loss)
    flat = nnx.to_flat_state(gradients)
    wanted = {".".join(map(str, path)): np.asarray(v[...]) for path, v in flat}
    assert {rule.flax for rule in rules(SMALLEST)} - wanted.keys() == {
        "conv_head.norm.mean",
        "conv_head.norm.var",
    }
    assert training.difference(gradients, dict(wanted)) == 0
    half = {path: 2 * gradient for path, gradient in wanted.items()}
    assert training.difference(gradients, half) == pytest.approx(0.5)
    with pytest.raises(SystemExit, match="no gradients of ours for more"):
        training.difference(gradients, wanted | {"more": np.zeros(1)})

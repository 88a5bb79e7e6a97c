"""`demo`: the recorded answer, and what differs from it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from internimage_jax.__main__ import main
from internimage_jax.commands import demo
from tests.commands.running import Capture, run_python


def test_demo_matches_the_recorded_answer_and_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = run_python("-m", "internimage_jax", "demo", env=environment)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "not trained" in out
    assert "matches the recorded" in out
    assert not list(tmp_path.iterdir())


def test_demo_fails_where_a_weight_differs(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = demo.seeded_values

    def altered(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return values(name, shape) * (1.2 if name == "levels.2.blocks.1.dcn.offset.bias" else 1)

    monkeypatch.setattr(demo, "seeded_values", altered)
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert "matches" not in out
    assert err.startswith("error: demo: rank ")
    assert err.count("\n") == 1

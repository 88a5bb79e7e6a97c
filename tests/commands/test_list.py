"""`list`: the model cards, without what is slow to import."""

from __future__ import annotations

import json
from typing import Any

import pytest

from internimage_jax.__main__ import main
from internimage_jax.config import list_models
from tests.commands.running import Capture, error_of, run_python


def card(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


def test_list_agrees_with_the_model_cards(capsys: Capture) -> None:
    assert main(["list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == list_models()
    for name, size, parameters, multiply_adds, top1 in (
        ("internimage_t_1k_224", 224, 30, 5, 83.5),
        ("internimage_s_1k_224", 224, 50, 8, 84.2),
        ("internimage_b_1k_224", 224, 97, 16, 84.9),
        ("internimage_l_22kto1k_384", 384, 223, 108, 87.7),
        ("internimage_xl_22kto1k_384", 384, 335, 163, 88.0),
    ):
        row = card(rows, name)
        assert (row["image_size"], row["top1"], row["license"]) == (size, top1, "MIT")
        assert row["parameters"] / 1e6 == pytest.approx(parameters, abs=0.55)
        assert round(row["multiply_adds"] / 1e9) == multiply_adds
    for name, parameters, multiply_adds in (
        ("internimage_h_22kto1k_640", 1.08e9, 1478e9),
        ("internimage_g_22kto1k_512", 3.00e9, 2700e9),
    ):
        row = card(rows, name)
        assert row["parameters"] == pytest.approx(parameters, rel=0.03)
        assert row["multiply_adds"] == pytest.approx(multiply_adds, rel=0.011)
    assert card(rows, "internimage_l_22k_384")["num_classes"] == 21841
    assert card(rows, "internimage_l_22k_384")["top1"] is None


def test_list_shows_a_row_a_model(capsys: Capture) -> None:
    assert main(["list", "internimage_?_1k*"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("internimage")]
    assert " ".join(rows[0]) == "internimage_t_1k_224 224 1,000 29.9 M 5 G 83.5 MIT"
    assert [row[0] for row in rows] == list_models("internimage_?_1k*")


def test_a_pattern_that_nothing_matches_is_an_error(capsys: Capture) -> None:
    assert "'resnet*'" in error_of(capsys, "list", "resnet*")


def test_list_does_without_jax_and_numpy() -> None:
    program = (
        "import sys; from internimage_jax.__main__ import main; status = main(['list'])\n"
        "assert not {'jax', 'flax', 'numpy', 'PIL'} & set(sys.modules), sorted(sys.modules)\n"
        "sys.exit(status)"
    )
    process = run_python("-c", program)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")

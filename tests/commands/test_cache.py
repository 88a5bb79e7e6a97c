"""Compiled programs that are kept between runs, and where."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from internimage_jax.__main__ import main
from internimage_jax.cache import cache_folder, keep_compiled_programs
from tests.commands.running import CAT, Capture, run_python


def test_compiled_programs_are_kept_unless_told_otherwise(checkpoint: str, tmp_path: Path) -> None:
    def predict(*options: str) -> list[Path]:
        environment = os.environ | {"INTERNIMAGE_CACHE": str(tmp_path)}
        del environment["JAX_COMPILATION_CACHE_DIR"]  # a user's own setting would be kept
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # the model is small
        command = ("-m", "internimage_jax", *options, "predict", CAT, "--model", checkpoint)
        process = run_python(*command, env=environment)
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        return sorted(tmp_path.rglob("*-cache"))

    assert not predict("--no-compilation-cache")
    assert predict()


def test_where_programs_are_kept_is_for_the_user_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seconds = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

    def kept(cache: Path, **settings: str) -> tuple[str | None, str | None]:
        for name in (folder, seconds):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"INTERNIMAGE_CACHE": str(cache), **settings}.items():
            monkeypatch.setenv(name, value)
        keep_compiled_programs()
        return os.environ.get(folder), os.environ.get(seconds)

    assert kept(tmp_path) == (None, None)  # JAX is there, and has read its settings
    monkeypatch.delitem(sys.modules, "jax")
    assert kept(tmp_path) == (str(tmp_path / "compiled"), "0.05")
    assert kept(tmp_path, **{folder: "mine", seconds: "3"}) == ("mine", "3")
    (tmp_path / "file").touch()
    assert kept(tmp_path / "file") == (None, None)  # where it cannot be: JAX would warn


def test_without_a_home_folder_nothing_is_kept_and_commands_run(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "INTERNIMAGE_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)  # as of a user that a container makes up
    monkeypatch.delitem(sys.modules, "jax")  # with JAX there, nothing is looked for
    assert main(["list", "internimage_t*"]) == 0
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert "internimage_t_1k_224" in capsys.readouterr().out
    with pytest.raises(OSError, match="no home folder; set INTERNIMAGE_CACHE"):
        cache_folder()

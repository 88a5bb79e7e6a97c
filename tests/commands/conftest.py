"""A small checkpoint for the commands."""

from __future__ import annotations

import pytest

from internimage_jax.commands import demo
from internimage_jax.config import InternImageConfig

CONFIG = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "released"
    demo.write_checkpoint(folder, CONFIG, image_size=32)
    return str(folder)

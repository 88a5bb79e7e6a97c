"""Where converted models and compiled programs are kept between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Returns INTERNIMAGE_CACHE, or else our folder in the user's cache folder.

    Raises OSError where that is not known: a container's user may have no home.
    """
    if own := os.environ.get("INTERNIMAGE_CACHE"):
        return Path(own)
    try:
        users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise OSError(
            "the user has no home folder; set INTERNIMAGE_CACHE to a folder for what is kept"
        ) from None
    return Path(users) / "internimage_jax"


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles, and take from there what it has compiled before.

    By the environment, which JAX reads when it is imported: a command that needs no JAX stays
    quick. Settings that the user made are left alone, and so is a process that has JAX already.
    """
    if "jax" in sys.modules:
        return
    try:
        folder = cache_folder() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home, or one that is read only: JAX would warn of each program
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

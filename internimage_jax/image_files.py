"""Image files: which count as images, and how folders of them are listed."""

from __future__ import annotations

import os
from collections.abc import Iterable

from internimage_jax.messages import printable

# What counts as an image in a folder, in either case. A file that is named itself may be called
# anything.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".jp2", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"),
)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Returns the images that `paths` stand for: files as they are, folders with all below them.

    Args:
        paths: Files and folders. Of a folder, the files whose names end in one of `IMAGE_SUFFIXES`,
            sorted by path; names that begin with a dot are left out, and links to folders.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A folder has no image.
    """
    return [image for path in paths for image in _images_of(os.fsdecode(path))]


def _images_of(path: str) -> list[str]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{printable(path)}: no such file or folder")
    if not os.path.isdir(path):
        return [path]
    found = []
    for folder, folders, files in os.walk(path, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                found.append(os.path.join(folder, name))
    if not found:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"{printable(path)}: no image below this folder; looked for {suffixes}")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error

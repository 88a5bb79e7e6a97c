"""How messages are worded: on one line, with names as they can be printed."""

from __future__ import annotations

from collections.abc import Collection


def printable(path: str) -> str:
    """Returns `path` as messages show it: quoted where it has control or undecodable characters."""
    return path if path and path.isprintable() else repr(path)


def one_line(error: BaseException) -> str:
    """Returns the message of `error` on one line; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


_SHOWN = 5  # of many


def listing(noun: str, items: Collection[str]) -> str:
    """Says "image a.jpg", or "17 images (a.jpg, b.jpg, c.jpg, d.jpg, e.jpg, ...)"."""
    first = [printable(item) for item in sorted(items)[:_SHOWN]]
    if len(items) == 1:
        return f"{noun} {first[0]}"
    more = ", ..." if len(items) > _SHOWN else ""
    return f"{len(items)} {noun}s ({', '.join(first)}{more})"

"""The errors that the commands turn into a single line instead of a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can put right: a path, an option, a file. The message says what, where and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler or a container sends it: ends a command as Ctrl-C does, with a status of its own."""


def first_few(items: Sequence[object], shown: int = 3) -> str:
    """`a, b, c and 12 more`: enough to find the cause, never a screenful."""
    text = ", ".join(str(item) for item in items[:shown])
    more = len(items) - shown
    return f"{text} and {more} more" if more > 0 else text

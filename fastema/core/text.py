"""Wording that several messages share."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(items: Sequence[object], shown: int = 3, separator: str = ", ") -> str:
    """Join the first items, and say how many more there are.

    Examples:
        >>> first_few("abcde", 2)
        'a, b, and 3 more'
    """
    more = len(items) - shown
    return separator.join(map(str, items[:shown])) + (f"{separator}and {more} more" if more > 0 else "")


def counted(count: int, thing: str) -> str:
    """Return a count and what is counted, in the plural if there are several or none.

    Examples:
        >>> counted(1, "mask"), counted(1200, "mask")
        ('1 mask', '1,200 masks')
    """
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"

"""Tables a person can read: with rich where it is installed, else plain text."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TextIO


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], file: TextIO | None = None, left: int = 1
) -> None:
    """Prints a table under its title.

    Args:
        title: one line.
        columns: their headings.
        rows: of as many cells.
        file: where to; None: stdout.
        left: how many columns, from the first, are text; numbers are set flush right.
    """
    out = sys.stdout if file is None else file
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain_table(title, columns, rows, left), file=out)
        return
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    table.title = Text(title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: no cell is markup
    # Into a file a table is as wide as it is; only a terminal has an edge.
    console = Console(file=out, highlight=False)
    if not console.is_terminal:
        console = Console(file=out, highlight=False, width=160)
    console.print(table)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same without rich.

    Example:
        >>> print(plain_table("Times", ["who", "us"], [["we", "9"], ["they", "1,000"]]))
        Times
        who      us
        -----------
        we        9
        they  1,000
        <BLANKLINE>
    """
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(placed).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([title, line(columns), rule, *map(line, rows), ""])


def duration(microseconds: float) -> str:
    """With three digits that count.

    Example:
        >>> duration(9.25), duration(1634.4), duration(148_000)
        ('9.25 us', '1.63 ms', '148 ms')
    """
    value, unit = (microseconds, "us") if microseconds < 1000 else (microseconds / 1000, "ms")
    return f"{number(value)} {unit}"


def number(value: float) -> str:
    """Three digits that count.

    Example:
        >>> number(0.0712), number(1.5), number(46.04), number(12345)
        ('0.071', '1.50', '46.0', '12,345')
    """
    if value == 0 or not math.isfinite(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(digits, 0), 3)}f}"


def size(count: float) -> str:
    """Of memory.

    Example:
        >>> size(0), size(7200), size(100_000_000)
        ('0 B', '7.20 kB', '100 MB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{number(count)} {unit}"
    return f"{number(count / 1000)} GB"

"""Tables and numbers as plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bench.harness.records import Record


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table under its title.

    Args:
        title: one line.
        columns: their headings.
        rows: of as many cells.
        left: how many columns, from the first, are text; numbers are aligned right.
    """
    print(plain_table(title, columns, rows, left), flush=True)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table as text.

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
    """Return a time with three significant digits.

    Example:
        >>> duration(9.25), duration(1634.4), duration(148_000)
        ('9.25 us', '1.63 ms', '148 ms')
    """
    value, unit = (microseconds, "us") if microseconds < 1000 else (microseconds / 1000, "ms")
    return f"{number(value)} {unit}"


def number(value: float) -> str:
    """Return a number with three significant digits.

    Example:
        >>> number(0.0712), number(1.5), number(46.04), number(12345)
        ('0.071', '1.50', '46.0', '12,345')
    """
    if value == 0 or not math.isfinite(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(digits, 0), 3)}f}"


def size(count: float) -> str:
    """Return an amount of memory with its unit.

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


def print_records(
    title: str, records: Sequence[Record], missed: Sequence[tuple[str, str]] = (), note: str = ""
) -> None:
    """Print a table of timings, the fastest median first; the last column is relative to the first of ours."""
    timed = [record for record in records if record.median_us is not None]
    ours = next((record.median_us for record in timed if record.is_ours), None)
    rows = []
    for record in sorted(timed, key=lambda record: record.median_us or 0.0):
        median, p10, p90, least = (
            value or 0.0 for value in (record.median_us, record.p10_us, record.p90_us, record.min_us)
        )
        rows.append(
            [
                record.impl,
                duration(median),
                duration(p10),
                duration(p90),
                duration(least),
                "" if record.host_us is None else duration(record.host_us),
                "" if record.gbps is None else number(record.gbps),
                "" if record.copy_share is None else f"{record.copy_share:.0%}",
                "" if record.launches is None else str(record.launches),
                "" if ours is None else f"{number(median / ours)} x",
            ]
        )
    columns = ["", "median", "p10", "p90", "min", "host", "GB/s", "of copy", "launches", "/ ours"]
    kept = [index for index in range(len(columns)) if index == 0 or any(row[index] for row in rows)]
    print_table(title, [columns[index] for index in kept], [[row[index] for index in kept] for row in rows])
    if note:
        print(f"  {note}")
    for name, reason in missed:
        print(f"  not measured: {name}: {reason}")
    if note or missed:
        print(flush=True)


def print_environment(found: dict[str, Any]) -> None:
    """Print the machine and the versions."""
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    cores = ", ".join(map(str, found["cores"])) or "not pinned"
    print(f"{found['device']}, {found['threads']} threads on cores {cores}, {size(found['cache_bytes'])} cache")
    print(f"{packages}; {found['date']}")
    if found["load"] is not None and found["load"] > 0.3:
        print(f"load {found['load']}: other work is running; do not trust these timings")
    print(flush=True)

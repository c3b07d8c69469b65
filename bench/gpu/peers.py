"""`python -m bench.gpu.peers FILE`: what `bench.all --json FILE` measured of updates, everybody in one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.harness.console import number, plain_table
from bench.harness.records import Record, Run, load

_CACHE = {"warm": " (warm)", "cold": ""}


def table(run: Run, title: str, value: Callable[[Record], float | int | None]) -> str:
    """Return a row for each implementation, a column for each case of one average; empty where nothing was measured."""
    records = [one for one in run.records if one.bench == "update" and one.shadows == 1 and value(one) is not None]
    columns = list(dict.fromkeys(f"{one.case}{_CACHE[one.cache]}" for one in records))
    cells: dict[str, dict[str, str]] = {}
    for one in records:
        found = value(one)
        assert found is not None
        text = str(found) if isinstance(found, int) else number(found)
        cells.setdefault(one.impl, {})[f"{one.case}{_CACHE[one.cache]}"] = text
    rows = [[impl, *(row.get(column, "") for column in columns)] for impl, row in cells.items()]
    return plain_table(title, ["", *map(_short, columns)], rows) if rows else ""


def _short(case: str) -> str:
    return case.replace(" in one", "").replace(", f32 <- bf16", " mixed").replace(", bf16 <- bf16", " bf16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 where there is no update in the file."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    run = load([Path(path)])
    values: dict[str, Callable[[Record], float | int | None]] = {
        "device time, us": lambda one: one.median_us,
        "host time, us": lambda one: one.host_us,
        "launches": lambda one: one.launches,
    }
    printed = [table(run, title, value) for title, value in values.items()]
    print("\n".join(filter(None, printed)) or "no update was measured")
    return 0 if any(printed) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Find every timing of a run in which another implementation takes less time than ours, or as much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.contenders.libraries import REPLACEMENTS
from bench.contenders.peers import BASE_TWICE, OURS, STEP
from bench.harness.console import duration
from bench.harness.contender import COPY, LIMIT
from bench.harness.records import Record, Run

#: Relative difference below which two times count as equal.
LEVEL = 0.03
LOSS_COLUMNS = ("where", "ours takes", "as long or less takes")

_NOT_COMPARED = {LIMIT.name, COPY.name, BASE_TWICE, STEP}


@dataclass(frozen=True)
class Loss:
    """One comparison. `level`: the two times are equal within `LEVEL`."""

    where: str
    ours: Record
    theirs: Record
    level: bool


def losses(run: Run) -> list[Loss]:
    """Return all of them, in the order of the records."""
    tables: dict[tuple[object, ...], list[Record]] = {}
    for record in run.records:
        if record.median_us is not None and not record.bench.startswith("busy"):  # of those the means count
            tables.setdefault((record.bench, record.case, record.cache, record.shadows), []).append(record)
    found = []
    for table in tables.values():
        by_name = {record.impl: record for record in table}
        others = [record for record in table if not record.is_ours and record.impl not in _NOT_COMPARED]
        pairs = [(by_name[OURS.name], other) for other in others] if OURS.name in by_name else []
        for before, after in REPLACEMENTS:
            if before.name in by_name and after.name in by_name:
                pairs.append((by_name[after.name], by_name[before.name]))
        for ours, theirs in pairs:
            if theirs.time <= ours.time * (1 + LEVEL):
                where = f"{ours.bench}: {ours.case}, {ours.cache}"
                found.append(Loss(where, ours, theirs, theirs.time >= ours.time * (1 - LEVEL)))
    return found


def loss_rows(found: Sequence[Loss]) -> list[list[str]]:
    """Return the cells of a table: one row a place; first where another is ahead, then where it is level."""
    rows: dict[tuple[str, str], list[Loss]] = {}
    for one in found:
        rows.setdefault((one.where, one.ours.impl), []).append(one)
    cells = []
    for (where, impl), of in sorted(rows.items(), key=lambda row: all(one.level for one in row[1])):
        ours = duration(of[0].ours.time) + (f" ({impl})" if impl != OURS.name else "")
        ahead = sorted(of, key=lambda one: one.theirs.time)
        cells.append([where, ours, ", ".join(f"{one.theirs.impl} {duration(one.theirs.time)}" for one in ahead)])
    return cells

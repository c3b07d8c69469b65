"""Where ours is not ahead, and why: every timing of a run in which somebody else's average takes less time, or as much.

Found in the records, not written down; only the sentences are. One that fits nothing has none, and a test fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import libraries, peers, swap, train_step
from bench.peers import OURS
from bench.records import Record, Run
from bench.table import duration

#: Nearer than this is level.
LEVEL = 0.03

_NOT_COMPARED = {peers.LIMIT.name, peers.COPY.name, swap.BASE_TWICE, train_step.STEP}
_FEW_TENSORS = 100
_CACHED_BYTES = 4 << 20
_NEAR = 0.15  # what the machine's noise and the speed of memory explain; more is a fault of ours

FIXED_PART = (
    "the fixed part of update() (keep other threads out, see that the model is the same, ask the schedule) is not paid "
    "back by so few tensors"
)
MEMORY = "one pass over large tensors: both are at the speed of memory"
IN_BLOCKS = "a loop by hand that casts through one small buffer in the cache is near the speed of memory too"
ADAPTER = "diffusers' API hands all parameters over at every step, and each is looked at in Python"
NOISE = "inside the spread of our own times in this run (p10 to p90)"
NO_TIME = "a validation takes its forwards' time; what brings the average in hardly shows"


@dataclass(frozen=True)
class Loss:
    """One place in the tables. `reason`: empty where none is known."""

    where: str
    ours: Record
    theirs: Record
    level: bool
    reason: str


def losses(run: Run) -> list[Loss]:
    """All of them, in the order of the records."""
    tables: dict[tuple[object, ...], list[Record]] = {}
    for record in run.records:
        if record.median_us is not None and not record.bench.startswith("busy"):  # of those the means count
            tables.setdefault((record.bench, record.case, record.cache, record.shadows), []).append(record)
    found = []
    for table in tables.values():
        by_name = {record.impl: record for record in table}
        others = [record for record in table if not record.is_ours and record.impl not in _NOT_COMPARED]
        pairs = [(by_name[OURS.name], other) for other in others] if OURS.name in by_name else []
        for before, after in libraries.REPLACEMENTS:
            if before.name in by_name and after.name in by_name:
                pairs.append((by_name[after.name], by_name[before.name]))
        found += [_loss(ours, theirs) for ours, theirs in pairs if theirs.time <= ours.time * (1 + LEVEL)]
    return found


def _loss(ours: Record, theirs: Record) -> Loss:
    level = theirs.time >= ours.time * (1 - LEVEL)
    return Loss(f"{ours.bench}: {ours.case}, {ours.cache}", ours, theirs, level, _reason(ours, theirs))


def _is_far(theirs: Record, ours: Record) -> bool:
    """Whether their slowest tenth is faster than our median: no accident."""
    return (theirs.p90_us or 0.0) < ours.time


def _reason(ours: Record, theirs: Record) -> str:
    moved = ours.bytes_floor or 0
    near = theirs.time >= ours.time * (1 - _NEAR)
    if ours.bench == "validation" and near:
        return NO_TIME
    if ours.impl == libraries.OUR_DIFFUSERS.name and not near:
        return ADAPTER
    if "in blocks" in theirs.impl and near:
        return IN_BLOCKS
    if moved < _CACHED_BYTES and ours.tensors <= _FEW_TENSORS:
        return FIXED_PART
    if moved >= _CACHED_BYTES and near:
        return MEMORY
    if theirs.time >= (ours.p10_us or 0.0) and not _is_far(theirs, ours):
        return NOISE
    return ""


LOSS_COLUMNS = ("where", "ours takes", "as long or less takes", "why")


def loss_rows(found: Sequence[Loss]) -> list[list[str]]:
    """As a table shows them: one row a place and reason; first those where somebody is ahead, not just level."""
    rows: dict[tuple[str, str, str], list[Loss]] = {}
    for one in found:
        rows.setdefault((one.where, one.ours.impl, one.reason or "not explained"), []).append(one)
    cells = []
    for (where, impl, reason), of in sorted(rows.items(), key=lambda row: all(one.level for one in row[1])):
        ours = duration(of[0].ours.time) + (f" ({impl})" if impl != OURS.name else "")
        ahead = sorted(of, key=lambda one: one.theirs.time)
        others = ", ".join(f"{one.theirs.impl} {duration(one.theirs.time)}" for one in ahead)
        cells.append([where, ours, others, reason])
    return cells

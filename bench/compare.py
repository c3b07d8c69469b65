"""`python -m bench.compare OLD.json NEW.json`

Report what of ours got slower, beyond noise, among what both files measured on the same device. A machine's speed
differs from run to run, for the peers too: their median change within a table is divided out of ours, and their
disagreement counts as noise. A figure is slower if it changed by more than the noise and by more than 5 %, with and
without the machine's change, and if the new median is above p90 of the old samples and the old median below p10 of the
new. For instruction counts 2 % suffice. Exit status 1 if anything got slower.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness.console import duration, print_table
from bench.harness.records import Record, Run, load

OURS = "fastema"
LEAST_CHANGE = 0.05
LEAST_CHANGE_OF_COUNTS = 0.02


@dataclass(frozen=True)
class Change:
    """The change of one figure.

    Args:
        factor: new over old, divided by the machine's change.
        machine: that change; 1 where there are no peers.
        verdict: "slower", "faster" or "" for noise.
    """

    what: str
    old: str
    new: str
    factor: float
    machine: float
    verdict: str


def compare(old: Run, new: Run) -> list[Change]:
    """Compare every figure of ours that both runs have.

    Raises:
        ValueError: they are of different devices, or have nothing in common.
    """
    devices = [run.environment.get("device") for run in (old, new)]
    if devices[0] != devices[1]:
        raise ValueError(f"the old file is of {devices[0]}, the new one of {devices[1]}: times cannot be compared")
    before = {record.key: record for record in old.records if record.median_us}
    pairs = [(before[record.key], record) for record in new.records if record.median_us and record.key in before]
    tables: dict[tuple[str, str, str], list[tuple[Record, Record]]] = {}
    for pair in pairs:
        tables.setdefault((pair[1].bench, pair[1].case, pair[1].cache), []).append(pair)
    changes = []
    for table in tables.values():
        peers = [later.time / earlier.time for earlier, later in table if not later.is_ours]
        machine = statistics.median(peers) if peers else 1.0
        noise = max((abs(peer / machine - 1) for peer in peers), default=0.0)
        changes += [_change(earlier, later, machine, noise) for earlier, later in table if later.is_ours]
    changes += _counts(old, new)
    if not changes:
        raise ValueError("the two files have no figure of ours in common")
    return sorted(changes, key=lambda change: -change.factor)


def _change(old: Record, new: Record, machine: float, noise: float) -> Change:
    factor = new.time / old.time / machine
    least = 1 + max(LEAST_CHANGE, noise)
    as_it_stands = new.time / old.time
    old_p10, old_p90, new_p10, new_p90 = (
        (old.p10_us or 0.0) * machine,
        (old.p90_us or 0.0) * machine,
        new.p10_us or 0.0,
        new.p90_us or 0.0,
    )
    verdict = ""
    if (
        min(factor / least, as_it_stands / (1 + LEAST_CHANGE)) > 1
        and new.time > old_p90
        and old.time * machine < new_p10
    ):
        verdict = "slower"
    elif (
        max(factor * least, as_it_stands * (1 + LEAST_CHANGE)) < 1
        and new.time < old_p10
        and old.time * machine > new_p90
    ):
        verdict = "faster"
    shadows = f", {new.shadows} averages" if new.shadows > 1 else ""
    what = f"{new.bench}: {new.case}, {new.impl}{shadows}, {new.cache}"
    return Change(what, duration(old.time), duration(new.time), factor, machine, verdict)


def _counts(old: Run, new: Run) -> list[Change]:
    before = {(one.case, one.impl): one.instructions for one in old.instructions}
    changes = []
    for one in new.instructions:
        earlier = before.get((one.case, one.impl))
        if earlier and one.impl.startswith(OURS):
            factor = one.instructions / earlier
            verdict = "slower" if factor > 1 + LEAST_CHANGE_OF_COUNTS else ""
            verdict = "faster" if factor < 1 - LEAST_CHANGE_OF_COUNTS else verdict
            what = f"instructions: {one.case}, {one.impl}"
            changes.append(Change(what, f"{earlier:,}", f"{one.instructions:,}", factor, 1.0, verdict))
    return changes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if something got slower, 2 if nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description="What got slower, beyond noise.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parsed = parser.parse_args(arguments)
    try:
        old, new = load([parsed.old]), load([parsed.new])
        changes = compare(old, new)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    rows = [[one.what, one.old, one.new, f"{one.factor:.2f} x", f"{one.machine:.2f} x", one.verdict] for one in changes]
    print_table("ours, the slower first", ["", "old", "new", "change", "the machine's", ""], rows)
    versions = [run.environment["versions"].get("torch") for run in (old, new)]
    if versions[0] != versions[1]:
        print(f"torch {versions[0]} before, {versions[1]} now: some of a change may be torch's")
    slower = sum(one.verdict == "slower" for one in changes)
    faster = sum(one.verdict == "faster" for one in changes)
    print(f"{slower} slower, {faster} faster, {len(changes) - slower - faster} within noise")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.scale [--quick] [--json FILE] [--device cpu|cuda]`

How an update grows, along two straight lines: microseconds a tensor, over 1 to 10,000 tensors of 16 elements, and
nanoseconds a parameter, over 1,000 to 1,000,000,000 parameters in one tensor, as memory allows. Where the two meet,
elements a tensor, an implementation bends: below it pays for tensors, above it for bytes. The third ladder, 1,000
tensors of 1 to 100,000 elements, goes through the bend. From a cold cache.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from bench import cases
from bench.fit import Line, line
from bench.libraries import DIFFUSERS, EMA_PYTORCH, TIMM, TORCH_EMA, ULTRALYTICS
from bench.peers import COPY, FOREACH, MULTI_FN, OURS, Peer
from bench.race import Group, race
from bench.records import Record
from bench.session import Session, run_benchmarks
from bench.table import number, print_table

ELEMENTS_OF_SMALL = 16
TENSORS_OF_THIRD = 1_000
#: One tensor beyond this many parameters lies in memory, not in a cache: from there on the second line is fitted.
FEWEST_PARAMETERS = 10**7


@dataclass(frozen=True)
class Growth:
    """Of one implementation.

    Args:
        over_tensors: microseconds over tensors; over_parameters: microseconds over parameters.
        bend: elements a tensor at which a tensor costs as much as its bytes; None: never (a cost of 0).
    """

    impl: str
    over_tensors: Line
    over_parameters: Line

    @property
    def us_per_tensor(self) -> float:
        return self.over_tensors.slope

    @property
    def ns_per_parameter(self) -> float:
        return self.over_parameters.slope * 1e3

    @property
    def bend(self) -> float | None:
        return self.us_per_tensor / self.over_parameters.slope if self.over_parameters.slope else None


def ladders(quick: bool) -> dict[str, list[tuple[int, int]]]:
    """(tensors, elements of each), by the name of the bench."""
    tensors = [1, 10, 1000] if quick else [10**power for power in range(5)]
    parameters = [10**power for power in range(3, 10)] + [3 * 10**7, 3 * 10**8]
    if quick:
        parameters = [10**5, 10**7, 2 * 10**7]
    elements = [1, 1000] if quick else [10**power for power in range(6)]
    return {
        "scale: tensors": [(count, ELEMENTS_OF_SMALL) for count in tensors],
        "scale: parameters": [(1, size) for size in parameters],
        "scale: elements": [(TENSORS_OF_THIRD, size) for size in elements],
    }


def growth(records: Sequence[Record]) -> list[Growth]:
    """The two lines of everybody who has enough points on both ladders, the lowest cost a tensor first."""
    small: dict[str, list[tuple[float, float]]] = {}
    large: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.median_us is None:
            continue
        if record.bench == "scale: tensors" and record.tensors >= 10:
            small.setdefault(record.impl, []).append((record.tensors, record.median_us))
        elif record.bench == "scale: parameters" and record.params >= FEWEST_PARAMETERS:
            large.setdefault(record.impl, []).append((record.params, record.median_us))
    found = [
        Growth(impl, line(small[impl]), line(large[impl]))
        for impl in small
        if len(small[impl]) >= 2 and len(large.get(impl, [])) >= 2
    ]
    return sorted(found, key=lambda one: one.us_per_tensor)


def growth_rows(found: Sequence[Growth]) -> list[list[str]]:
    """As a table shows them."""
    return [
        [
            one.impl,
            number(one.us_per_tensor),
            f"{one.over_tensors.worst:.0%}",
            number(one.ns_per_parameter),
            f"{one.over_parameters.worst:.0%}",
            "" if one.bend is None else number(one.bend),
        ]
        for one in found
    ]


GROWTH_COLUMNS = ("", "us a tensor", "off by at most", "ns a parameter", "off by at most", "bends at elements a tensor")


def run(session: Session) -> None:
    """The ladders, then the lines."""
    entrants: tuple[Peer, ...] = (OURS, COPY, FOREACH, MULTI_FN, TIMM)
    if not session.quick:
        entrants = (*entrants, ULTRALYTICS, EMA_PYTORCH, TORCH_EMA, DIFFUSERS)

    for bench, rungs in ladders(session.quick).items():
        for tensors, elements in rungs:
            # Of what takes seconds to build, the few that say most.
            slow = tensors * elements > 4 * 10**7 or tensors > 2000
            chosen = (OURS, FOREACH) if elements > 2 * 10**8 else entrants[:4] if slow else entrants
            make_case = partial(cases.ladder, tensors, elements)
            race(session, Group(bench, make_case, chosen, "cold", session.budget(1.5, least=3 if slow else 7)))
    rows = growth_rows(growth(session.run.records))
    print_table("growth: two straight lines", GROWTH_COLUMNS, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_benchmarks("bench.scale", "How an update grows with its work.", {"scale": run}, arguments)


if __name__ == "__main__":
    sys.exit(main())

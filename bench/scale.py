"""`python -m bench.scale [--quick] [--json FILE] [--device cpu|cuda]`

Measure how an update grows, along two straight lines: microseconds per tensor, over 1 to 10,000 tensors of 16 elements,
and nanoseconds per parameter, over 1,000 to 1,000,000,000 parameters in one tensor, as memory allows. At the number of
elements per tensor where the two meet, an implementation bends: below, time grows with tensors; above, with bytes. The
third series, 1,000 tensors of 1 to 100,000 elements, goes through the bend. From a cold cache.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from bench.contenders.libraries import DIFFUSERS, EMA_PYTORCH, TIMM, TORCH_EMA, ULTRALYTICS
from bench.contenders.peers import FOREACH, MULTI_FN, OURS
from bench.harness import cases
from bench.harness.console import print_table
from bench.harness.contender import COPY, Peer
from bench.harness.growth import GROWTH_COLUMNS, growth, growth_rows
from bench.harness.race import Group, race
from bench.harness.session import Session, run_benchmarks

ELEMENTS_OF_SMALL = 16
TENSORS_OF_THIRD = 1_000


def ladders(quick: bool) -> dict[str, list[tuple[int, int]]]:
    """Return (tensors, elements of each), by the name of the benchmark."""
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


def run(session: Session) -> None:
    """Measure the series, then print the lines."""
    entrants: tuple[Peer, ...] = (OURS, COPY, FOREACH, MULTI_FN, TIMM)
    if not session.quick:
        entrants = (*entrants, ULTRALYTICS, EMA_PYTORCH, TORCH_EMA, DIFFUSERS)

    for bench, rungs in ladders(session.quick).items():
        for tensors, elements in rungs:
            # Few peers where building takes seconds.
            slow = tensors * elements > 4 * 10**7 or tensors > 2000
            chosen = (OURS, FOREACH) if elements > 2 * 10**8 else entrants[:4] if slow else entrants
            make_case = partial(cases.ladder, tensors, elements)
            race(session, Group(bench, make_case, chosen, "cold", session.budget(1.5, least=3 if slow else 7)))
    rows = growth_rows(growth(session.run.records))
    print_table("growth: two straight lines", GROWTH_COLUMNS, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_benchmarks("bench.scale", "How an update grows with its work.", {"scale": run}, arguments)


if __name__ == "__main__":
    sys.exit(main())

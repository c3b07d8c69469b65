"""`python -m bench.memory [--quick] [--json FILE] [--device cpu|cuda]`

Measure memory beyond the model and one average of it: the peak within an update and within a validation of the averaged
weights, counted from the allocations of torch's allocator. Python objects and our plans (1 to 2 kB a tensor) are
outside of it and are counted for no implementation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.contenders.libraries import LIBRARIES, QUICK_LIBRARIES
from bench.contenders.peers import CASTS, FOREACH, OURS, OURS_IN_PLACE
from bench.harness.cases import Case, Unavailable, build_model, resnet50, vit_b_bf16
from bench.harness.console import print_table, size
from bench.harness.contender import Peer, check_update, footprint
from bench.harness.race import dtypes
from bench.harness.session import Session, run_benchmarks


def measure(session: Session, case: Case, entrants: Sequence[Peer]) -> None:
    """Measure one table."""
    rows = []
    for peer in entrants:
        try:
            check_update(peer, case, session.device)  # also imports, before anything is counted
            found, contender = footprint(session.meter, peer, build_model(case, session.device), case)
        except Unavailable as error:
            session.miss("memory", case.name, peer.name, error)
            print(f"  not measured: {peer.name}: {error}")
            continue
        backend = contender.backend or "torch"
        session.record("memory: update", case, peer.name, backend, extra_bytes=found.update)
        validated = "cannot" if found.validation is None else size(found.validation)
        if found.validation is not None:
            session.record("memory: validation", case, peer.name, backend, extra_bytes=found.validation)
        how = "second module" if contender.second_module is not None else "" if contender.enter is None else "exchange"
        rows.append([peer.name, size(found.update), validated, how])
    columns = ["", "in an update", "in a validation", ""]
    title = f"memory: {case.name}, {dtypes(case)}: beyond the model and one average ({size(case.shadow_bytes)})"
    print_table(title, columns, rows)


def run(session: Session) -> None:
    """Measure all tables."""
    shipped = QUICK_LIBRARIES if session.quick else LIBRARIES
    measure(session, resnet50(), (OURS, OURS_IN_PLACE, FOREACH, *shipped))
    if not session.quick:
        measure(session, vit_b_bf16(), (OURS, *CASTS, *shipped))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_benchmarks("bench.memory", "Memory beyond the model and one average.", {"memory": run}, arguments)


if __name__ == "__main__":
    sys.exit(main())

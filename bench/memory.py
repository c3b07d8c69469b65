"""`python -m bench.memory [--quick] [--json FILE] [--device cpu|cuda]`

Memory beyond the model and one average of it: what an implementation keeps, and the peak within an update and within a
validation of the averaged weights. Counted, not computed: every allocation of torch's own allocator while the
implementation is built, updates and validates. Objects (modules, tensors, our plans: a kilobyte or two a tensor) lie
outside it and are counted for nobody.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from bench import nets, peers
from bench.cases import Case, Unavailable, build_model
from bench.clocks import Clock
from bench.libraries import LIBRARIES, QUICK_LIBRARIES
from bench.peers import FOREACH, OURS, OURS_IN_PLACE, Contender, Peer
from bench.race import dtypes
from bench.session import Session, run_benchmarks
from bench.table import print_table, size


@dataclass(frozen=True)
class Footprint:
    """Bytes beyond the model and one average. `validation`: None where nothing can be validated."""

    kept: int
    update: int
    validation: int | None


def footprint(clock: Clock, peer: Peer, model: nn.Module, case: Case) -> tuple[Footprint, Contender]:
    """Builds the peer and counts.

    Raises:
        Unavailable: it is missing or raises.
    """
    found: list[Contender] = []
    kept = clock.allocated(lambda: found.append(peers.built(peer, model, case))).kept - case.shadow_bytes
    contender = found[0]
    validation = None
    if contender.enter is not None and contender.leave is not None:
        first = clock.allocated(contender.swap).kept  # what is allocated once, at the first time, and kept
        validation = kept + first + clock.allocated(contender.swap).peak
    elif contender.second_module is not None:
        validation = kept
    return Footprint(kept, kept + clock.allocated(contender.run).peak, validation), contender


def measure(session: Session, case: Case, entrants: Sequence[Peer]) -> None:
    """One table."""
    rows = []
    for peer in entrants:
        try:
            peers.check_update(peer, case, session.device)  # imports and first uses, too, before anything is counted
            found, contender = footprint(session.clock, peer, build_model(case, session.device), case)
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
    """All tables."""
    shipped = QUICK_LIBRARIES if session.quick else LIBRARIES
    measure(session, nets.resnet50(), (OURS, OURS_IN_PLACE, FOREACH, *shipped))
    if not session.quick:
        measure(session, nets.vit_b_bf16(), (OURS, *peers.CASTS, *shipped))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_benchmarks("bench.memory", "Memory beyond the model and one average.", {"memory": run}, arguments)


if __name__ == "__main__":
    sys.exit(main())

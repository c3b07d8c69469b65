"""`python -m bench.update [--quick] [--json FILE] [--device cpu|cuda] [--threads N]`

Measure an update beside the peers: from 1,000 small tensors over real nets to models that fill the memory; in float32,
from and in bfloat16, and of several averages at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench.contenders import libraries, peers
from bench.contenders.libraries import LIBRARIES, QUICK_LIBRARIES, REPLACING
from bench.contenders.peers import (
    APART,
    FOREACH,
    FOREACH_GRAPH,
    OURS,
    OURS_GRAPH,
    OURS_TORCH,
    OURS_TRITON,
    TOGETHER,
)
from bench.harness import cases
from bench.harness.cases import Case, build_model
from bench.harness.console import print_records
from bench.harness.contender import COPY, LIMIT, Peer, nudge
from bench.harness.machine import free_bytes
from bench.harness.measure import take_turns
from bench.harness.race import Group, dtypes, race
from bench.harness.session import Session, run_benchmarks
from fastema import FastEMA

DECAYS = (0.99, 0.999, 0.9999, 0.99999)

_HOST_NOTE = (
    "update() on 600 tensors of one element, 7 kB in all: walking and checking the model, the schedule, the call and "
    "the loop over 600 chunks, without weights to move and without a second thread"
)
_CPU_COPY_NOTE = (
    "a copy is counted as 8 bytes an element; a processor that reads memory before it overwrites it moves 12, so an "
    "update, which reads its target anyway, can show more than 100 % of copy"
)


def measure_copy(session: Session, elements: int | None = None) -> None:
    """Measure the machine's bandwidth: `copy_` of one float32 tensor into another, 8 bytes an element."""
    if elements is None:
        elements = 64_000_000 if session.device.type == "cpu" else 1_000_000_000
    source = torch.ones(elements, device=session.device)
    target = torch.zeros_like(source)
    timing = take_turns({"": lambda: target.copy_(source)}, session.meter, "cold", session.budget(2))[""]
    case = Case(f"{elements / 1e6:g} M in one", ((elements,),))
    record = session.record("copy", case, LIMIT.name, "torch", timing, bytes_floor=8 * elements)
    note = _CPU_COPY_NOTE if session.device.type == "cpu" else ""
    print_records(f"copy: {case.name}, float32: this machine's bandwidth", [record], [], note)


def plan(session: Session) -> list[Group]:
    """Return the tables of a run, small cases first."""
    on_gpu = session.device.type == "cuda"
    ours = (OURS, *((OURS_TRITON, OURS_GRAPH, FOREACH_GRAPH) if on_gpu else ()))
    shipped = QUICK_LIBRARIES if session.quick else LIBRARIES
    everybody = (*ours, FOREACH, *shipped)
    with_copies = (LIMIT, COPY, *everybody)
    replacing = () if session.quick else REPLACING
    few = (OURS, FOREACH, peers.MULTI_FN, libraries.TIMM)
    mixed = (LIMIT, COPY, *ours, *((peers.CASTS[1], libraries.TIMM) if session.quick else (*peers.CASTS, *shipped)))

    def group(
        make_case: Callable[[], Case], entrants: Sequence[Peer], seconds: float, warm: bool = False, least: int = 5
    ) -> Group:
        return Group("update", make_case, entrants, "warm" if warm else "cold", session.budget(seconds, least))

    small = (*ours, OURS_TORCH, FOREACH, *shipped, *replacing)
    groups = [
        group(cases.small_tensors, (*small, *(() if on_gpu else (OURS_TRITON,))), 5, warm=True, least=9),
        group(cases.small_tensors, small, 5, least=9),
        Group("host", cases.one_element_tensors, few, "warm", session.budget(1.5), _HOST_NOTE),
    ]
    if session.quick:
        return [*groups, group(cases.resnet50, with_copies, 8), group(cases.mixed_list, mixed, 6)]
    groups += [
        Group("host", cases.one_element_tensors, few, "cold", session.budget(2.5)),
        group(cases.one_large_tensor, (LIMIT, COPY, *ours, FOREACH, peers.MULTI_FN, libraries.TIMM), 4),
        group(cases.resnet50, (*with_copies, *replacing), 13, least=11),
        *(group(make, with_copies, 9, least=11) for make in (cases.edgenext_base, cases.segmentation_list)),
        group(cases.vit_b, with_copies, 15, least=9),
        group(cases.mixed_one_tensor, mixed, 9),
        group(cases.mixed_list, (*mixed, peers.COMPILED), 8),
        group(cases.vit_b_bf16, mixed, 9),
        group(cases.half_list, (LIMIT, COPY, *everybody), 6, least=9),
    ]
    # As many implementations, in this order, as the memory holds at once; building them takes most of the time.
    large = (OURS, LIMIT, COPY, FOREACH, peers.MULTI_FN)
    groups += [group(make, large, 4) for make in (cases.vit_h, cases.sd15_unet)]
    free = free_bytes(session.device)
    if free is not None:
        groups.append(group(partial(cases.llama_7b, free), (OURS, LIMIT, COPY, peers.CASTS[1]), 5, least=3))
    return groups


def measure_several(session: Session, case: Case) -> None:
    """Measure one to four averages of one model: in one read of its weights, and one after the other."""
    model = build_model(case, session.device)
    counts = (1, 4) if session.quick else (1, 2, 3, 4)
    apart = [FastEMA(model, decay=decay, decay_type="constant") for decay in DECAYS]
    together = {count: FastEMA(model, decay=DECAYS[:count], decay_type="constant") for count in counts}
    nudge(model)

    def one_after_the_other(count: int) -> None:
        for ema in apart[:count]:
            ema.update()

    calls: dict[str, Callable[[], object]] = {f"{TOGETHER} {count}": together[count].update for count in counts}
    calls |= {f"{APART} {count}": partial(one_after_the_other, count) for count in counts}
    timings = take_turns(calls, session.meter, "cold", session.budget(6), session.sweep)
    records = []
    for count in counts:
        floors = {TOGETHER: (4 + 8 * count) * case.params, APART: 12 * count * case.params}
        for name, floor in floors.items():
            record = session.record(
                *("several", case, name, apart[0].backend_name, timings[f"{name} {count}"]),
                bytes_floor=floor,
                shadows=count,
                launches=session.meter.launches(calls[f"{name} {count}"]),
            )
            records.append(record)
    for count in counts:
        found = [record for record in records if record.shadows == count]
        print_records(f"several: {case.name}, {dtypes(case)}: averages: {count}", found)


def run(session: Session) -> None:
    """Measure all tables."""
    for group in plan(session):
        race(session, group)
    measure_several(session, cases.resnet50())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_benchmarks(
        "bench.update", "The time of an update, beside the peers.", {"update": run}, arguments, measure_copy
    )


if __name__ == "__main__":
    sys.exit(main())

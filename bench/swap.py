"""`python -m bench.swap [--quick] [--json FILE] [--device cpu|cuda]`

Measure a swap (the averaged weights into the model and out again), then a whole validation of a small net, of the base
weights and of the averaged ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from bench.contenders import libraries
from bench.contenders.peers import BASE_TWICE, MULTI_FN, OURS, OURS_IN_PLACE, SWAPS_BY_HAND
from bench.harness.cases import Case, Unavailable, build_model, import_timm, resnet50, resnet50_bf16
from bench.harness.console import print_records, size
from bench.harness.contender import Contender, Peer, built, check_swap, footprint
from bench.harness.measure import take_turns
from bench.harness.race import CACHE_WORDS, dtypes
from bench.harness.session import Session, run_benchmarks

#: Bytes moved per byte of the model: a clone or a copy reads one and writes one.
_MOVED = {OURS.name: 0, OURS_IN_PLACE.name: 4, SWAPS_BY_HAND[2].name: 0, libraries.LIGHTNING.name: 12}
_MOVED_BY_STORE_COPY_RESTORE = 6


# ---- the swap ----


def measure_swap(session: Session, case: Case, entrants: Sequence[Peer], seconds: float = 3) -> None:
    """Measure swaps, warm and cold."""
    contenders: dict[Peer, Contender] = {}
    extra: dict[Peer, int | None] = {}
    missed: list[tuple[str, str]] = []
    for peer in entrants:
        try:
            check_swap(peer, case, session.device)
            found, contenders[peer] = footprint(session.meter, peer, build_model(case, session.device), case)
            extra[peer] = found.validation
        except Unavailable as error:
            session.miss("swap", case.name, peer.name, error)
            missed.append((peer.name, str(error)))
    calls = {peer.name: contender.swap for peer, contender in contenders.items()}
    for cache, words in CACHE_WORDS.items():
        sweep = session.sweep if cache == "cold" else None
        timings = take_turns(calls, session.meter, cache, session.budget(seconds), sweep)
        records = []
        for peer, contender in contenders.items():
            record = session.record(
                *("swap", case, peer.name, contender.backend or "torch", timings[peer.name], cache),
                bytes_floor=_MOVED.get(peer.name, _MOVED_BY_STORE_COPY_RESTORE) * case.live_bytes,
                launches=session.meter.launches(contender.swap),
                extra_bytes=extra[peer],
            )
            records.append(record)
        notes = [f"{record.impl} {size(record.extra_bytes or 0)}" for record in records]
        title = f"swap: {case.name}, {dtypes(case)}: averaged weights in and out again, {words}"
        print_records(title, records, missed, f"memory beyond the model and one average: {'; '.join(notes)}")


# ---- a whole validation ----


def measure_validation(session: Session, entrants: Sequence[Peer]) -> None:
    """Measure a pass over the same batches with the base weights and one with the averaged weights."""
    try:
        model = import_timm().create_model("resnet18", num_classes=10).to(session.device).eval()
    except Unavailable as error:
        session.miss("validation", "ResNet-18", "", error)
        print(f"validation: left out: {error}\n")
        return
    case = Case("ResNet-18, 2 batches of 8 x 64 px", tuple(tuple(one.shape) for one in model.parameters()))
    batches = [torch.rand(8, 3, 64, 64, device=session.device) for _ in range(2)]

    @torch.no_grad()
    def validate(net: nn.Module) -> None:
        for batch in batches:
            net(batch)

    def validate_both(contender: Contender) -> None:
        validate(model)
        if contender.enter is None or contender.leave is None:
            assert contender.second_module is not None
            validate(contender.second_module)
            return
        contender.enter()
        try:
            validate(model)
        finally:
            contender.leave()

    def validate_twice() -> None:
        validate(model)
        validate(model)

    calls: dict[str, Callable[[], object]] = {BASE_TWICE: validate_twice}
    backends = {BASE_TWICE: "torch"}
    missed: list[tuple[str, str]] = []
    for peer in entrants:
        try:
            contender = built(peer, model, case)
            if contender.second_module is not None:
                contender.second_module.eval()
            calls[peer.name] = partial(validate_both, contender)
            backends[peer.name] = contender.backend or "torch"
        except Unavailable as error:
            session.miss("validation", case.name, peer.name, error)
            missed.append((peer.name, str(error)))
    timings = take_turns(calls, session.meter, "cold", session.budget(8))
    records = [
        session.record("validation", case, name, backends[name], timings[name], launches=None, extra_bytes=None)
        for name in calls
    ]
    print_records(f"validation: {case.name}: base and averaged weights, start to end", records, missed)


def run(session: Session) -> None:
    """Measure all tables."""
    packages = libraries.SWAPPING[:1] if session.quick else libraries.SWAPPING
    entrants = (OURS, OURS_IN_PLACE, *packages, *SWAPS_BY_HAND)
    measure_swap(session, resnet50(), entrants)
    measure_swap(session, resnet50_bf16(), (OURS, OURS_IN_PLACE, *packages))
    measure_validation(session, (OURS, OURS_IN_PLACE, libraries.TORCH_EMA, MULTI_FN, libraries.TIMM))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_benchmarks("bench.swap", "The time to validate the average.", {"swap": run}, arguments)


if __name__ == "__main__":
    sys.exit(main())

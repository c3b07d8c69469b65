"""`python -m bench.swap [--quick] [--json FILE] [--device cpu|cuda]`

The averaged weights into the model and out again, as every implementation does it; then a whole validation of a small
net, of the base weights and of the averaged ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench import libraries, nets, peers
from bench.cases import Case, Unavailable, build_model, import_timm
from bench.measure import take_turns
from bench.memory import footprint
from bench.peers import FOREACH, MULTI_FN, OURS, OURS_IN_PLACE, Build, Contender, Peer
from bench.race import CACHE_WORDS, dtypes
from bench.session import Session, run_benchmarks
from bench.table import print_records, size

BASE_TWICE = "the base weights twice, no average"


# ---- by hand ----


def _by_hand(swapper: Callable[[list[Tensor], list[Tensor]], tuple[Callable[[], None], Callable[[], None]]]) -> Build:
    """Bare `_foreach_lerp_` for the update, and a way to validate written down beside it."""

    def build(model: nn.Module, case: Case) -> Contender:
        contender = FOREACH.build(model, case)
        contender.enter, contender.leave = swapper(peers.lives_of(model), list(contender.averages()))
        return contender

    return build


def _clone_and_copy(lives: list[Tensor], averages: list[Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    stored: list[Tensor] = []

    def enter() -> None:
        stored[:] = [live.clone() for live in lives]
        torch._foreach_copy_(lives, averages)

    def leave() -> None:
        torch._foreach_copy_(lives, stored)
        stored.clear()

    return enter, leave


def _copy_through_kept(lives: list[Tensor], averages: list[Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    kept = [torch.empty_like(live) for live in lives]

    def enter() -> None:
        torch._foreach_copy_(kept, lives)
        torch._foreach_copy_(lives, averages)

    def leave() -> None:
        torch._foreach_copy_(lives, kept)

    return enter, leave


def _exchange_data(model: nn.Module, case: Case) -> Contender:
    # No byte is moved here either; but views and aliases (tied weights, RNNs' flat weights, FSDP's second view of a
    # shard, lists of tensors that somebody keeps) stay with the old memory, and are wrong without a word.
    contender = FOREACH.build(model, case)
    parameters, averages = list(model.parameters()), list(contender.averages())

    def exchange() -> None:
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.data, average.data = average.data, parameter.data

    contender.enter = contender.leave = exchange
    return contender


BY_HAND = (
    Peer("clone, foreach copy_, foreach copy_", _by_hand(_clone_and_copy), from_a_library=False),
    Peer("3 foreach copy_ through kept memory", _by_hand(_copy_through_kept), from_a_library=False, copies=2),
    Peer("exchange of .data per tensor", _exchange_data, from_a_library=False),
)
#: Packages that put the averages into the model; all others validate a second module.
PACKAGES = (libraries.TORCH_EMA, libraries.DIFFUSERS, libraries.DIFFUSERS_FOREACH, libraries.LIGHTNING)

#: Bytes moved a parameter and byte of it: a clone or a copy reads one and writes one.
_MOVED = {OURS.name: 0, OURS_IN_PLACE.name: 4, BY_HAND[2].name: 0, libraries.LIGHTNING.name: 12}
_MOVED_BY_STORE_COPY_RESTORE = 6


# ---- in and out ----


def measure_swap(session: Session, case: Case, entrants: Sequence[Peer], seconds: float = 3) -> None:
    """In and out again, timed."""
    contenders: dict[Peer, Contender] = {}
    extra: dict[Peer, int | None] = {}
    missed: list[tuple[str, str]] = []
    for peer in entrants:
        try:
            peers.check_swap(peer, case, session.device)
            found, contenders[peer] = footprint(session.clock, peer, build_model(case, session.device), case)
            extra[peer] = found.validation
        except Unavailable as error:
            session.miss("swap", case.name, peer.name, error)
            missed.append((peer.name, str(error)))
    calls = {peer.name: contender.swap for peer, contender in contenders.items()}
    for cache, words in CACHE_WORDS.items():
        sweep = session.sweep if cache == "cold" else None
        timings = take_turns(calls, session.clock, cache, session.budget(seconds), sweep)
        records = []
        for peer, contender in contenders.items():
            record = session.record(
                *("swap", case, peer.name, contender.backend or "torch", timings[peer.name], cache),
                bytes_floor=_MOVED.get(peer.name, _MOVED_BY_STORE_COPY_RESTORE) * case.live_bytes,
                launches=session.clock.launches(contender.swap),
                extra_bytes=extra[peer],
            )
            records.append(record)
        notes = [f"{record.impl} {size(record.extra_bytes or 0)}" for record in records]
        title = f"swap: {case.name}, {dtypes(case)}: averaged weights in and out again, {words}"
        print_records(title, records, missed, f"memory beyond the model and one average: {'; '.join(notes)}")


# ---- a whole validation ----


def measure_validation(session: Session, entrants: Sequence[Peer]) -> None:
    """A pass over the same batches with the base weights and one with the averaged ones, start to end."""
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
            contender = peers.built(peer, model, case)
            if contender.second_module is not None:
                contender.second_module.eval()
            calls[peer.name] = partial(validate_both, contender)
            backends[peer.name] = contender.backend or "torch"
        except Unavailable as error:
            session.miss("validation", case.name, peer.name, error)
            missed.append((peer.name, str(error)))
    timings = take_turns(calls, session.clock, "cold", session.budget(8))
    records = [
        session.record("validation", case, name, backends[name], timings[name], launches=None, extra_bytes=None)
        for name in calls
    ]
    print_records(f"validation: {case.name}: base and averaged weights, start to end", records, missed)


def run(session: Session) -> None:
    """All tables."""
    packages = PACKAGES[:1] if session.quick else PACKAGES
    entrants = (OURS, OURS_IN_PLACE, *packages, *BY_HAND)
    measure_swap(session, nets.resnet50(), entrants)
    measure_validation(session, (OURS, OURS_IN_PLACE, libraries.TORCH_EMA, MULTI_FN, libraries.TIMM))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_benchmarks("bench.swap", "What it costs to validate the average.", {"swap": run}, arguments)


if __name__ == "__main__":
    sys.exit(main())

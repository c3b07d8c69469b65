"""Everybody on one case: checked, built, timed in turns, recorded and printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bench import peers
from bench.cases import Case, Unavailable, build_model
from bench.machine import cache_bytes, free_bytes, tidy_up
from bench.measure import Budget, rounds_until_cold, take_turns
from bench.peers import LIMIT, Contender, Peer
from bench.records import Cache, Record, Timing
from bench.session import Session
from bench.table import print_records

CACHE_WORDS: dict[Cache, str] = {
    "warm": "warm: the same model again and again",
    "cold": "cold: rotating over models that together exceed the cache",
}
_OBJECT_BYTES = 1024  # of a tensor's own objects in Python and C++, roughly
_MOST_COPIES = 32  # models a contender rotates over: building them takes time
_SPARE_BYTES = 1 << 30  # for everything but weights


@dataclass(frozen=True)
class Group:
    """One table.

    Args:
        bench: what the records are filed under.
        make_case: builds the case; may raise `Unavailable`.
        entrants: who.
        cache: of large cases the two are the same; "cold" then.
        note: a line under the table.
    """

    bench: str
    make_case: Callable[[], Case]
    entrants: Sequence[Peer]
    cache: Cache
    budget: Budget
    note: str = ""


def race(session: Session, group: Group) -> list[Record]:
    """Measures and prints one table; returns its records."""
    missed_before = len(session.run.missing)
    try:
        case = group.make_case()
    except Unavailable as error:
        name = getattr(group.make_case, "__name__", group.bench)
        session.miss(group.bench, name, "", error)
        print(f"{group.bench}: {name} is left out: {error}\n")
        return []
    contenders = assemble(session, group.bench, case, group.entrants, group.cache)
    calls = {peer.name: [one.run for one in several] for peer, several in contenders.items()}
    timings = take_turns(calls, session.clock, group.cache, group.budget)
    records = record_updates(session, group.bench, case, contenders, timings, group.cache)
    missed = [(one.impl, one.reason) for one in session.run.missing[missed_before:]]
    print_records(
        f"{group.bench}: {case.name}, {dtypes(case)}, {CACHE_WORDS[group.cache]}", records, missed, group.note
    )
    return records


def assemble(
    session: Session, bench: str, case: Case, entrants: Sequence[Peer], cache: Cache
) -> dict[Peer, list[Contender]]:
    """Those who pass the check, each on as many models as it takes to find cold memory again."""
    tidy_up()
    reserve = _SPARE_BYTES + (case.shadow_bytes if any(peer.copies > 1 for peer in entrants) else 0)
    models = _Models(case, session.device, cache, len(entrants))
    contenders: dict[Peer, list[Contender]] = {}
    for peer in entrants:
        try:
            if peer.averages:
                peers.check_update(peer, case, session.device)
            _ensure_room(models.bytes_wanted(peer), reserve, session.device)
            contenders[peer] = [peers.built(peer, model, case) for model in models.take()]
        except Unavailable as error:
            session.miss(bench, case.name, peer.name, error)
    models.nudge()
    return contenders


def _ensure_room(wanted: int, reserve: int, device: torch.device) -> None:
    if wanted <= _SPARE_BYTES // 4:
        return
    free = free_bytes(device)
    if free is not None and wanted + reserve > free:
        raise Unavailable(f"needs {(wanted + reserve) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


class _Models:
    """The models that the contenders of a case average."""

    def __init__(self, case: Case, device: torch.device, cache: Cache, contenders: int) -> None:
        self._case = case
        self._device = device
        self._models: list[nn.Module] = []
        held = case.live_bytes + case.shadow_bytes
        # Beyond twice the cache one model serves all: nobody finds in it what another left there.
        self._shared = held >= 2 * cache_bytes(device)
        touched = contenders * (held + case.tensors * _OBJECT_BYTES)
        self._copies = min(rounds_until_cold(touched, device), _MOST_COPIES) if cache == "cold" else 1

    def bytes_wanted(self, peer: Peer) -> int:
        """For one more contender."""
        if peer is LIMIT:
            return peer.floor(self._case)
        new_models = 0 if self._shared and self._models else self._case.live_bytes
        return self._copies * (new_models + peer.copies * self._case.shadow_bytes)

    def take(self) -> list[nn.Module]:
        """What the next contender rotates over."""
        if self._shared and self._models:
            return self._models
        models = [build_model(self._case, self._device) for _ in range(self._copies)]
        self._models += models
        return models

    def nudge(self) -> None:
        for model in self._models:
            peers.nudge(model)


def record_updates(
    session: Session,
    bench: str,
    case: Case,
    contenders: Mapping[Peer, Sequence[Contender]],
    timings: Mapping[str, Timing],
    cache: Cache,
) -> list[Record]:
    """Keeps the timings of updates, with what belongs to them."""
    copy_gbps = None
    if LIMIT in contenders:
        copy_gbps = LIMIT.floor(case) / timings[LIMIT.name].median_us / 1e3
    records = []
    for peer, several in contenders.items():
        record = session.record(
            bench,
            case,
            peer.name,
            several[0].backend or "torch",
            timings[peer.name],
            cache,
            bytes_floor=None if bench == "host" else peer.floor(case),
            copy_gbps=copy_gbps,
            launches=session.clock.launches(several[0].run),
        )
        records.append(record)
    return records


def dtypes(case: Case) -> str:
    """As in `float32 <- bfloat16`."""
    names = [str(dtype).removeprefix("torch.") for dtype in (case.shadow_dtype, case.live_dtype)]
    return names[0] if names[0] == names[1] else " <- ".join(names)

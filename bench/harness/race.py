"""Measure one table: check and build every implementation, time them in turns, record and print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bench.harness.cases import Case, Unavailable, build_model
from bench.harness.console import print_records
from bench.harness.contender import LIMIT, Contender, Peer, built, check_update, nudge
from bench.harness.machine import cache_bytes, free_bytes, tidy_up
from bench.harness.measure import Budget, take_turns
from bench.harness.records import Cache, Record, Timing
from bench.harness.session import Session

CACHE_WORDS: dict[Cache, str] = {"warm": "warm: the same model again and again", "cold": "cold: weights from memory"}
_SPARE_BYTES = 1 << 30  # for all but weights


@dataclass(frozen=True)
class Group:
    """The definition of one table.

    Args:
        bench: name of the benchmark in the records.
        make_case: builds the case; may raise `Unavailable`.
        entrants: the implementations.
        cache: "cold" for large cases, where the two are the same.
        note: a line under the table.
    """

    bench: str
    make_case: Callable[[], Case]
    entrants: Sequence[Peer]
    cache: Cache
    budget: Budget
    note: str = ""


def race(session: Session, group: Group) -> list[Record]:
    """Measure, print and keep one table; return its records."""
    missed_before = len(session.run.missing)
    try:
        case = group.make_case()
    except Unavailable as error:
        name = getattr(group.make_case, "__name__", group.bench)
        session.miss(group.bench, name, "", error)
        print(f"{group.bench}: {name} is left out: {error}\n")
        return []
    if (group.bench, case.name, group.cache) in session.before:
        return []
    # From twice the cache on, each call replaces the cache's contents, so no sweep is needed and all share one model.
    fits = case.live_bytes + case.shadow_bytes < 2 * cache_bytes(session.device)
    contenders = assemble(session, group.bench, case, group.entrants, alone=fits)
    calls = {peer.name: contender.run for peer, contender in contenders.items()}
    sweep = session.sweep if fits and group.cache == "cold" else None
    timings = take_turns(calls, session.meter, group.cache, group.budget, sweep)
    records = record_updates(session, group.bench, case, contenders, timings, group.cache)
    missed = [(one.impl, one.reason) for one in session.run.missing[missed_before:]]
    print_records(
        f"{group.bench}: {case.name}, {dtypes(case)}, {CACHE_WORDS[group.cache]}", records, missed, group.note
    )
    session.keep()
    return records


def assemble(session: Session, bench: str, case: Case, entrants: Sequence[Peer], alone: bool) -> dict[Peer, Contender]:
    """Build those who pass the check, each on a model of its own (`alone`) or all on one."""
    tidy_up()
    reserve = _SPARE_BYTES + (case.shadow_bytes if any(peer.copies > 1 for peer in entrants) else 0)
    models: list[nn.Module] = []
    contenders: dict[Peer, Contender] = {}
    for peer in entrants:
        try:
            if peer.averages:
                check_update(peer, case, session.device)
            new_model = 0 if peer is LIMIT or (models and not alone) else case.live_bytes
            own = peer.floor(case) if peer is LIMIT else peer.copies * case.shadow_bytes
            _ensure_room(new_model + own, reserve, session.device)
            if not models or (alone and peer is not LIMIT):
                models.append(build_model(case, session.device))
            contenders[peer] = built(peer, models[-1], case)
        except Unavailable as error:
            session.miss(bench, case.name, peer.name, error)
    for model in models:
        nudge(model)
    return contenders


def _ensure_room(wanted: int, reserve: int, device: torch.device) -> None:
    if wanted <= _SPARE_BYTES // 4:
        return
    free = free_bytes(device)
    if free is not None and wanted + reserve > free:
        raise Unavailable(f"needs {(wanted + reserve) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def record_updates(
    session: Session,
    bench: str,
    case: Case,
    contenders: Mapping[Peer, Contender],
    timings: Mapping[str, Timing],
    cache: Cache,
) -> list[Record]:
    """Record the timings of updates."""
    copy_gbps = None
    if LIMIT in contenders:
        copy_gbps = LIMIT.floor(case) / timings[LIMIT.name].median_us / 1e3
    records = []
    for peer, contender in contenders.items():
        record = session.record(
            bench,
            case,
            peer.name,
            contender.backend or "torch",
            timings[peer.name],
            cache,
            bytes_floor=None if bench == "host" else peer.floor(case),
            copy_gbps=copy_gbps,
            launches=session.meter.launches(contender.run),
        )
        records.append(record)
    return records


def dtypes(case: Case) -> str:
    """Return the dtypes as in `float32 <- bfloat16`."""
    names = [str(dtype).removeprefix("torch.") for dtype in (case.shadow_dtype, case.live_dtype)]
    return names[0] if names[0] == names[1] else " <- ".join(names)

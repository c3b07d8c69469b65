"""`python -m bench.update [--quick] [--json FILE] [--device cpu|cuda] [--threads N]`

What an update of the averages costs, and an exchange of the weights for a validation, beside what people use instead.
`--quick` takes about half a minute and shows the figures that the core was built for; without it real nets, float16
and torch.compile join. It ends with the figures, their targets and what was measured; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from bench import cases, peers
from bench.cases import Case, Unavailable, build_model
from bench.figures import Figure, figures
from bench.measure import (
    Budget,
    Cache,
    Call,
    Record,
    cache_bytes,
    clock_for,
    environment,
    rounds_until_cold,
    take_turns,
)
from bench.peers import COPY, FOUR_AT_ONCE, FOUR_SINGLES, OURS, Contender, Peer
from bench.session import CACHE_WORDS, Group, Session, add_common_arguments, apply_common_arguments
from bench.table import duration, number, print_table, size
from fastema import FastEMA

_OBJECT_BYTES = 1024  # of a tensor's own objects in Python and C++, roughly
_MOST_COPIES = 32  # models a contender rotates over: building them takes time


# ---- measuring ----


def measure_copy(session: Session, elements: int, budget: Budget) -> None:
    """The machine's own limit: `copy_` of one float32 tensor into another, 8 bytes an element."""
    source = torch.ones(elements, device=session.device)
    target = torch.zeros_like(source)
    timing = take_turns({"": [lambda: target.copy_(source)]}, session.clock, "cold", budget)[""]
    case = Case(f"{elements / 1e6:g} M in one", ((elements,),))
    more: dict[str, Any] = {"bytes_floor": 8 * elements, "extra_bytes": 0}
    record = session.record(("copy", case, "cold"), "torch copy_", "torch", timing, **more)
    session.copy_gbps = record.gbps or float("nan")
    note = (
        "8 bytes an element are counted; a processor that reads what it is about to overwrite moves 12, so that an "
        "update, which reads its target anyway, can show more than 100 % of copy"
    )
    cpu = session.device.type == "cpu"
    print_records(f"copy: {case.name}, float32: this machine's bandwidth", [record], [], note if cpu else "")


def measure_update(session: Session, group: Group) -> None:
    """Checks, builds and times everybody on a case, and prints the table."""
    try:
        case = group.make_case()
    except Unavailable as error:
        name = group.make_case.__name__
        session.miss(group.bench, name, "", error)
        print(f"{group.bench}: {name} is left out: {error}\n")
        return
    clock, device = session.clock, session.device
    models = _Models(case, device, group.cache, len(group.peers))
    contenders: dict[Peer, list[Contender]] = {}
    missed: list[tuple[str, str]] = []
    for peer in group.peers:
        try:
            if peer.averages:
                peers.check_update(peer, case, device)
            contenders[peer] = [peers.built(peer, model, case) for model in models.take()]
        except Unavailable as error:
            session.miss(group.bench, case.name, peer.name, error)
            missed.append((peer.name, str(error)))
    models.nudge()
    calls = {peer.name: [one.run for one in several] for peer, several in contenders.items()}
    timings = take_turns(calls, clock, group.cache, group.budget)
    records = []
    for peer, several in contenders.items():
        more: dict[str, Any] = {
            "bytes_floor": peer.floor(case),
            "launches": clock.launches(several[0].run),
            "extra_bytes": several[0].kept_bytes + clock.peak_bytes(several[0].run),
        }
        key = (group.bench, case, group.cache)
        records.append(session.record(key, peer.name, peer.backend, timings[peer.name], **more))
    title = f"{group.bench}: {case.name}, {_dtypes(case)}, {CACHE_WORDS[group.cache]}"
    print_records(title, records, missed, group.note)


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


def measure_several(session: Session, case: Case, budget: Budget) -> None:
    """Four averages of one model: in one read of its weights, and one after the other."""
    model = build_model(case, session.device)
    decays = (0.9, 0.99, 0.999, 0.9999)
    together = FastEMA(model, decay=decays)
    apart = [FastEMA(model, decay=decay) for decay in decays]
    peers.nudge(model)

    def one_after_the_other() -> None:
        for ema in apart:
            ema.update()

    calls: dict[str, list[Call]] = {FOUR_AT_ONCE: [together.update], FOUR_SINGLES: [one_after_the_other]}
    timings = take_turns(calls, session.clock, "cold", budget)
    floors = {FOUR_AT_ONCE: (4 + 8 * 4) * case.params, FOUR_SINGLES: 4 * 12 * case.params}
    records = [
        session.record(
            ("several", case, "cold"), name, "auto", timings[name], bytes_floor=floors[name], extra_bytes=0, shadows=4
        )
        for name in calls
    ]
    print_records(f"several: {case.name}, {_dtypes(case)}: four decays", records, [])


def measure_swap(session: Session, case: Case, budget: Budget) -> None:
    """The averaged weights into the model and out again."""
    swappers: dict[peers.SwapPeer, peers.Swapper] = {}
    missed: list[tuple[str, str]] = []
    for peer in peers.SWAPS:
        try:
            peers.check_swap(peer, case, session.device)
            model = build_model(case, session.device)
            averages = [parameter.detach() * 0.5 for parameter in model.parameters()]
            swappers[peer] = peers.built_swap(peer, model, averages)
        except Unavailable as error:
            session.miss("swap", case.name, peer.name, error)
            missed.append((peer.name, str(error)))
    calls = {peer.name: [swapper.run] for peer, swapper in swappers.items()}
    caches: dict[Cache, str] = {
        "warm": "warm: each call straight after others of its own",
        "cold": "cold: each call after somebody else's",
    }
    for cache, words in caches.items():
        timings = take_turns(calls, session.clock, cache, budget)
        records = []
        for peer, swapper in swappers.items():
            more: dict[str, Any] = {
                "bytes_floor": 0,
                "launches": session.clock.launches(swapper.run),
                "extra_bytes": swapper.kept_bytes + session.clock.peak_bytes(swapper.run),
            }
            key: tuple[str, Case, Cache] = ("swap", case, cache)
            records.append(session.record(key, peer.name, peer.backend, timings[peer.name], **more))
        title = f"swap: {case.name}, {_dtypes(case)}: averaged weights in and out again, {words}"
        print_records(title, records, missed)


def _dtypes(case: Case) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in (case.shadow_dtype, case.live_dtype)]
    return names[0] if names[0] == names[1] else " <- ".join(names)


# ---- the plan of a run ----


def plan(quick: bool, seconds: float = 1.0) -> list[Group]:
    """The update tables of a run.

    Args:
        quick: the figures of the core alone.
        seconds: stretches or shrinks the time of every table.
    """
    few = (peers.NATIVE, peers.FOREACH, peers.MULTI_FN, peers.TIMM)
    everybody = (*peers.SAME_DTYPE, COPY)
    mixed = (*peers.MIXED_DTYPES, COPY)
    small = few if quick else (*peers.SAME_DTYPE, peers.PLAIN)
    host_note = (
        "host part: the whole of update() on 600 tensors of one element, 7 kB in all: walking and checking the model, "
        "the schedule, the call, the loop over 600 chunks, but no weights to move and no second thread; cold: after "
        "other work has swept the tensors' own objects out of the caches, too"
    )
    mixed_note = "torch.compile of lerp_, another torch way, compiles for long: it is in the full run" if quick else ""
    groups = [
        Group("update", cases.small_tensors, small, "warm", Budget(2 * seconds)),
        Group("update", cases.small_tensors, small, "cold", Budget(2 * seconds)),
        Group("host", cases.one_element_tensors, few, "warm", Budget(1.5 * seconds), host_note),
        Group("host", cases.one_element_tensors, few, "cold", Budget(1.5 * seconds)),
        Group("update", cases.one_large_tensor, everybody, "cold", Budget(4 * seconds)),
        Group("update", cases.mixed_one_tensor, mixed, "cold", Budget(6 * seconds), mixed_note),
        Group("update", cases.mixed_list, mixed, "cold", Budget(5 * seconds), mixed_note),
    ]
    if quick:
        return groups
    half = (*peers.MIXED_DTYPES, peers.COMPILED, COPY)
    groups[-1] = Group("update", cases.mixed_list, half, "cold", Budget(20 * seconds))
    groups += [Group("update", make, everybody, "cold", Budget(20 * seconds)) for make in cases.REAL_NETS]
    groups.append(Group("update", _mixed_list_f16, half, "cold", Budget(20 * seconds)))
    return groups


def _mixed_list_f16() -> Case:
    return cases.mixed_list(torch.float16)


def run(
    groups: Iterable[Group],
    several_case: Case,
    swap_case: Case,
    device: torch.device,
    copy_elements: int = 64_000_000,
    copy_budget: Budget = Budget(1.5),  # noqa: B008  # frozen
    several_budget: Budget = Budget(3),  # noqa: B008
    swap_budget: Budget = Budget(2),  # noqa: B008
) -> Session:
    """Measures everything, table by table."""
    session = Session(device, clock_for(device))
    measure_copy(session, copy_elements, copy_budget)
    for group in groups:
        measure_update(session, group)
    measure_several(session, several_case, several_budget)
    measure_swap(session, swap_case, swap_budget)
    return session


# ---- printing ----


def print_records(title: str, records: Sequence[Record], missed: Sequence[tuple[str, str]], note: str = "") -> None:
    """One table; the fastest median first, ours as the measure of the others."""
    ours = next((record.median_us for record in records if record.impl == OURS), None)
    rows = []
    for record in sorted(records, key=lambda record: record.median_us):
        rows.append(
            [
                record.impl,
                duration(record.median_us),
                duration(record.p10_us),
                duration(record.p90_us),
                duration(record.min_us),
                "" if record.gbps is None else number(record.gbps),
                "" if record.copy_share is None else f"{record.copy_share:.0%}",
                "" if record.extra_bytes is None else size(record.extra_bytes),
                "" if ours is None else f"{number(record.median_us / ours)} x",
            ]
        )
    columns = ["", "median", "p10", "p90", "min", "GB/s", "of copy", "extra memory", "/ ours"]
    print_table(title, columns, rows)
    if note:
        print(f"  {note}")
    for name, reason in missed:
        print(f"  not measured: {name}: {reason}")
    if note or missed:
        print()
    sys.stdout.flush()


def print_environment(found: dict[str, Any]) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(f"{found['device']}, {found['cores']} cores, {found['threads']} threads, {size(found['cache_bytes'])} cache")
    print(f"{packages}; {found['date']}")
    if found["load"] is not None and found["load"] > 0.3:
        print(f"load {found['load']}: other work is running; use these timings for nothing but debugging")
    print(flush=True)


def print_figures(found: Sequence[Figure]) -> None:
    words = {True: "reached", False: "not reached", None: ""}
    rows = [[figure.figure, figure.target, figure.measured, words[figure.reached]] for figure in found]
    print_table("figures, from the medians above", ["figure", "target", "measured", ""], rows, left=4)


def to_json(session: Session, found: dict[str, Any], all_figures: Sequence[Figure]) -> str:
    """The whole run, as one JSON object."""
    whole = {
        "environment": found,
        "records": [record.to_json() for record in session.records],
        "unavailable": session.unavailable,
        "figures": [asdict(figure) for figure in all_figures],
    }
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.update", description="What an update costs, beside the peers."
    )
    parser.add_argument("--quick", action="store_true", help="the figures of the core only, in under a minute")
    add_common_arguments(parser)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    apply_common_arguments(parser, parsed)
    device = torch.device(parsed.device)
    found = environment(device)
    print_environment(found)
    session = run(
        plan(parsed.quick, parsed.seconds),
        cases.one_large_tensor(),
        cases.validation_list(),
        device,
        copy_elements=64_000_000 if device.type == "cpu" else 1_000_000_000,
        copy_budget=Budget(1.5 * parsed.seconds),
        several_budget=Budget(3 * parsed.seconds),
        swap_budget=Budget(2 * parsed.seconds),
    )
    all_figures = figures(session)
    print_figures(all_figures)
    if parsed.json is not None:
        parsed.json.write_text(to_json(session, found, all_figures))
        print(f"written: {parsed.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.update [--quick] [--json FILE] [--device cpu|cuda] [--threads N]`

What an update of the averages costs, and an exchange of the weights for a validation, beside what people use instead.
`--quick` takes about half a minute and shows the figures that the core was built for; without it real nets, float16
and torch.compile join. It ends with the figures, their targets and what was measured; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import cases, peers
from bench.cases import REAL_NET_NAMES, Case, Unavailable, build_model
from bench.measure import (
    Budget,
    Cache,
    Clock,
    Record,
    Timing,
    cache_bytes,
    clock_for,
    device_name,
    environment,
    rounds_until_cold,
    take_turns,
    versions,
)
from bench.peers import COPY, OURS, Contender, Peer
from bench.table import duration, number, print_table, size
from fastema import backends

_OBJECT_BYTES = 1024  # of a tensor's own objects in Python and C++, roughly
_MOST_COPIES = 32  # models a contender rotates over: building them takes time
_CACHE_WORDS = {
    "warm": "warm: the same model again and again",
    "cold": "cold: rotating over models that together exceed the cache",
}


@dataclass(frozen=True)
class Group:
    """One table: a case, who runs it, in which cache.

    Args:
        bench: "update", or "host": the same call where there is nothing to move.
        make_case: builds the case; may raise `Unavailable`.
        peers: who.
        cache: of large cases the two are the same; "cold" then.
        note: a line under the table.
    """

    bench: str
    make_case: Callable[[], Case]
    peers: Sequence[Peer]
    cache: Cache
    budget: Budget
    note: str = ""


@dataclass
class Session:
    """One run: the machine, and what was found so far."""

    device: torch.device
    clock: Clock
    copy_gbps: float = float("nan")
    records: list[Record] = field(default_factory=list)
    unavailable: list[dict[str, str]] = field(default_factory=list)

    def miss(self, bench: str, case: str, impl: str, reason: object) -> None:
        self.unavailable.append({"bench": bench, "case": case, "impl": impl, "reason": str(reason)})

    def record(self, group: tuple[str, Case, Cache], impl: str, backend: str, timing: Timing, **more: Any) -> Record:
        bench, case, cache = group
        floor: int | None = more.get("bytes_floor")
        gbps = floor / timing.median_us / 1e3 if floor and bench != "host" else None
        # What lies in a cache has no share of the memory's bandwidth.
        share = gbps / self.copy_gbps if gbps is not None and cache == "cold" and bench != "copy" else None
        if backend == "auto":
            backend = "native" if backends.native.why_unusable(self.device.type) is None else "torch"
        record = Record(
            bench=bench,
            case=case.name,
            impl=impl,
            backend=backend,
            device=device_name(self.device),
            dtype_shadow=str(case.shadow_dtype).removeprefix("torch."),
            dtype_live=str(case.live_dtype).removeprefix("torch."),
            tensors=case.tensors,
            params=case.params,
            shadows=1,
            median_us=timing.median_us,
            p10_us=timing.p10_us,
            p90_us=timing.p90_us,
            host_us=timing.median_us if bench == "host" and timing.host_us is None else timing.host_us,
            bytes_floor=floor,
            gbps=gbps,
            copy_share=share,
            launches=more.get("launches"),
            extra_bytes=more.get("extra_bytes"),
            versions=versions(),
            min_us=timing.min_us,
            samples=timing.samples,
            cache=cache,
        )
        self.records.append(record)
        return record

    def median(self, bench: str, case: str, impl: str, cache: Cache) -> float | None:
        """Of a record of this run; None where there is none."""
        for record in self.records:
            if (record.bench, record.case, record.impl, record.cache) == (bench, case, impl, cache):
                return record.median_us
        return None


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
    title = f"{group.bench}: {case.name}, {_dtypes(case)}, {_CACHE_WORDS[group.cache]}"
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
    swap_case: Case,
    device: torch.device,
    copy_elements: int = 64_000_000,
    copy_budget: Budget = Budget(1.5),  # noqa: B008  # frozen
    swap_budget: Budget = Budget(2),  # noqa: B008
) -> Session:
    """Measures everything, table by table."""
    session = Session(device, clock_for(device))
    measure_copy(session, copy_elements, copy_budget)
    for group in groups:
        measure_update(session, group)
    measure_swap(session, swap_case, swap_budget)
    return session


# ---- figures ----


@dataclass(frozen=True)
class Figure:
    """A figure, what it should be, and what it was. `reached`: None without a target, or a measurement."""

    figure: str
    target: str
    measured: str
    reached: bool | None


def figures(session: Session) -> list[Figure]:
    """What the core was built for; the definitions are the names, all medians of this run."""
    small, one, host = cases.small_tensors().name, cases.one_large_tensor().name, cases.one_element_tensors().name
    mixed = [cases.mixed_one_tensor().name, cases.mixed_list().name]
    swap = cases.validation_list().name
    figures = []
    for cache in _CACHE_WORDS:
        ratio = _ratio(session, "update", small, [peers.MULTI_FN.name], cache)
        figures.append(_at_least(f"update() {small} vs AveragedModel (ema multi fn), {cache}", 20, ratio))
    # "Not slower" leaves 3 % to the noise.
    ratio = _ratio(session, "update", one, [peers.FOREACH.name], "cold")
    figures.append(_at_least(f"update() {one} vs torch._foreach_lerp_", 0.97, ratio, digits=3))
    everything = [peer.name for peer in (*peers.MIXED_DTYPES, peers.COMPILED) if peer.name != OURS]
    shipped = [peer.name for peer in peers.MIXED_DTYPES if peer.from_a_library and peer.name != OURS]
    for case in mixed:
        ratio = _ratio(session, "update", case, everything, "cold")
        figures.append(_at_least(f"update() {case} vs the best torch way of all", 4, ratio))
        ratio = _ratio(session, "update", case, shipped, "cold")
        figures.append(
            _at_least("  the same vs the best of these that a library ships or a user writes in a line", None, ratio)
        )
    for cache in _CACHE_WORDS:
        figures.append(
            _under(
                f"host part of update(), 600 tensors, {cache}",
                30 if cache == "warm" else None,
                _our_median(session, "host", host, cache),
            )
        )
    ways = [peer.name for peer in peers.SWAPS[1:]]
    for cache in _CACHE_WORDS:
        median = _our_median(session, "swap", swap, cache)
        figures.append(_under(f"apply_shadow() + restore(), 1,000 tensors, {cache}", 200, median))
        ratio = _ratio(session, "swap", swap, ways[:2], cache)
        figures.append(_at_least("  the same vs clone + copy + copy of 25 M floats", 100, ratio))
        ratio = _ratio(session, "swap", swap, ways[2:], cache)
        figures.append(_at_least("  the same vs three copies through kept memory", None, ratio))
    figures += _real_net_figures(session)
    return figures


def _real_net_figures(session: Session) -> list[Figure]:
    """Of a full run: an update costs what copying the model costs, and the peers cost more."""
    measured = {record.case for record in session.records}
    targets = [
        (COPY, 1 / 1.05, "a mere copy of the model"),
        (peers.FOREACH, 1.05, "torch._foreach_lerp_"),
        (peers.MULTI_FN, 1.2, "AveragedModel (ema multi fn)"),
        (peers.TIMM, 1.2, "timm ModelEmaV3"),
        (peers.AVG_FN, 6.0, "AveragedModel (ema avg fn)"),
    ]
    figures = []
    for case in REAL_NET_NAMES:
        for peer, target, words in targets if case in measured else []:
            ratio = _ratio(session, "update", case, [peer.name], "cold")
            figures.append(_at_least(f"update() {case} vs {words}", round(target, 2), ratio, digits=2))
    return figures


def _our_median(session: Session, bench: str, case: str, cache: str) -> float | None:
    return session.median(bench, case, OURS, "warm" if cache == "warm" else "cold")


def _ratio(session: Session, bench: str, case: str, others: Iterable[str], cache: str) -> tuple[float, str] | None:
    """How many times as long the fastest of the others takes, and who that is."""
    ours = _our_median(session, bench, case, cache)
    found = [(session.median(bench, case, name, "warm" if cache == "warm" else "cold"), name) for name in others]
    measured = [(median, name) for median, name in found if median is not None]
    if ours is None or not measured:
        return None
    median, name = min(measured)
    return median / ours, name if len(found) > 1 else ""


def _at_least(figure: str, target: float | None, ratio: tuple[float, str] | None, digits: int = 1) -> Figure:
    wanted = "" if target is None else f">= {target:g} x"
    if ratio is None:
        return Figure(figure, wanted, "not measured", None)
    factor, who = ratio
    reached = None if target is None else factor >= target
    return Figure(figure, wanted, f"{factor:.{digits}f} x" + (f" ({who})" if who else ""), reached)


def _under(figure: str, target: float | None, median: float | None) -> Figure:
    wanted = "" if target is None else f"< {target:g} us"
    if median is None:
        return Figure(figure, wanted, "not measured", None)
    return Figure(figure, wanted, duration(median), None if target is None else median < target)


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=1.0, help="stretch the time of every table (default: 1)")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if parsed.threads is not None:
        if parsed.threads < 1:
            parser.error(f"--threads must be at least 1, got {parsed.threads}")
        torch.set_num_threads(parsed.threads)
    if not parsed.seconds > 0:
        parser.error(f"--seconds must be positive, got {parsed.seconds:g}")
    if parsed.json is not None and not parsed.json.parent.is_dir():
        parser.error(f"--json: there is no folder {parsed.json.parent}")
    device = torch.device(parsed.device)
    found = environment(device)
    print_environment(found)
    session = run(
        plan(parsed.quick, parsed.seconds),
        cases.validation_list(),
        device,
        copy_elements=64_000_000 if device.type == "cpu" else 1_000_000_000,
        copy_budget=Budget(1.5 * parsed.seconds),
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

"""The figures that the core was built for: what each should be, and what a run measured. Nothing is asserted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench import cases, peers
from bench.cases import REAL_NET_NAMES
from bench.peers import COPY, FOUR_AT_ONCE, FOUR_SINGLES, OURS
from bench.session import CACHE_WORDS, Session
from bench.table import duration


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
    for cache in CACHE_WORDS:
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
    for cache in CACHE_WORDS:
        figures.append(
            _under(
                f"host part of update(), 600 tensors, {cache}",
                30 if cache == "warm" else None,
                _our_median(session, "host", host, cache),
            )
        )
    together, apart = (session.median("several", one, name, "cold") for name in (FOUR_AT_ONCE, FOUR_SINGLES))
    share = None if together is None or apart is None else together / apart
    figures.append(
        Figure(
            f"four averages of {one} in one update vs four updates",
            "<= 0.80",
            "not measured" if share is None else f"{share:.2f}",
            None if share is None else share <= 0.8,
        )
    )
    ways = [peer.name for peer in peers.SWAPS[1:]]
    for cache in CACHE_WORDS:
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

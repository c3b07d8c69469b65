"""What the core was built for: each figure, what it should be, what a run measured, and where it fell short, why.

Nothing is asserted. The targets are for a CPU; a figure that a run does not hold is shown as not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import cases, libraries, nets, peers, swap
from bench.nets import REAL_NETS
from bench.peers import COPY, FOREACH, OURS, OURS_IN_PLACE
from bench.records import Cache, Run
from bench.table import size
from bench.update import APART, TOGETHER

NOT_MEASURED = "not measured"

_CASTS_IN_THE_CACHE = (
    "the temporaries of the best torch way stay in the cache, so it is near the memory bound; ours is at the speed "
    "of a copy, which leaves nothing to gain"
)
_TEMPORARIES = (
    "its temporaries come from the cache here, as the allocator is in the state that a step leaves it in; where they "
    "come as fresh pages, it takes up to three times as long"
)
#: Why a target was not reached, where that is known; by words of the figure. Shown only where it was not.
REASONS = {
    "update f32 <- bf16, 64 x 1 M": _CASTS_IN_THE_CACHE,
    "update f32 <- bf16, ViT-B/16": _CASTS_IN_THE_CACHE,
    "update f32 <- bf16, 64 M in one": (
        "the best that anybody could write in plain torch casts into memory that it keeps, so that no fresh pages are "
        "paid for, and is near the memory bound as well"
    ),
    "update 1,000 x 256, warm": (
        "a quarter of our time goes into seeing that 1,000 tensors and 1,500 dicts are still the same; and weights and "
        "objects, 3 MB together, push each other out of the second-level caches"
    ),
    "vs AveragedModel, ema avg fn": _TEMPORARIES,
    "vs diffusers EMAModel": _TEMPORARIES,
    "vs torch-ema": _TEMPORARIES,
}


@dataclass(frozen=True)
class Target:
    """A figure. `reached`: None without a goal, or without a measurement.

    Args:
        figure: what is compared with what.
        goal: in words; empty: shown for what it is.
        measured: in words.
        reason: why it was not reached.
    """

    figure: str
    goal: str
    measured: str
    reached: bool | None
    reason: str = ""


def targets(run: Run) -> list[Target]:
    """All of them, from the medians of one run."""
    found: list[Target] = []
    small = cases.small_tensors().name
    multi = [peers.MULTI_FN.name]
    found.append(_times(run, f"update {small}, warm, vs AveragedModel (multi fn)", 100, small, multi, "warm"))
    found.append(_times(run, f"update {small}, cold, vs AveragedModel (multi fn)", None, small, multi))
    for net in REAL_NETS:
        share = _ratio(run, net, [COPY.name])
        found.append(
            _target(
                f"update {net} vs torch._foreach_copy_ over the same lists",
                "<= 1.05 x its time",
                None if share is None else f"{1 / share[0]:.2f} x",
                None if share is None else round(1 / share[0], 2) <= 1.05,
            )
        )
        for goal, peer in (
            (1.05, FOREACH),
            (1.2, peers.MULTI_FN),
            (1.2, libraries.TIMM),
            (2, libraries.TORCH_EMA),
            (3, libraries.DIFFUSERS),
            (6, peers.AVG_FN),
        ):
            found.append(_times(run, f"update {net} vs {peer.name}", goal, net, [peer.name]))
    by_hand = [peer.name for peer in (*peers.CASTS, peers.COMPILED)]
    shipped = [peer.name for peer in (*peers.CASTS[:4], *libraries.LIBRARIES)]
    for case in (cases.mixed_one_tensor().name, cases.mixed_list().name, nets.vit_b_bf16().name):
        short = f"f32 <- bf16, {case.removesuffix(', f32 <- bf16')}"
        found.append(_times(run, f"update {short} vs the best torch way", 6, case, [*shipped, *by_hand]))
        found.append(_times(run, f"update {short} vs the best that ships or fits in a line", None, case, shipped))
    found.append(_several(run))
    found += _swaps(run)
    return found


def _several(run: Run) -> Target:
    together = run.median("several", nets.RESNET50, TOGETHER, shadows=4)
    apart = run.median("several", nets.RESNET50, APART, shadows=4)
    share = None if together is None or apart is None else together / apart
    return _target(
        "four averages in one update vs four updates",
        "<= 0.80 x their time",
        None if share is None else f"{share:.2f} x",
        None if share is None else round(share, 2) <= 0.8,
    )


def _swaps(run: Run) -> list[Target]:
    packages = [peer.name for peer in swap.PACKAGES]
    by_hand = [peer.name for peer in swap.BY_HAND[:2]]
    figures: tuple[tuple[Cache, str, list[str]], ...] = (
        ("warm", "package's store, copy, restore", packages),
        ("warm", "store, copy, restore by hand", by_hand),
        ("cold", "package's store, copy, restore", packages),
    )
    found = []
    for cache, words, names in figures:
        ratio = _ratio(run, nets.RESNET50, names, cache, bench="swap")
        has_goal = cache == "warm" and names is packages
        found.append(
            _target(
                f"swap {nets.RESNET50}, {cache}, vs the fastest {words}",
                ">= 1,000 x" if has_goal else "",
                None if ratio is None else f"{ratio[0]:,.0f} x ({ratio[1]})",
                None if ratio is None or not has_goal else ratio[0] >= 1000,
            )
        )
    for peer in (OURS, OURS_IN_PLACE):
        record = run.find("memory: validation", nets.RESNET50, peer.name)
        extra = None if record is None else record.extra_bytes
        goal = None if extra is None else extra == 0
        measured = None if extra is None else size(extra)
        found.append(_target(f"extra memory in a validation, {peer.name}", "0 B", measured, goal))
    return found


def _ratio(
    run: Run, case: str, others: Sequence[str], cache: Cache = "cold", bench: str = "update"
) -> tuple[float, str] | None:
    """How many times as long the fastest of the others takes, and who that is."""
    ours = run.median(bench, case, OURS.name, cache)
    medians = [(run.median(bench, case, name, cache), name) for name in others]
    measured = [(median, name) for median, name in medians if median is not None]
    if ours is None or not measured:
        return None
    median, name = min(measured)
    return median / ours, name if len(others) > 1 else ""


def _times(
    run: Run, figure: str, goal: float | None, case: str, others: Sequence[str], cache: Cache = "cold"
) -> Target:
    ratio = _ratio(run, case, others, cache)
    wanted = "" if goal is None else f">= {goal:g} x"
    if ratio is None:
        return _target(figure, wanted, None, None)
    factor, who = ratio
    digits = 0 if factor >= 100 else 1 if factor >= 10 else 2
    measured = f"{factor:.{digits}f} x" + (f" ({who})" if who else "")
    return _target(figure, wanted, measured, None if goal is None else round(factor, 2) >= goal)


def _target(figure: str, goal: str, measured: str | None, reached: bool | None) -> Target:
    reason = ""
    if reached is False:
        reason = next((why for words, why in REASONS.items() if words in figure), "")
    return Target(figure, goal, NOT_MEASURED if measured is None else measured, reached, reason)


TARGET_COLUMNS = ("figure", "target", "measured", "")


def target_rows(found: Sequence[Target]) -> list[list[str]]:
    """As a table shows them."""
    words = {True: "reached", False: "not reached", None: ""}
    return [
        [one.figure, one.goal, one.measured, ": ".join(part for part in (words[one.reached], one.reason) if part)]
        for one in found
    ]

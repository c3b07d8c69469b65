"""The tables of README and of bench/results, as Markdown made from records."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from bench.contenders import libraries, peers
from bench.contenders.peers import APART, OURS, OURS_IN_PLACE, STEP, TOGETHER
from bench.harness import cases
from bench.harness.console import duration, size
from bench.harness.contender import COPY, LIMIT, Peer
from bench.harness.growth import GROWTH_COLUMNS, growth, growth_rows
from bench.harness.records import Cache, Run
from bench.pages.losses import LOSS_COLUMNS, loss_rows, losses

_NET_COLUMNS = (cases.small_tensors().name, *cases.REAL_NETS)
_HAND_WRITTEN = (peers.CASTS[0], peers.CASTS[1], peers.CASTS[5])


def _environment(run: Run) -> str:
    found = run.environment
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    cores = f" on cores {', '.join(map(str, found['cores']))}" if found.get("cores") else ""
    more = f", {size(found['cache_bytes'])} cache" if found.get("cache_bytes") else ""
    more += f", load {found['load']:.1f} at the start" if found.get("load") is not None else ""
    return f"{found['device']}, {found['threads']} threads{cores}{more}, {found['date'][:10]}; {packages}."


#: The few peers of README's table and of the front page's plot: bare torch, and the most used libraries.
IN_SHORT = (OURS, peers.FOREACH, peers.MULTI_FN, libraries.TIMM, libraries.DIFFUSERS)
_MODULES = (peers.MULTI_FN, libraries.TIMM)


def _headline(run: Run) -> str:
    """Return the first table of README: four rows, few peers."""
    small, net = cases.small_tensors().name, cases.RESNET50
    swaps = [_cell(run, "swap", net, peer.name, "warm") for peer in IN_SHORT]
    swaps = ["a second model" if peer in _MODULES else cell for peer, cell in zip(IN_SHORT, swaps, strict=True)]
    rows = [
        ["update, 1,000 small tensors", *(_cell(run, "update", small, peer.name, "warm") for peer in IN_SHORT)],
        ["update, ResNet-50", *(_cell(run, "update", net, peer.name, "cold") for peer in IN_SHORT)],
        ["average into the model and out again", *swaps],
        ["memory of the average and its validation", *(_memory_in_all(run, peer.name) for peer in IN_SHORT)],
    ]
    rows = [[row[0], _bold(row[1]), *row[2:]] for row in rows if any(row[1:])]
    return _markdown(["", *(peer.name for peer in IN_SHORT)], rows)


def _memory_in_all(run: Run, impl: str) -> str:
    """Return the average's size and what a validation of it takes beside it."""
    found = run.find("memory: validation", cases.RESNET50, impl)
    return "" if found is None else size(cases.resnet50().shadow_bytes + (found.extra_bytes or 0))


def _cell(run: Run, bench: str, case: str, impl: str, cache: Cache) -> str:
    median = run.median(bench, case, impl, cache)
    if median is not None:
        return duration(median)
    raised = any(
        (one.bench, one.case, one.impl) == (bench, case, impl) and "Error: " in one.reason for one in run.missing
    )
    return "raises" if raised else ""


def _updates(run: Run) -> str:
    """Return medians of an update, one column a case."""
    entrants = (OURS, LIMIT, COPY, peers.FOREACH, *libraries.LIBRARIES)
    columns = [case for case in _NET_COLUMNS if run.median("update", case, OURS.name)]
    return _medians(run, entrants, columns)


def _mixed(run: Run) -> str:
    """Return the same for float32 averages of bfloat16 weights."""
    entrants = (OURS, LIMIT, COPY, *_HAND_WRITTEN, *libraries.LIBRARIES)
    bases = (cases.mixed_one_tensor().name, cases.mixed_list().name, cases.vit_b_bf16().name)
    large = [
        record.case
        for record in run.records
        if record.bench == "update" and record.impl == OURS.name and record.case.startswith("Llama")
    ]
    return _medians(run, entrants, [case for case in (*bases, *large) if run.median("update", case, OURS.name)])


def _large(run: Run) -> str:
    entrants = (OURS, LIMIT, COPY, peers.FOREACH, *libraries.LIBRARIES)
    columns = [
        record.case
        for record in run.records
        if record.bench == "update" and record.impl == OURS.name and record.params > 5 * 10**8
    ]
    return _medians(run, entrants, [case for case in columns if not case.startswith("Llama")])


def _medians(run: Run, entrants: Sequence[Peer], columns: Sequence[str]) -> str:
    rows = []
    for peer in entrants:
        medians = [run.median("update", case, peer.name, _cache_of(case)) for case in columns]
        if any(median is not None for median in medians):
            cells = ["" if median is None else duration(median) for median in medians]
            rows.append([peer.name, *(_bold(cell) if peer is OURS else cell for cell in cells)])
    return _markdown(["update, median", *columns], rows)


def _cache_of(case: str) -> Cache:
    return "warm" if case == cases.small_tensors().name else "cold"


def _replacements(run: Run) -> str:
    """Return times before and after one changed import."""
    columns = [case for case in (cases.RESNET50, cases.small_tensors().name) if run.median("update", case, OURS.name)]
    rows = []
    for before, after in libraries.REPLACEMENTS:
        cells = []
        for case in columns:
            old, new = (run.median("update", case, peer.name, _cache_of(case)) for peer in (before, after))
            cells.append("" if old is None or new is None else f"{duration(old)} → {_bold(duration(new))}")
        rows.append([f"{before.name} → {after.name}", *cells])
    return _markdown(["update, before → after", *columns], rows)


def _several(run: Run) -> str:
    counts = [count for count in (1, 2, 3, 4) if run.median("several", cases.RESNET50, TOGETHER, shadows=count)]
    rows = []
    for name in (TOGETHER, APART):
        medians = [run.median("several", cases.RESNET50, name, shadows=count) for count in counts]
        rows.append([name, *("" if median is None else duration(median) for median in medians)])
    return _markdown([f"{cases.RESNET50}, averages", *map(str, counts)], rows)


def _swaps(run: Run) -> str:
    """Return times of a swap, the bytes it moves and its memory beyond the model and one average, by model."""
    tables = []
    for case in (cases.RESNET50, cases.resnet50_bf16().name):
        rows = []
        for peer in (OURS, OURS_IN_PLACE, *libraries.SWAPPING, *peers.SWAPS_BY_HAND):
            warm, cold = (run.find("swap", case, peer.name, cache) for cache in _CACHES)
            if warm is None or cold is None or warm.median_us is None or cold.median_us is None:
                continue
            moved, extra = size(warm.bytes_floor or 0), size(warm.extra_bytes or 0)
            rows.append([peer.name, duration(warm.median_us), duration(cold.median_us), moved, extra])
        if rows:
            tables.append(_markdown([f"swap, {case}", "warm", "cold", "bytes moved", "extra memory"], rows))
    return "\n\n".join(tables)


_CACHES: tuple[Cache, Cache] = ("warm", "cold")


def _validation(run: Run) -> str:
    found = sorted((one for one in run.records if one.bench == "validation"), key=lambda one: one.median_us or 0.0)
    case = found[0].case if found else ""
    rows = [[one.impl, duration(one.median_us or 0.0)] for one in found]
    return _markdown([f"base and averaged weights validated, {case}", "median"], rows)


def _memory(run: Run) -> str:
    rows = []
    for record in run.records:
        if record.bench == "memory: update" and record.case == cases.RESNET50:
            validation = run.find("memory: validation", record.case, record.impl)
            inside = size(record.extra_bytes or 0)
            rows.append([record.impl, inside, "" if validation is None else size(validation.extra_bytes or 0)])
    return _markdown([f"{cases.RESNET50}: memory beyond the model and one average", "update", "validation"], rows)


def _growth(run: Run) -> str:
    return _markdown(GROWTH_COLUMNS, growth_rows(growth(run.records)))


def _train_steps(run: Run) -> str:
    """Return shares of a training step."""
    columns = list(dict.fromkeys(record.case for record in run.records if record.bench == "train_step"))
    names = dict.fromkeys(record.impl for record in run.records if record.bench == "train_step")
    rows = []
    for bench, words in (("train_step", "update"), ("train_step: swap", "swap in and out")):
        for name in names:
            cells = []
            for case in columns:
                step, median = run.median("train_step", case, STEP), run.median(bench, case, name)
                share = "" if step is None or median is None else f"{median / (step + median):.2%}"
                cells.append(duration(step) if step and name == STEP else share)
            if any(cells) and not (name == STEP and bench != "train_step"):
                rows.append([name if name == STEP else f"{name}: {words}", *cells])
    return _markdown(["share of a step", *columns], rows)


def _busy(run: Run) -> str:
    """Return means beside busy processes, medians in brackets."""
    found = [record for record in run.records if record.bench.startswith("busy") and record.mean_us is not None]
    columns = list(dict.fromkeys((record.case, record.bench) for record in found))
    cells = {
        (record.impl, (record.case, record.bench)): f"{duration(record.mean_us or 0.0)} ({duration(record.time)})"
        for record in found
    }
    rows = []
    for name in dict.fromkeys(record.impl for record in found):
        values = [cells.get((name, column), "") for column in columns]
        rows.append([name, *(_bold(value) if name == OURS.name else value for value in values)])
    heads = [f"{case}, {bench.removeprefix('busy: ')} busy" for case, bench in columns]
    return _markdown(["update, mean (median)", *heads], rows)


def _instructions(run: Run) -> str:
    rows = [[one.impl, one.case, f"{one.instructions:,}"] for one in run.instructions]
    return _markdown(["host, one thread, AVX2", "", "instructions"], rows)


def _losses(run: Run) -> str:
    return _markdown(LOSS_COLUMNS, loss_rows(losses(run)), right=False)


def _missing(run: Run) -> str:
    """Return what could not be measured, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in run.missing:
        reasons.setdefault((one.impl or one.case or one.bench, one.reason), []).append(one.case)
    return "\n".join(
        f"- {name} ({', '.join(dict.fromkeys(filter(None, where)))}): {reason}"
        for (name, reason), where in reasons.items()
    )


TABLES: dict[str, Callable[[Run], str]] = {
    "headline": _headline,
    "environment": _environment,
    "update": _updates,
    "mixed": _mixed,
    "large": _large,
    "replacements": _replacements,
    "several": _several,
    "swap": _swaps,
    "validation": _validation,
    "memory": _memory,
    "growth": _growth,
    "train_step": _train_steps,
    "busy": _busy,
    "instructions": _instructions,
    "losses": _losses,
    "missing": _missing,
}


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], right: bool = True) -> str:
    """Return a Markdown table; `right`: all columns but the first are numbers."""
    head = ["| " + " | ".join(columns) + " |", "|---" + ("|---:" if right else "|---") * (len(columns) - 1) + "|"]
    return _plain_underscores("\n".join(head + ["| " + " | ".join(row) + " |" for row in rows]))


def _plain_underscores(text: str) -> str:
    """Escape the underscores at the ends of words: `_foreach_copy_` would be set in italics."""
    return re.sub(r"(?<!\w)_(?=\w)|(?<=\w)_(?!\w)", r"\_", text)


def _bold(cell: str) -> str:
    return f"**{cell}**" if cell else ""


# ---- pages ----

_MARKED = re.compile(r"(<!-- bench:begin (?P<name>\S+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)


def filled(page: str, run: Run) -> str:
    """Return the page with every marked table regenerated.

    Raises:
        ValueError: a marker names no table, or has no end.
    """
    opened = page.count("<!-- bench:begin")
    if opened != len(_MARKED.findall(page)):
        raise ValueError("a <!-- bench:begin NAME --> stands without its <!-- bench:end -->")

    def regenerate(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"<!-- bench:begin {name} -->: there is no such table, only {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name](run)}\n{match[3]}"

    return _MARKED.sub(regenerate, page)

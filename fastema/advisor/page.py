"""The advice as a page in the terminal, as plain values, and as a picture, for which matplotlib is imported."""

from __future__ import annotations

import math
import shlex
import shutil
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastema.advisor.clock import Clock
from fastema.advisor.diagnosis import Finding
from fastema.advisor.patterns import StartAdvice
from fastema.advisor.recommendation import Recommendation
from fastema.advisor.verdict import Verdict

_WIDTH = 100
_OTHERS = 6  # other metrics that the page names


@dataclass(frozen=True)
class Window:
    """The window of an average: in updates, and in epochs where their length is known.

    Attributes:
        decay, decay_type: the schedule.
        updates, lag_epochs: how far it looks back, at the last epoch of the history or at most.
        settle_epochs: until which the starting weights are forgotten.
        epoch: the last one of the history; None: without a history.
    """

    decay: float
    decay_type: str
    updates: float
    lag_epochs: float | None = None
    settle_epochs: float | None = None
    epoch: float | None = None


@dataclass
class Advice:
    """All that is known and advised; what is not asked for is None or empty."""

    updates_per_epoch: float | None
    recommendation: Recommendation | None = None
    window: Window | None = None
    verdict: Verdict | None = None
    source: str | None = None
    metric: str | None = None
    ema_metric: str | None = None
    length: str = ""
    mode: str = "max"
    clock: Clock | None = None
    base: list[float] = field(default_factory=list)
    ema: list[float | None] = field(default_factory=list)
    start: StartAdvice | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def plain(advice: Advice) -> dict[str, Any]:
    """Return plain values, for JSON."""
    values = {name: value for name, value in asdict(advice).items() if name != "clock"}
    clock = advice.clock
    return values | {"clock": None if clock is None else {"unit": clock.unit, "labels": list(clock.labels)}}


def print_page(advice: Advice) -> None:
    """Print the page."""
    width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
    for heading, text in _page(advice):
        print(textwrap.fill(text, width, initial_indent=f"{heading:10}", subsequent_indent=" " * 10))


def _page(advice: Advice) -> list[tuple[str, str]]:
    """Return headings and their texts: one verdict, and what it rests on."""
    rows: list[tuple[str, str]] = []
    if advice.source is not None:
        average = f"; its average: {advice.ema_metric}" if advice.ema else ""
        better = "more" if advice.mode == "max" else "less"
        rows.append(("History", f"{advice.source}: {advice.metric}, {advice.length}, {better} is better{average}"))
    if advice.verdict is not None:
        first, *more = advice.verdict.why
        rows += [("Use it?", advice.verdict.use), ("Why", first), *(("", text) for text in more)]
        rows.append(("Next", advice.verdict.next_step))
        rows += [("", f"{finding.text} {finding.next_step}") for finding in advice.findings[1:]]
    if advice.recommendation is not None:
        rows += _recommended(advice.recommendation, alone=advice.verdict is None)
    if advice.window is not None:
        rows.append(("Reach", _reach(advice.window)))
    rows += [("Note" if i == 0 else "", note) for i, note in enumerate(advice.notes)]
    if advice.others:
        rows.append(("Others", ", ".join(f"--metric {shlex.quote(name)}" for name in advice.others[:_OTHERS])))
    return rows


def plot(advice: Advice, path: Path) -> None:
    """Draw base and average, the window as a band, and the verdict."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    clock = Clock.counting(len(advice.base)) if advice.clock is None else advice.clock
    axes.plot(clock.labels, advice.base, color="tab:gray", marker=".", label=advice.metric)
    if advice.ema:
        values = [math.nan if value is None else value for value in advice.ema]
        axes.plot(clock.labels, values, color="tab:blue", marker=".", label=advice.ema_metric)
    if advice.window is not None and advice.window.lag_epochs is not None:
        last = clock.labels[-1]
        label = f"window of decay {advice.window.decay:g}: {advice.window.lag_epochs:.3g} epochs"
        axes.axvspan(last - advice.window.lag_epochs, last, color="tab:blue", alpha=0.12, label=label)
    if advice.verdict is not None:
        evidence = {} if advice.start is None else advice.start.evidence
        at = int(evidence.get("epoch", evidence.get("best", len(advice.base)))) - 1
        axes.annotate(
            advice.verdict.kind,
            (clock.labels[at], advice.base[at]),
            xytext=(-10, 18),
            textcoords="offset points",
            ha="right",
            arrowprops={"arrowstyle": "-", "color": "tab:red"},
            color="tab:red",
        )
        axes.set_title(advice.verdict.use)
    axes.set_xlabel(clock.unit)
    axes.set_ylabel(advice.metric or "")
    axes.margins(y=0.2)
    axes.legend(loc="best")
    figure.savefig(path, dpi=120)


def _recommended(advice: Recommendation, alone: bool) -> list[tuple[str, str]]:
    """Return headings and their texts; beside a verdict on a history without an answer of its own."""
    outlook = advice.outlook
    epoch = max(1, math.ceil(advice.wait_epochs))
    lag = outlook.mean_age * advice.lag / advice.window
    age = f"{outlook.mean_age:,.0f} updates ({lag:.3g} epochs, {outlook.share_of_run:.1%} of the run)"
    if math.isinf(outlook.ratio):
        rate = "the learning rate falls to 0 from there"
    elif outlook.ratio == 1:
        rate = "the learning rate is the same there as at the end"
    else:
        rate = f"the learning rate is {outlook.ratio:.3g} times as high there as at the end"
    rows = [
        ("Settings", f'decay {advice.decay:.6g}, decay_type "{advice.decay_type}", from the first step'),
        ("Look", f"from epoch {epoch} on, at the model and at the average; keep the better one"),
        ("Expect", outlook.text),
        ("Why" if alone else "", f"At the end the average's weights are {age} old on average; {rate}."),
        *(("", reason) for reason in advice.reasons),
    ]
    return [("Use it?", outlook.use), *rows] if alone else rows


def _reach(window: Window) -> str:
    text = f"Decay {window.decay:g} ({window.decay_type}) looks back over {window.updates:,.0f} updates"
    if window.lag_epochs is None or window.settle_epochs is None:
        return text
    text += f", {window.lag_epochs:.3g} epochs"
    if window.epoch is not None:
        then = max(0.0, window.epoch - window.lag_epochs)
        text += f": at epoch {window.epoch:g} it reflects epoch {then:.4g}"
    if math.isinf(window.settle_epochs):
        return f"{text}; it never forgets its starting weights"
    settled = "less than an epoch" if window.settle_epochs < 1 else f"{window.settle_epochs:.3g} epochs"
    return f"{text}; at most 5 % of it are starting weights after {settled}"

"""The advice as a page in the terminal, as plain values, and as a picture. rich and matplotlib are imported on use."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastema.advisor.diagnosis import Finding
from fastema.advisor.patterns import StartAdvice
from fastema.advisor.recommendation import Recommendation

_GREEN, _YELLOW, _RED = "green", "yellow", "red"
_COLOURS = {
    "start": _GREEN,
    "wait": _YELLOW,
    "fix first": _RED,
    "fine": _GREEN,
    "marginal": _YELLOW,
    "too early": _YELLOW,
    "lags": _YELLOW,
    "unexplained": _RED,
    "unstable": _RED,
}

_OTHERS = 6  # other metrics that the page names


@dataclass(frozen=True)
class Window:
    """The window of an average: in updates, and in epochs where their length is known."""

    decay: float
    decay_type: str
    updates: float
    lag_epochs: float | None = None
    settle_epochs: float | None = None


@dataclass
class Advice:
    """All that is known and advised; what is not asked for is None or empty."""

    updates_per_epoch: float | None
    recommendation: Recommendation | None = None
    window: Window | None = None
    source: str | None = None
    metric: str | None = None
    length: str = ""
    mode: str = "max"
    base: list[float] = field(default_factory=list)
    ema: list[float | None] = field(default_factory=list)
    start: StartAdvice | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def plain(advice: Advice) -> dict[str, Any]:
    """Return plain values, for JSON."""
    return asdict(advice)


def print_page(advice: Advice) -> None:
    """Print the page."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=not console.is_terminal)

    if advice.recommendation is not None:
        table = Table.grid(padding=(0, 2))
        for heading, text in _recommended(advice.recommendation):
            table.add_row(Text(heading, style="bold"), Text(text))
        console.print(table)
    if advice.window is not None:
        say(_reach(advice.window))
    if advice.source is not None:
        better = "more" if advice.mode == "max" else "less"
        say(f"{advice.source}: {advice.metric}, {advice.length}, {better} is better")
    # With an average in the history, whether to start one is settled.
    if advice.start is not None and not advice.ema:
        say(f"{advice.start.action.capitalize()}: {advice.start.pattern}", f"bold {_COLOURS[advice.start.action]}")
        say(f"  {advice.start.reason[0].upper()}{advice.start.reason[1:]}.")
        say(f"  {advice.start.next_step}")
    for finding in advice.findings:
        say(finding.kind.capitalize(), f"bold {_COLOURS[finding.kind]}")
        say(f"  {finding.text}")
        say(f"  {finding.next_step}")
    for note in advice.notes:
        say(note)
    if advice.others:
        say(f"Also in it: {', '.join(f'--metric {name!r}' for name in advice.others[:_OTHERS])}")


def plot(advice: Advice, path: Path) -> None:
    """Draw base and average, the window as a band, and the findings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    epochs = list(range(1, len(advice.base) + 1))
    axes.plot(epochs, advice.base, color="tab:gray", marker=".", label=advice.metric)
    if advice.ema:
        values = [math.nan if value is None else value for value in advice.ema]
        axes.plot(epochs, values, color="tab:blue", marker=".", label="average")
    if advice.window is not None and advice.window.lag_epochs is not None:
        last = len(advice.base)
        first = max(0.0, last - advice.window.lag_epochs)
        label = f"window of decay {advice.window.decay:g}: {advice.window.lag_epochs:.3g} epochs"
        axes.axvspan(first, last, color="tab:blue", alpha=0.12, label=label)
    marks: list[tuple[float, str]] = []
    if advice.start is not None and not advice.ema:
        at = advice.start.evidence.get("epoch", len(advice.base))
        marks.append((at, f"{advice.start.pattern}: {advice.start.action}"))
    for finding in advice.findings:
        marks.append((finding.evidence.get("epoch", len(advice.base)), finding.kind))
    for i, (at, text) in enumerate(marks):
        height = advice.base[int(at) - 1]
        axes.annotate(
            text,
            (at, height),
            xytext=(-10, 18 + 16 * i),
            textcoords="offset points",
            ha="right",
            arrowprops={"arrowstyle": "-", "color": "tab:red"},
            color="tab:red",
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(advice.metric or "")
    axes.margins(y=0.2)
    axes.legend(loc="best")
    figure.savefig(path, dpi=120)


def _recommended(advice: Recommendation) -> list[tuple[str, str]]:
    """Return headings and their texts."""
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
    return [
        ("Use it?", outlook.use),
        ("Settings", f'decay {advice.decay:.6g}, decay_type "{advice.decay_type}", from the first step'),
        ("Look", f"from epoch {epoch} on, at the model and at the average; keep the better one"),
        ("Expect", outlook.text),
        ("Why", f"At the end the average's weights are {age} old on average; {rate}."),
        *(("", reason) for reason in advice.reasons),
    ]


def _reach(window: Window) -> str:
    text = f"Decay {window.decay:g} ({window.decay_type}) looks back over {window.updates:,.0f} updates"
    if window.lag_epochs is not None and window.settle_epochs is not None:
        text += f", {window.lag_epochs:.3g} epochs; at most 5 % of it are starting weights after "
        if math.isinf(window.settle_epochs):
            text += "no number of epochs"
        else:
            text += "less than an epoch" if window.settle_epochs < 1 else f"{window.settle_epochs:.3g} epochs"
    return text

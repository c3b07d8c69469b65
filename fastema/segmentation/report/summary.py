"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from fastema.segmentation.report.comparison import Comparison
from fastema.segmentation.report.history import EpochRecord
from fastema.segmentation.report.timers import Costs
from fastema.segmentation.train.averages import average_ious


def print_report(
    console: Console,
    history: Sequence[EpochRecord],
    comparison: Comparison | None,
    costs: Costs,
    files: Sequence[Path],
    averages: Sequence[str] = ("EMA",),
) -> None:
    """Prints base and EMA side by side, what the EMA cost, and which files there are now.

    Args:
        console: where to.
        history: the run, epoch by epoch; not empty.
        comparison: base against EMA after the last epoch; None without an EMA.
        costs: what was measured in this process.
        files: what the run wrote.
        averages: their names, the main one first.
    """
    table = Table(title=f"Validation IoU, {len(history)} epochs", title_justify="left")
    for heading in ("weights", "best", "in epoch", "last"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    best = max(history, key=lambda record: record.iou)
    table.add_row("base", f"{best.iou:.4f}", str(best.epoch), f"{history[-1].iou:.4f}")
    for i, name in enumerate(averages):
        scores = [(average_ious(record)[i], record.epoch) for record in history if len(average_ious(record)) > i]
        if scores:
            best_iou, best_epoch = max(scores, key=lambda pair: pair[0])
            label = f"EMA {name}" if len(averages) > 1 else "EMA"
            table.add_row(label, f"{best_iou:.4f}", str(best_epoch), f"{scores[-1][0]:.4f}")
    console.print(table)
    if comparison is not None:
        main = f"base or EMA {averages[0]}? " if len(averages) > 1 else ""
        _say(console, f"Better: {main}{comparison.verdict()}")
        _say(console, f"Run:    {_over_the_run(history)}")
        _say(console, f"Cost:   {costs.sentence()}")
    wait = fmean(record.data_wait for record in history)
    _say(console, f"Data:   {wait:.1%} of the training time went by waiting for images")
    _say(console, f"Files:  {', '.join(file.name for file in files)} in {files[0].parent}")


def _over_the_run(history: Sequence[EpochRecord]) -> str:
    """In how many epochs the EMA was ahead, and by how much: the last epoch is only one of them."""
    leads = [(record.ema_iou - record.iou, record.epoch) for record in history if record.ema_iou is not None]
    parts = [f"the EMA was ahead in {sum(lead > 0 for lead, _ in leads)} of {len(leads)} epochs"]
    most, least = max(leads), min(leads)
    if most[0] > 0:
        parts.append(f"at most by {most[0]:.4f} (epoch {most[1]})")
    if least[0] < 0:
        parts.append(f"behind at most by {-least[0]:.4f} (epoch {least[1]})")
    return ", ".join(parts)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)

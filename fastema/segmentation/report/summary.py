"""The summary at the end of a run: a table, base against EMA, what the EMA cost, and the files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table

from fastema.segmentation.console import say
from fastema.segmentation.report.history import EpochRecord
from fastema.segmentation.report.timers import Timers


@dataclass(frozen=True)
class Comparison:
    """Trained against averaged weights on the same validation images.

    Attributes:
        base: IoU per image with the trained weights.
        ema: IoU per image with the averaged weights.
        updates: of the EMA so far.
        window: updates that the EMA looks back over now.
        updates_per_epoch: in this stage.
        final_rate: the last learning rate, as a share of the highest.
    """

    base: Sequence[float]
    ema: Sequence[float]
    updates: int
    window: float
    updates_per_epoch: float
    final_rate: float

    @property
    def difference(self) -> float:
        """Mean IoU of the EMA minus that of the base."""
        return fmean(self.ema) - fmean(self.base)

    @property
    def uncertainty(self) -> float:
        """The standard error of the difference."""
        error = paired_error(self.base, self.ema)
        return math.inf if error is None else error

    def verdict(self) -> str:
        """Say which is better after the last epoch, with a likely reason if the EMA is not."""
        # The error is over images only: order, augmentation and batch statistics differ with another seed.
        images = f"last epoch, {len(self.base)} validation images; another seed may differ by more"
        if self.difference == 0:
            return f"neither, base and EMA are equal ({images}). {self._reason()}"
        leader = "the EMA" if self.difference > 0 else "the base"
        by = f"by {abs(self.difference):.4f} IoU"
        if math.isfinite(self.uncertainty):
            by += f" ± {self.uncertainty:.4f}"
        if abs(self.difference) < 2 * self.uncertainty:
            sentence = f"neither clearly; {leader} was ahead {by}, which is within the noise ({images})."
        else:
            sentence = f"{leader} {by} ({images})."
        return sentence if self.difference > 0 else f"{sentence} {self._reason()}"

    def _reason(self) -> str:
        epochs = f"{self.window / max(1.0, self.updates_per_epoch):.1f} epochs"
        if self.window > self.updates / 4:
            return (
                f"Likely reason: the EMA looks back over {self.window:,.0f} updates ({epochs}) and there were only "
                f"{self.updates:,}, so early, worse weights still count. Try a smaller --ema-decay, "
                "--ema-decay-type threshold, or more epochs."
            )
        if self.final_rate < 0.05:
            return (
                "Likely reason: the learning rate was almost 0 at the end, so the last weights hardly differ and "
                "averaging has nothing left to smooth; an EMA helps most while the rate is high."
            )
        return (
            f"The EMA looks back over {self.window:,.0f} updates ({epochs}); if the base is still improving fast, "
            "that lag is the likely reason."
        )


def paired_error(base: Sequence[float], ema: Sequence[float]) -> float | None:
    """Return the standard error of the mean difference over the same images; None for a single image."""
    if len(base) < 2:
        return None
    return stdev(e - b for e, b in zip(ema, base, strict=True)) / math.sqrt(len(base))


def print_summary(
    console: Console,
    history: Sequence[EpochRecord],
    comparison: Comparison | None,
    timers: Timers,
    files: Sequence[Path],
    averages: Sequence[str] = ("EMA",),
) -> None:
    """Print base and EMA side by side, what the EMA cost, and the files.

    Args:
        console: to print to.
        history: of the run, not empty.
        comparison: after the last epoch; None without an EMA.
        timers: of this process.
        files: that the run wrote.
        averages: their names, the main one first.
    """
    several = len(averages) > 1
    table = Table(title=f"Validation IoU, {len(history)} epochs", title_justify="left")
    for heading in ("weights", "best", "in epoch", "last"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    scores = {"base": [(record.iou, record.epoch) for record in history]}
    for i, name in enumerate(averages):
        each = [(record.average_ious[i], record.epoch) for record in history if len(record.average_ious) > i]
        scores[f"EMA {name}" if several else "EMA"] = each
    for label, each in scores.items():
        if each:
            best, epoch = max(each, key=lambda pair: pair[0])
            table.add_row(label, f"{best:.4f}", str(epoch), f"{each[-1][0]:.4f}")
    console.print(table)
    if comparison is not None:
        say(console, f"Better: {f'base or EMA {averages[0]}? ' if several else ''}{comparison.verdict()}")
        say(console, f"Run:    {_over_the_run(history)}")
        say(console, f"Cost:   {timers.sentence()}")
    wait = fmean(record.data_wait for record in history)
    say(console, f"Data:   {wait:.1%} of the training time went by waiting for images")
    say(console, f"Files:  {', '.join(file.name for file in files)} in {files[0].parent}")


def _over_the_run(history: Sequence[EpochRecord]) -> str:
    leads = [(record.ema_iou - record.iou, record.epoch) for record in history if record.ema_iou is not None]
    parts = [f"the EMA was ahead in {sum(lead > 0 for lead, _ in leads)} of {len(leads)} epochs"]
    most, least = max(leads), min(leads)
    if most[0] > 0:
        parts.append(f"at most by {most[0]:.4f} (epoch {most[1]})")
    if least[0] < 0:
        parts.append(f"behind at most by {-least[0]:.4f} (epoch {least[1]})")
    return ", ".join(parts)

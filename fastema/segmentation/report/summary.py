"""The summary at the end of a run: a table, base against EMA, what the EMA cost, and the files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Column, Table

from fastema.core.checks import counted
from fastema.segmentation.console import say
from fastema.segmentation.eval.scores import paired_error
from fastema.segmentation.report.history import EpochRecord
from fastema.segmentation.report.timers import Timers

#: With fewer validation images, which weights are better is chance.
FEW_IMAGES = 10


@dataclass(frozen=True)
class Comparison:
    """Trained against averaged weights on the same validation images."""

    base: Sequence[float]  # IoU per image
    ema: Sequence[float]
    updates: int  # of the EMA so far
    window: float  # updates that the EMA looks back over now
    updates_per_epoch: float  # in this stage
    final_rate: float  # the last learning rate, as a share of the highest
    decay_type: str = ""  # of the EMA

    def verdict(self) -> str:
        """Say which is better after the last epoch, with a likely reason if the EMA is not."""
        sentence = self._verdict()
        if len(self.base) < FEW_IMAGES:
            images = counted(len(self.base), "validation image")
            sentence += f" But {images} cannot tell: give a larger --val-fraction, or evaluate on other images."
        return sentence

    def _verdict(self) -> str:
        lead = fmean(self.ema) - fmean(self.base)
        error = paired_error(self.base, self.ema)
        # The error is over images only: order, augmentation and batch statistics differ with another seed.
        images = f"last epoch, {counted(len(self.base), 'validation image')}; another seed may differ by more"
        if lead == 0:
            return f"neither, base and EMA are equal ({images}). {self._reason()}"
        leader = "the EMA" if lead > 0 else "the base"
        by = f"by {abs(lead):.4f} IoU" + ("" if math.isnan(error) else f" ± {error:.4f}")
        if abs(lead) >= 2 * error:
            sentence = f"{leader} {by} ({images})."
        else:
            sentence = f"neither clearly; {leader} was ahead {by}, which is within the noise ({images})."
        return sentence if lead > 0 else f"{sentence} {self._reason()}"

    def _reason(self) -> str:
        epochs = f"{self.window / max(1.0, self.updates_per_epoch):.1f} epochs"
        if self.window > self.updates / 4:
            return (
                f"Likely reason: the EMA looks back over {self.window:,.0f} updates ({epochs}) and there were only "
                f"{self.updates:,}, so early, worse weights still count. Try a smaller --ema-decay, "
                f"{'' if self.decay_type == 'threshold' else '--ema-decay-type threshold, '}or more epochs."
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


def print_summary(
    console: Console,
    history: Sequence[EpochRecord],
    comparison: Comparison | None,
    timers: Timers,
    files: Sequence[Path],
    averages: Sequence[str] = ("EMA",),
) -> None:
    """Print base and EMA side by side, what the EMA cost, and the files; `averages` are names, the main one first."""
    several = len(averages) > 1
    columns = (Column(heading, justify="right") for heading in ("best", "in epoch", "last"))
    table = Table("weights", *columns, title=f"Validation IoU, {counted(len(history), 'epoch')}", title_justify="left")
    for i, name in enumerate(["base", *(f"EMA {name}" if several else "EMA" for name in averages)]):
        ious = [(record.epoch, [record.iou, *record.average_ious]) for record in history]
        each = [(epoch, iou[i]) for epoch, iou in ious if len(iou) > i]
        if each:
            epoch, best = max(each, key=lambda pair: pair[1])
            table.add_row(name, f"{best:.4f}", str(epoch), f"{each[-1][1]:.4f}")
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
    parts = [f"the EMA was ahead in {sum(lead > 0 for lead, _ in leads)} of {counted(len(leads), 'epoch')}"]
    most, least = max(leads), min(leads)
    if most[0] > 0:
        parts.append(f"at most by {most[0]:.4f} (epoch {most[1]})")
    if least[0] < 0:
        parts.append(f"behind at most by {-least[0]:.4f} (epoch {least[1]})")
    return ", ".join(parts)

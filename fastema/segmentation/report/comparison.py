"""Base against EMA, honestly: which was better, whether the difference means anything, and why if it was worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Comparison:
    """The same validation images, predicted by the trained and by the averaged weights.

    Attributes:
        base: IoU per image with the trained weights.
        ema: IoU per image with the averaged weights.
        updates: how many updates the EMA has had.
        window: how many updates it looks back over now, 1 / (1 - decay).
        updates_per_epoch: how many updates an epoch has.
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
        """The standard error of the difference; paired, since both predict the same images."""
        if len(self.base) < 2:
            return math.inf
        return stdev(e - b for e, b in zip(self.ema, self.base, strict=True)) / math.sqrt(len(self.base))

    def verdict(self) -> str:
        """Which was better after the last epoch, in a sentence; with a likely reason if the EMA was not."""
        # The error is over images only: order, augmentation and batch statistics would differ with another seed.
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

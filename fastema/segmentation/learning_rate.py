"""The learning rate as a function of the optimizer step: nothing to save, nothing to restore on resume."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up to `highest`, then half a cosine down to `lowest`, which the last step has.

    Attributes:
        highest: the rate at the end of the warm-up.
        lowest: the rate of the last step.
        warmup_steps: optimizer steps until `highest`.
        total_steps: optimizer steps of the whole run.
    """

    highest: float
    lowest: float
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """The rate of optimizer step `step`, from 1."""
        if step <= self.warmup_steps:
            return self.highest * step / self.warmup_steps
        span = max(1, self.total_steps - self.warmup_steps - 1)
        progress = min(1.0, (step - self.warmup_steps - 1) / span)
        return self.lowest + (self.highest - self.lowest) * (1 + math.cos(math.pi * progress)) / 2

"""The learning rate as a function of the optimizer step, so that there is nothing to save and restore.

Each stage has its own schedule over its own steps. A parameter group trains at a fixed share of it, floor included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# SGDR: a stage has this many cycles, each this many times as long as the one before.
CYCLES, CYCLE_GROWTH = 3, 2
# Smith's one-cycle policy, with the numbers of torch's OneCycleLR.
ONECYCLE_RISE = 0.3
ONECYCLE_START = 25.0
# Warm-up, stable, decay (Hu et al. 2024): the decay takes this share of the stage.
WSD_DECAY = 0.2


@dataclass(frozen=True)
class LRSchedule:
    """A linear warm-up to `highest`, then one of:

    - cosine: half a cosine down to `lowest` (Loshchilov and Hutter, 2017, without restarts).
    - cosine_restart: SGDR, the same paper's warm restarts.
    - onecycle: Smith, 2018: up for 30 % of the steps, then down to `lowest`.
    - wsd: `highest`, and in the last fifth of the steps a straight line down to `lowest`.
    - none: `highest` throughout.

    Attributes:
        kind: one of the five.
        highest: peak.
        lowest: floor; "none" ignores it.
        warmup_steps: optimizer steps until `highest`.
        total_steps: optimizer steps of the stage.
    """

    kind: str
    highest: float
    lowest: float
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """Return the rate of the stage's optimizer step `step`, from 1."""
        if step <= self.warmup_steps:
            return self.highest * step / self.warmup_steps
        done = step - self.warmup_steps - 1
        steps = max(1, self.total_steps - self.warmup_steps)
        if self.kind == "none":
            return self.highest
        if self.kind == "cosine":
            return _cosine(self.highest, self.lowest, done / max(1, steps - 1))
        if self.kind == "cosine_restart":
            return _cosine(self.highest, self.lowest, _share_of_cycle(done, first_cycle(steps)))
        if self.kind == "wsd":
            decay_steps = max(1, round(WSD_DECAY * self.total_steps))
            left = max(0, self.total_steps - step)
            return self.lowest + (self.highest - self.lowest) * min(1.0, left / decay_steps)
        if self.kind == "onecycle":
            return self._onecycle(done, steps)
        raise ValueError(f"unknown schedule {self.kind!r}")

    def _onecycle(self, done: int, steps: int) -> float:
        start = max(self.highest / ONECYCLE_START, self.lowest)
        top = ONECYCLE_RISE * steps - 1
        if done <= top:
            return _cosine(start, self.highest, done / max(top, 1.0))
        top = max(top, 0.0)
        return _cosine(self.highest, self.lowest, (done - top) / max(steps - 1 - top, 1.0))


def first_cycle(steps: int) -> int:
    """Return the length of the first cycle, with which the last one ends at the end of the stage."""
    return max(1, math.ceil(steps / sum(CYCLE_GROWTH**cycle for cycle in range(CYCLES))))


def _share_of_cycle(done: int, length: int) -> float:
    while done >= length:
        done -= length
        length *= CYCLE_GROWTH
    return done / length


def _cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

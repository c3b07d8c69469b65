"""Two stages: first the decoder alone with a frozen backbone, then everything with the backbone at a tenth of the rate.

Stage, open levels and learning rate follow from epoch, step and options alone, so nothing is saved and a run may be
resumed at any epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from fastema.segmentation.options import TrainOptions

BACKBONE_SHARE = 0.1  # of the learning rate, floor included
# With --progressive-unfreeze, the levels open over this share of the stage.
_OPEN_BY = 0.5
# SGDR: a stage has this many cycles, each this many times as long as the one before.
CYCLES, CYCLE_GROWTH = 3, 2
# Smith's one-cycle policy, with the numbers of torch's OneCycleLR.
ONECYCLE_RISE, ONECYCLE_START = 0.3, 25.0
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

    The steps are the stage's own.
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
            length = first_cycle(steps)
            while done >= length:
                done -= length
                length *= CYCLE_GROWTH
            return _cosine(self.highest, self.lowest, done / length)
        if self.kind == "wsd":
            left = max(0, self.total_steps - step) / max(1, round(WSD_DECAY * self.total_steps))
            return self.lowest + (self.highest - self.lowest) * min(1.0, left)
        if self.kind == "onecycle":
            top = ONECYCLE_RISE * steps - 1
            if done <= top:
                start = max(self.highest / ONECYCLE_START, self.lowest)
                return _cosine(start, self.highest, done / max(top, 1.0))
            top = max(top, 0.0)
            return _cosine(self.highest, self.lowest, (done - top) / max(steps - 1 - top, 1.0))
        raise ValueError(f"unknown schedule {self.kind!r}")


def first_cycle(steps: int) -> int:
    """Return the length of the first cycle, with which the last one ends at the end of the stage."""
    return max(1, math.ceil(steps / sum(CYCLE_GROWTH**cycle for cycle in range(CYCLES))))


def _cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


@dataclass(frozen=True)
class Stage:
    """Epochs with one batch size and one schedule."""

    number: int  # 1 or 2
    first_epoch: int  # from 1 over the whole run
    epochs: int
    batch_size: int  # images
    group_size: int  # images of an optimizer step
    steps_per_epoch: int  # optimizer steps, the short last one included
    schedule: LRSchedule

    def step_before(self, epoch: int) -> int:
        """Return how many of the stage's steps are done when `epoch` begins."""
        return (epoch - self.first_epoch) * self.steps_per_epoch


@dataclass(frozen=True)
class Stages:
    """The stages of a run in order, without empty ones."""

    stages: tuple[Stage, ...]

    def at(self, epoch: int) -> Stage:
        """Return the stage of an epoch, from 1; beyond the end, the last one."""
        return [stage for stage in self.stages if stage.first_epoch <= epoch][-1]

    def steps_before(self, epoch: int) -> int:
        """Return the optimizer steps of the run before `epoch` begins."""
        return sum(min(max(0, epoch - one.first_epoch), one.epochs) * one.steps_per_epoch for one in self.stages)

    @property
    def total_steps(self) -> int:
        return sum(stage.epochs * stage.steps_per_epoch for stage in self.stages)


def plan_stages(options: TrainOptions, images: int) -> Stages:
    """Return the stages of a run on `images` training images."""
    first = options.first_stage_epochs
    stages: list[Stage] = []
    for number, first_epoch, epochs, batch_size, rate in (
        (1, 1, first, options.batch_size, options.lr),
        (2, first + 1, options.epochs - first, options.second_batch_size, options.second_lr),
    ):
        if epochs:
            group_size = batch_size * options.accumulation_steps
            steps = math.ceil(images / group_size)
            warmup = 0 if stages else options.warmup_epochs * steps
            schedule = LRSchedule(options.scheduler, rate, options.min_lr, warmup, epochs * steps)
            stages.append(Stage(number, first_epoch, epochs, batch_size, group_size, steps, schedule))
    return Stages(tuple(stages))


def open_levels(stage: Stage, epoch: int, levels: int, progressive: bool) -> int:
    """Return how many of the backbone's levels train in an epoch, counted from the deepest.

    Progressively, one from the first epoch of stage 2, and all at half of the stage.
    """
    if stage.number == 1:
        return 0
    if not progressive:
        return levels
    done = (epoch - stage.first_epoch) / stage.epochs
    return sum(done >= level / levels * _OPEN_BY for level in range(levels))


def freeze(backbone: nn.Module, levels: list[list[nn.Module]], opened: int) -> None:
    """Freeze all but the `opened` deepest of a backbone's levels, its modules by depth. Call it after `net.train()`.

    A frozen level has no gradient, and is in evaluation mode, in which BatchNorm keeps its statistics. The optimizer
    skips parameters without a gradient and keeps their moments.
    """
    frozen = len(levels) - opened
    # Parameters directly on the backbone (a position embedding) go with the shallowest level.
    backbone.requires_grad_(frozen == 0)
    for depth, modules in enumerate(levels):
        for module in modules:
            module.requires_grad_(depth >= frozen)
            module.train(depth >= frozen)

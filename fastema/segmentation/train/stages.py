"""Two stages: first the decoder alone with a frozen backbone, then everything with the backbone at a tenth of the rate.

An epoch's stage and the levels that train in it follow from the epoch and the options alone, so nothing is saved and a
run may be resumed at any epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from fastema.segmentation.options import TrainOptions
from fastema.segmentation.train.lr_schedule import LRSchedule

BACKBONE_SHARE = 0.1  # of the learning rate
# With --progressive-unfreeze, the levels open over this share of the stage.
_OPEN_BY = 0.5


@dataclass(frozen=True)
class Stage:
    """Epochs with one batch size and one schedule.

    Attributes:
        number: 1 or 2.
        first_epoch: from 1 over the whole run.
        epochs: number of epochs.
        batch_size: images per batch.
        group_size: images per optimizer step.
        steps_per_epoch: optimizer steps, the short last one included.
        schedule: the learning rate, by the stage's own steps.
    """

    number: int
    first_epoch: int
    epochs: int
    batch_size: int
    group_size: int
    steps_per_epoch: int
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


def freeze(backbone: nn.Module, backbone_stages: list[list[nn.Module]], opened: int) -> None:
    """Freeze all but the `opened` deepest levels. Call it after `net.train()`.

    A frozen level has no gradient, and is in evaluation mode, in which BatchNorm keeps its statistics. The optimizer
    skips parameters without a gradient and keeps their moments.

    Args:
        backbone: the whole of it.
        backbone_stages: its modules by depth, shallow first.
        opened: number of levels that train.
    """
    frozen = len(backbone_stages) - opened
    # Parameters directly on the backbone (a position embedding) go with the shallowest level.
    backbone.requires_grad_(frozen == 0)
    for depth, modules in enumerate(backbone_stages):
        for module in modules:
            module.requires_grad_(depth >= frozen)
            module.train(depth >= frozen)

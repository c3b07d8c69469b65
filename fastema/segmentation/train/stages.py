"""Two stages: first the decoder alone, the backbone frozen; then all of it, the backbone at a tenth of the rate.

Which stage an epoch is in, and how much of the backbone trains in it, follows from the epoch and the options alone.
So nothing of it is saved, and a run that is resumed in the middle of an unfreezing goes on with the right levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from fastema.segmentation.options import TrainOptions
from fastema.segmentation.train.lr_schedule import Schedule

BACKBONE_SHARE = 0.1  # of the learning rate
# With --progressive-unfreeze: when the shallowest level's turn would be one step further. The rest of the stage
# trains everything.
_OPEN_BY = 0.5


@dataclass(frozen=True)
class Stage:
    """A run of epochs with one batch size and one schedule.

    Attributes:
        number: 1 or 2.
        first_epoch: its first one, counted from 1 over the whole run.
        epochs: how many it has.
        batch_size: images a batch.
        group_size: images an optimizer step.
        steps_per_epoch: optimizer steps an epoch, the short last one included.
        schedule: the learning rate, by the stage's own steps.
    """

    number: int
    first_epoch: int
    epochs: int
    batch_size: int
    group_size: int
    steps_per_epoch: int
    schedule: Schedule

    def step_before(self, epoch: int) -> int:
        """How many of the stage's steps are done when `epoch` begins."""
        return (epoch - self.first_epoch) * self.steps_per_epoch


@dataclass(frozen=True)
class Stages:
    """The stages of a run, in order; those without epochs are left out."""

    stages: tuple[Stage, ...]

    def at(self, epoch: int) -> Stage:
        """The stage of an epoch, from 1; beyond the end, the last one."""
        return [stage for stage in self.stages if stage.first_epoch <= epoch][-1]

    def steps_before(self, epoch: int) -> int:
        """Optimizer steps of the whole run before `epoch` begins."""
        return sum(
            min(max(0, epoch - stage.first_epoch), stage.epochs) * stage.steps_per_epoch for stage in self.stages
        )

    @property
    def total_steps(self) -> int:
        return sum(stage.epochs * stage.steps_per_epoch for stage in self.stages)


def stages_of(options: TrainOptions, images: int) -> Stages:
    """Lays out a run on `images` training images."""
    first = options.first_stage_epochs
    sizes = (
        (1, 1, first, options.batch_size, options.lr),
        (2, first + 1, options.epochs - first, options.second_batch_size, options.second_lr),
    )
    stages: list[Stage] = []
    for number, first_epoch, epochs, batch_size, rate in sizes:
        if epochs == 0:
            continue
        group_size = batch_size * options.accumulation_steps
        steps = math.ceil(images / group_size)
        warmup = 0 if stages else options.warmup_epochs * steps
        schedule = Schedule(options.scheduler, rate, options.min_lr, warmup, epochs * steps)
        stages.append(Stage(number, first_epoch, epochs, batch_size, group_size, steps, schedule))
    return Stages(tuple(stages))


def open_levels(stage: Stage, epoch: int, levels: int, progressive: bool) -> int:
    """How many of the backbone's levels train in an epoch, counted from the deepest.

    Progressively: the deepest from the first epoch of stage 2, each further one where the stage has come another
    `1 / levels` of its first half; at half of the stage all are open.
    """
    if stage.number == 1:
        return 0
    if not progressive:
        return levels
    done = (epoch - stage.first_epoch) / stage.epochs
    return sum(done >= level / levels * _OPEN_BY for level in range(levels))


def freeze(backbone: nn.Module, backbone_stages: list[list[nn.Module]], opened: int) -> None:
    """Lets the `opened` deepest levels train and freezes the others. Call it after `net.train()`.

    Frozen is: no gradient, and evaluation mode, in which BatchNorm keeps its statistics. The optimizer is not told: it
    leaves out parameters without a gradient, and keeps its moments for the time when they have one.

    Args:
        backbone: the whole of it.
        backbone_stages: its modules by depth, the shallowest level first.
        opened: how many levels train.
    """
    frozen = len(backbone_stages) - opened
    # What hangs on the backbone itself, as a vision transformer's position embedding, goes with the shallowest level.
    backbone.requires_grad_(frozen == 0)
    for depth, modules in enumerate(backbone_stages):
        for module in modules:
            module.requires_grad_(depth >= frozen)
            module.train(depth >= frozen)

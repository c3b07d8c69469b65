"""One epoch of optimizer steps: batches gathered to groups, each group's gradient a mean over its images.

A batch is that of all processes together, of which each has its share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastema.segmentation.distributed.parallel import ALONE, Spread
from fastema.segmentation.distributed.process_group import padded
from fastema.segmentation.report.waiting import Waiting
from fastema.segmentation.train.objective import Objective
from fastema.segmentation.train.optimizer import Optimisation, checked_finite
from fastema.segmentation.train.stages import Stage


@dataclass(frozen=True)
class EpochResult:
    """What an epoch of training was.

    Attributes:
        loss: mean over the images.
        usage: [levels, experts], share of the images for which each expert was chosen.
        step_seconds: wall-clock time of every optimizer step, waiting for data included.
        data_wait: share of the time in [0, 1] that this process spent waiting for batches.
    """

    loss: float
    usage: Tensor
    step_seconds: list[float]
    data_wait: float


def train_epoch(
    objective: Objective,
    loader: DataLoader[tuple[Tensor, Tensor]],
    optimisation: Optimisation,
    stage: Stage,
    epoch: int,
    images: int,
    device: torch.device,
    after_batch: Callable[[float], None],
    spread: Spread = ALONE,
) -> EpochResult:
    """Trains on every image once.

    Args:
        objective: of a batch.
        loader: gives this process's share of `images` images, in its share of every `stage.batch_size`; the last batch
            may be shorter.
        optimisation: makes the steps.
        stage: batch and group sizes, and the learning rate.
        epoch: counted from 1 over the whole run.
        images: how many images the epoch has, for all processes.
        device: where the network is.
        after_batch: gets this process's mean loss so far.
        spread: the network over the processes.

    Raises:
        NotFiniteError: loss or gradient are not finite any more.
    """
    step = stage.step_before(epoch)
    left = images
    group_left = group = min(stage.group_size, left)
    own = own_of_group = 0  # images of this process
    loss_sum, usage_sum = 0.0, torch.zeros(())
    step_seconds = []
    started = step_started = time.perf_counter()
    batches = Waiting(loader)
    for (pictures, masks), counts in padded(batches, math.ceil(images / stage.batch_size)):
        count = len(pictures) if counts else 0
        everywhere = min(stage.batch_size, left)
        left -= everywhere
        group_left -= everywhere
        with spread.exchanging(now=group_left == 0):
            loss, output = objective(pictures.to(device, non_blocking=True), masks.to(device, non_blocking=True))
            loss_sum += checked_finite(loss, "loss") * count
            usage_sum = usage_sum + output.usage.cpu() * count
            # By images, not by batches or processes: a short last batch or group counts for what it has.
            optimisation.backward(loss * (count * spread.processes.world_size / group))
        own += count
        own_of_group += count
        if group_left == 0:
            spread.agree(own_of_group)
            own_of_group = 0
            step += 1
            optimisation.step(stage.schedule.at(step))
            group_left = group = min(stage.group_size, left)
            now = time.perf_counter()
            step_seconds.append(now - step_started)
            step_started = now
        after_batch(loss_sum / own)
    seconds = time.perf_counter() - started
    losses, usages = zip(*spread.processes.gather((loss_sum, usage_sum)), strict=True)
    return EpochResult(sum(losses) / images, sum(usages) / images, step_seconds, batches.seconds / seconds)

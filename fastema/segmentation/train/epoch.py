"""One epoch of optimizer steps. Batches form groups; a group's gradient is the mean over its images.

Sizes count the images of all processes together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastema.segmentation.distributed.parallel import ALONE, ParallelModel
from fastema.segmentation.distributed.process_group import pad_batches
from fastema.segmentation.report.timers import TimedIterator
from fastema.segmentation.train.losses import Objective
from fastema.segmentation.train.optimizer import TrainOptimizer, checked_finite
from fastema.segmentation.train.stages import Stage


@dataclass(frozen=True)
class EpochResult:
    """The figures of an epoch of training.

    Attributes:
        loss: mean over the images.
        usage: [levels, experts], share of the images that chose each expert.
        step_seconds: time of every optimizer step, waiting for data included.
        data_wait: share of the time in [0, 1] that this process waited for batches.
    """

    loss: float
    usage: Tensor
    step_seconds: list[float]
    data_wait: float


def train_epoch(
    objective: Objective,
    loader: DataLoader[tuple[Tensor, Tensor]],
    optimizer: TrainOptimizer,
    stage: Stage,
    epoch: int,
    images: int,
    device: torch.device,
    after_batch: Callable[[float], None],
    parallel: ParallelModel = ALONE,
) -> EpochResult:
    """Train on every image once.

    Args:
        objective: of a batch.
        loader: of this process's share of the images, in its share of every batch; the last may be shorter.
        optimizer: makes the steps.
        stage: batch and group sizes, and the learning rate.
        epoch: from 1 over the whole run.
        images: of the epoch, in all processes.
        device: the network's.
        after_batch: called with this process's mean loss so far.
        parallel: the network over the processes.

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
    batches = TimedIterator(loader)
    for (pictures, masks), counts in pad_batches(batches, math.ceil(images / stage.batch_size)):
        count = len(pictures) if counts else 0
        batch = min(stage.batch_size, left)
        left -= batch
        group_left -= batch
        with parallel.reduce_gradients(now=group_left == 0):
            loss, output = objective(pictures.to(device, non_blocking=True), masks.to(device, non_blocking=True))
            loss_sum += checked_finite(loss, "loss") * count
            usage_sum = usage_sum + output.usage.cpu() * count
            # By images, not batches or processes: a short last batch or group counts for what it has.
            optimizer.backward(loss * (count * parallel.processes.world_size / group))
        own += count
        own_of_group += count
        if group_left == 0:
            parallel.sync_buffers(own_of_group)
            own_of_group = 0
            step += 1
            optimizer.step(stage.schedule.at(step))
            group_left = group = min(stage.group_size, left)
            now = time.perf_counter()
            step_seconds.append(now - step_started)
            step_started = now
        after_batch(loss_sum / own)
    seconds = time.perf_counter() - started
    losses, usages = zip(*parallel.processes.gather((loss_sum, usage_sum)), strict=True)
    return EpochResult(sum(losses) / images, sum(usages) / images, step_seconds, batches.seconds / seconds)

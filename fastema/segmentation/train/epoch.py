"""Epochs of optimizer steps: one AdamW for both stages, which never loses its moments.

Batches form groups; a group's gradient is the mean over its images. Sizes count the images of all processes together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastema.errors import UserError
from fastema.segmentation.devices import Precision
from fastema.segmentation.distributed.parallel import ALONE, ParallelModel, clip_gradients
from fastema.segmentation.distributed.process_group import pad_batches
from fastema.segmentation.model.network import SegmentationNet
from fastema.segmentation.report.timers import timed_items
from fastema.segmentation.train.losses import Objective
from fastema.segmentation.train.stages import BACKBONE_SHARE, Stage

# A scaler starts at 2^16 and halves at every overflow: this low, the gradients overflow at any scale.
_LOWEST_SCALE = 2.0**-10


class NotFiniteError(Exception):
    """A loss or gradient became NaN or infinite. The weights are those of the last step."""


def _checked_finite(value: Tensor, name: str) -> float:
    number = float(value.item())
    if not math.isfinite(number):
        raise NotFiniteError(f"the {name} became {number}")
    return number


class TrainOptimizer:
    """AdamW with gradient clipping and scaling.

    Args:
        net: on its device.
        weight_decay: for weights; biases and normalisation, of one dimension, have none.
        clip_grad: limit of the gradient's norm; 0 for none.
        precision: of the forward.
    """

    def __init__(self, net: SegmentationNet, weight_decay: float, clip_grad: float, precision: Precision) -> None:
        self.scaler = precision.scaler()
        self._parameters = list(net.parameters())
        self._limit = clip_grad or math.inf
        self._weight_decays = [weight_decay, 0.0, weight_decay, 0.0]
        # Decoder weights, decoder others, backbone weights, backbone others: always four groups, even if one is empty,
        # so that checkpoints are alike.
        backbone = {id(parameter) for parameter in net.backbone.parameters()}
        groups: list[list[nn.Parameter]] = [[], [], [], []]
        for parameter in self._parameters:
            groups[2 * (id(parameter) in backbone) + (parameter.ndim <= 1)].append(parameter)
        self.adamw = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": decay, "lr": 0.0}
                for parameters, decay in zip(groups, self._weight_decays, strict=True)
            ]
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a share of the step's loss."""
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> None:
        """Make a step at the decoder's learning rate `rate` and clear the gradients.

        With float16, a step whose gradients overflow is skipped: the optimizer's hooks do not run.

        Raises:
            NotFiniteError: the gradients are not finite; no weight has changed.
        """
        for group, share in zip(self.adamw.param_groups, (1.0, 1.0, BACKBONE_SHARE, BACKBONE_SHARE), strict=True):
            group["lr"] = rate * share
        self.scaler.unscale_(self.adamw)
        norm = clip_gradients(self._parameters, self._limit)
        if not self.scaler.is_enabled():  # a scaler expects overflows, and lowers its scale
            _checked_finite(norm, "gradient")
        self.scaler.step(self.adamw)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < _LOWEST_SCALE:
            raise NotFiniteError("the gradient became inf")
        self.adamw.zero_grad(set_to_none=True)

    def load(self, checkpoint: dict[str, Any], origin: object) -> None:
        """Load a checkpoint's moments; the options stay this run's."""
        try:
            self.adamw.load_state_dict(checkpoint["optimizer"])
        except ValueError as error:
            raise UserError(
                f"{origin} cannot be resumed from: its optimizer does not fit this network ({error}); an older version "
                "of fastema train had other parameter groups"
            ) from error
        for group, decay in zip(self.adamw.param_groups, self._weight_decays, strict=True):
            group["weight_decay"] = decay
        if self.scaler.is_enabled() and checkpoint.get("scaler"):  # a run without float16 saved none
            self.scaler.load_state_dict(checkpoint["scaler"])


@dataclass(frozen=True)
class EpochResult:
    """The figures of an epoch of training."""

    loss: float  # mean over the images
    usage: Tensor  # [levels, experts], share of the images that chose each expert
    step_seconds: list[float]  # of every optimizer step, waiting for data included
    data_wait: float  # share of the time in [0, 1] that this process waited for batches


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
    own = own_of_group = 0  # images of this process
    loss_sum, usage_sum = 0.0, torch.zeros(())
    step_seconds: list[float] = []
    waits: list[float] = []
    started = step_started = time.perf_counter()
    batches = pad_batches(timed_items(loader, waits), math.ceil(images / stage.batch_size))
    for batch, ((pictures, masks), counts) in enumerate(batches):
        count = len(pictures) if counts else 0
        first = batch * stage.batch_size  # images of the epoch before this batch
        group = min(stage.group_size, images - first // stage.group_size * stage.group_size)
        ends_group = first % stage.group_size + stage.batch_size >= group
        with parallel.reduce_gradients(now=ends_group):
            loss, output = objective(pictures.to(device, non_blocking=True), masks.to(device, non_blocking=True))
            loss_sum += _checked_finite(loss, "loss") * count
            usage_sum = usage_sum + output.usage.cpu() * count
            # By images, not batches or processes: a short last batch or group counts for what it has.
            optimizer.backward(loss * (count * parallel.processes.world_size / group))
        own += count
        own_of_group += count
        if ends_group:
            parallel.sync_buffers(own_of_group)
            own_of_group = 0
            step += 1
            optimizer.step(stage.schedule.at(step))
            now = time.perf_counter()
            step_seconds.append(now - step_started)
            step_started = now
        after_batch(loss_sum / own)
    seconds = time.perf_counter() - started
    losses, usages = zip(*parallel.processes.gather((loss_sum, usage_sum)), strict=True)
    return EpochResult(sum(losses) / images, sum(usages) / images, step_seconds, sum(waits) / seconds)

"""What a batch is trained towards: the one piece in which a distillation differs from an ordinary training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from fastema.segmentation.model.network import Output
from fastema.segmentation.train.losses import training_loss
from fastema.segmentation.train.precision import Precision

#: (images [N, 3, S, S] in [0, 1], masks [N, 1, S, S] of 0 and 1) → the batch's mean loss, a scalar that can be
#: differentiated, and the network's output, of which the trainer reads how the experts were used.
Objective: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Output]]

#: Builds the objective of a run, once the network is on its device.
MakeObjective: TypeAlias = Callable[[nn.Module, Precision], Objective]


def supervised(net: nn.Module, precision: Precision) -> Objective:
    """The loss against the true masks."""

    def objective(images: Tensor, masks: Tensor) -> tuple[Tensor, Output]:
        with precision.autocast():
            output: Output = net(images)
        return training_loss(output, masks), output

    return objective

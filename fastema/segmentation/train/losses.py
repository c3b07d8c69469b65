"""The loss against the masks: F3Net's structure loss at every level, plus the balance of the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from fastema.segmentation.data.masks import IGNORED
from fastema.segmentation.devices import Precision
from fastema.segmentation.model.network import Output

# The structure loss of F3Net (Wei, Wang, Huang, AAAI 2020): width of the outline's surroundings, pixels, and how much
# more the outline weighs.
_WINDOW = 31
_EMPHASIS = 5.0
# F3Net, too: every coarser level counts half as much.
_SIDE_DECAY = 0.5
# Of the Switch Transformer (Fedus, Zoph, Shazeer, JMLR 2022).
BALANCE_WEIGHT = 0.01

#: (images [N, 3, S, S] in [0, 1], masks [N, 1, S, S] of 1, 0 and IGNORED)
#: -> (the batch's mean loss, the network's output)
Objective: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Output]]

#: Build the objective of a run, once the network is on its device.
MakeObjective: TypeAlias = Callable[[nn.Module, Precision], Objective]


def supervised(net: nn.Module, precision: Precision) -> Objective:
    """Return the objective of ordinary training: the loss against the masks."""

    def objective(images: Tensor, masks: Tensor) -> tuple[Tensor, Output]:
        with precision.autocast():
            output: Output = net(images)
        return training_loss(output, masks), output

    return objective


def training_loss(output: Output, masks: Tensor, balance_weight: float = BALANCE_WEIGHT) -> Tensor:
    """Return the structure loss of the logits, plus 1/2, 1/4, ... of the side logits', plus the experts' balance.

    Args:
        output: of the network in training mode; in evaluation mode there are no side logits.
        masks: float [N, 1, H, W] of 1, 0 and IGNORED, whose pixels do not count.
        balance_weight: of the experts' balance loss.
    """
    masks, weights = _weighted(masks)
    levels = [output.logits, *output.side_logits]
    loss = sum(_SIDE_DECAY**level * structure_loss(logits, masks, weights) for level, logits in enumerate(levels))
    return loss + balance_weight * output.balance


def structure_loss(logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return weighted binary cross-entropy plus weighted IoU loss per image, averaged over the batch.

    Args:
        logits: [N, 1, H, W].
        masks: float [N, 1, H, W] of 0 and 1, and of IGNORED where no weights are given.
        weights: of the pixels, [N, 1, H, W], larger at the masks' outlines unless given.
    """
    if weights is None:
        masks, weights = _weighted(masks)
    # With a mean in place of reduction="none", as in much published code, the weights cancel out.
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    # A pixel weighs at least 1; below that, all are ignored.
    weighted_entropy = (weights * entropy).sum((2, 3)) / weights.sum((2, 3)).clamp(min=1)

    predictions = logits.sigmoid()
    intersection = (predictions * masks * weights).sum((2, 3))
    total = ((predictions + masks) * weights).sum((2, 3))
    weighted_iou = 1 - (intersection + 1) / (total - intersection + 1)
    return (weighted_entropy + weighted_iou).mean()


def _weighted(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks of 0 and 1, and the weights of their pixels, 0 where the masks have IGNORED."""
    known = masks != IGNORED
    masks = masks * known
    return masks, _outline_weights(masks) * known


def _outline_weights(masks: Tensor) -> Tensor:
    """Return [N, 1, H, W]: from 1, far from any outline, to 6, where a pixel is unlike all of its surroundings."""
    # A square's mean is a mean along each side, at a fifteenth of the work.
    rows = F.avg_pool2d(masks, (1, _WINDOW), stride=1, padding=(0, _WINDOW // 2))
    surroundings = F.avg_pool2d(rows, (_WINDOW, 1), stride=1, padding=(_WINDOW // 2, 0))
    return 1 + _EMPHASIS * (surroundings - masks).abs()

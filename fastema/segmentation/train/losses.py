"""What is minimised: F3Net's structure loss at every level, plus a little pressure to use all experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastema.segmentation.model.network import Output

# The structure loss of F3Net (Wei, Wang, Huang, AAAI 2020): how far the outline reaches, in pixels, and how much more
# it weighs.
_WINDOW = 31
_EMPHASIS = 5.0
# F3Net, too: every level coarser than the last counts half as much.
_SIDE_DECAY = 0.5
# Of the Switch Transformer (Fedus, Zoph, Shazeer, JMLR 2022).
BALANCE_WEIGHT = 0.01


def training_loss(output: Output, masks: Tensor, balance_weight: float = BALANCE_WEIGHT) -> Tensor:
    """The structure loss of the logits, plus 1/2, 1/4, ... of that of the side logits, plus the balance of the experts.

    Args:
        output: of the network in training mode; in evaluation mode there are no side logits to count.
        masks: [N, 1, H, W], float, 0 and 1.
        balance_weight: how much the experts' balance loss counts.
    """
    weights = outline_weights(masks)
    loss = _structure_loss(output.logits, masks, weights)
    for level, logits in enumerate(output.side_logits, start=1):
        loss = loss + _SIDE_DECAY**level * _structure_loss(logits, masks, weights)
    return loss + balance_weight * output.balance


def structure_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus IoU loss, both weighted, per image, then the mean over the batch.

    Args:
        logits: [N, 1, H, W], before the sigmoid.
        masks: [N, 1, H, W], float, 0 and 1.
    """
    return _structure_loss(logits, masks, outline_weights(masks))


def outline_weights(masks: Tensor) -> Tensor:
    """From 1, far from any outline, to 6 where a pixel is unlike all of its surroundings; [N, 1, H, W]."""
    # The mean over a square is one along each side, at a fifteenth of the work.
    rows = F.avg_pool2d(masks, (1, _WINDOW), stride=1, padding=(0, _WINDOW // 2))
    surroundings = F.avg_pool2d(rows, (_WINDOW, 1), stride=1, padding=(_WINDOW // 2, 0))
    return 1 + _EMPHASIS * (surroundings - masks).abs()


def _structure_loss(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    # reduction="none" matters: a mean here, as in much published code, makes the weights cancel out.
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    weighted_entropy = (weights * entropy).sum((2, 3)) / weights.sum((2, 3))

    predictions = logits.sigmoid()
    intersection = (predictions * masks * weights).sum((2, 3))
    total = ((predictions + masks) * weights).sum((2, 3))
    weighted_iou = 1 - (intersection + 1) / (total - intersection + 1)
    return (weighted_entropy + weighted_iou).mean()

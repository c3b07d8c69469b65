"""The structure loss of F3Net (Wei, Wang, Huang, AAAI 2020): errors near the object's outline weigh more."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# The paper's: how far the outline reaches, in pixels, and how much more it weighs.
_WINDOW = 31
_EMPHASIS = 5.0


def structure_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Weighted binary cross-entropy plus weighted IoU loss, per image, then the mean over the batch.

    Args:
        logits: [N, 1, H, W], before the sigmoid.
        masks: [N, 1, H, W], float, 0 and 1.
    """
    surroundings = F.avg_pool2d(masks, _WINDOW, stride=1, padding=_WINDOW // 2)
    weights = 1 + _EMPHASIS * (surroundings - masks).abs()
    # reduction="none" matters: a mean here, as in much published code, makes the weights cancel out.
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    weighted_entropy = (weights * entropy).sum((2, 3)) / weights.sum((2, 3))

    predictions = logits.sigmoid()
    intersection = (predictions * masks * weights).sum((2, 3))
    total = ((predictions + masks) * weights).sum((2, 3))
    weighted_iou = 1 - (intersection + 1) / (total - intersection + 1)
    return (weighted_entropy + weighted_iou).mean()

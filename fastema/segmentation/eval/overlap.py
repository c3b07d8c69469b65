"""Overlap of two masks of one image: the mean over images is the figure, so it does not depend on the batch size."""

from __future__ import annotations

import torch


def iou(prediction: torch.Tensor, truth: torch.Tensor) -> float:
    """Intersection over union of two masks, bool [H, W].

    An empty truth has no intersection to measure: an empty prediction is then right (1), any other wrong (0).
    """
    union = int((prediction | truth).sum())
    if union == 0:
        return 1.0
    return int((prediction & truth).sum()) / union


def dice(prediction: torch.Tensor, truth: torch.Tensor) -> float:
    """Dice coefficient of two masks, bool [H, W]: twice the intersection over the sum of the areas.

    The same as F1, and as 2·IoU / (1 + IoU), with the same rule for an empty truth.
    """
    overlap = iou(prediction, truth)
    return 2 * overlap / (1 + overlap)

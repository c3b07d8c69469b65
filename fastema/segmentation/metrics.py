"""IoU of one image: the mean over images is the trainer's figure, so it does not depend on the batch size."""

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

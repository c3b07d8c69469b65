"""The IoU of every validation image, at the size that its mask has in the file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from fastema.segmentation.datasets import Validation
from fastema.segmentation.metrics import iou


def predict(net: nn.Module, batch: Validation, device: torch.device) -> list[torch.Tensor]:
    """The predicted masks of a batch, bool [H, W], each at the size of its true mask; threshold 0.5."""
    with torch.no_grad():  # not inference_mode: weights touched under it could never be averaged again
        logits = net(batch.images.to(device))
    masks = []
    for one, truth in zip(logits, batch.masks, strict=True):
        resized = F.interpolate(one[None], truth.shape, mode="bilinear", align_corners=False)
        masks.append((resized[0, 0] > 0).cpu())  # a logit above 0 is a probability above 0.5
    return masks


def evaluate(net: nn.Module, loader: DataLoader, device: torch.device) -> list[float]:
    """The IoU per image, in the loader's order. The model is in training mode afterwards if it was before."""
    was_training = net.training
    net.eval()
    try:
        return [
            iou(prediction, truth)
            for batch in loader
            for prediction, truth in zip(predict(net, batch, device), batch.masks, strict=True)
        ]
    finally:
        net.train(was_training)

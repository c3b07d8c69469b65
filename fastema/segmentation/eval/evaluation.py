"""Measuring a network image by image, at the size that the mask has in its file.

The logits, not the probabilities, are resized to that size (bilinear), as most published code does; a pixel is
foreground where its logit is above 0, which is a probability above 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from fastema.segmentation.data.loaders import Validation
from fastema.segmentation.eval.overlap import iou


def resized_logits(net: nn.Module, images: torch.Tensor, sizes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What the network says of a batch, float32 [H, W] on the CPU, each at its own size.

    Args:
        net: returns an `Output`; in evaluation mode.
        images: float [N, 3, S, S] in [0, 1], on the network's device.
        sizes: N of (H, W).
    """
    with torch.no_grad():  # not inference_mode: weights touched under it could never be averaged again
        logits = net(images).logits.float()
    return [
        F.interpolate(one[None], tuple(size), mode="bilinear", align_corners=False)[0, 0].cpu()
        for one, size in zip(logits, sizes, strict=True)
    ]


def batch_logits(net: nn.Module, batch: Validation, device: torch.device) -> list[torch.Tensor]:
    """What the network says of a batch, float32 [H, W] on the CPU, each at the size of its true mask."""
    return resized_logits(net, batch.images.to(device), [mask.shape for mask in batch.masks])


def predict(net: nn.Module, batch: Validation, device: torch.device) -> list[torch.Tensor]:
    """The predicted masks of a batch, bool [H, W], each at the size of its true mask."""
    return [logits > 0 for logits in batch_logits(net, batch, device)]


def evaluate(net: nn.Module, loader: DataLoader, device: torch.device) -> list[float]:
    """The IoU per image, in the loader's order. The network's modes are afterwards what they were before."""
    with in_eval_mode(net):
        return [
            iou(prediction, truth)
            for batch in loader
            for prediction, truth in zip(predict(net, batch, device), batch.masks, strict=True)
        ]


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """A block in which the network is in evaluation mode; afterwards each module is in the mode it was in."""
    were_training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in were_training:  # not net.train(): frozen parts were in evaluation mode before
            module.training = True

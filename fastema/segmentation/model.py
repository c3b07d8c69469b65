"""The network: a timm backbone, and a decoder that carries its pyramid from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class PyramidDecoder(nn.Module):
    """Adds each level, reduced to `width` channels, to the upsampled coarser one; ends in one logit a pixel."""

    def __init__(self, channels: Sequence[int], width: int = 64) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(_block(count, width, kernel=1) for count in channels)
        self.smooth = nn.ModuleList(_block(width, width, kernel=3) for _ in channels)
        self.head = nn.Conv2d(width, 1, kernel_size=1)

    def forward(self, pyramid: Sequence[torch.Tensor]) -> torch.Tensor:  # [N, C_i, H_i, W_i], fine to coarse
        merged: torch.Tensor | None = None
        levels = list(zip(pyramid, self.laterals, self.smooth, strict=True))
        for features, lateral, smooth in reversed(levels):
            level = lateral(features)
            if merged is not None:
                level = level + F.interpolate(merged, level.shape[-2:], mode="bilinear", align_corners=False)
            merged = smooth(level)
        return self.head(merged)  # [N, 1, H_0, W_0]


class SegmentationNet(nn.Module):
    """Images, float [N, 3, H, W] in [0, 1], to logits [N, 1, H, W].

    Args:
        backbone: returns a list of feature maps, fine to coarse, as timm's `features_only` models do.
        channels: how many channels each of them has.
        mean: per colour, what the backbone expects to be subtracted.
        std: per colour, what it then expects to be divided by.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, backbone: nn.Module, channels: Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = PyramidDecoder(channels)
        # Constants of the architecture, not weights: they move with the model but stay out of checkpoints.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.decoder(self.backbone((images - self.mean) / self.std))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def _block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )

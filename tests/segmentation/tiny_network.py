"""A tiny network and a few images, for tests that use a trained checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastema.segmentation.data.synthetic import camouflaged_pair
from fastema.segmentation.model.network import Architecture, SegmentationNet, create_net

ARCHITECTURE = Architecture("mobilenetv3_small_050", num_experts=2, top_k=1)
OPTIONS = {"backbone": "mobilenetv3_small_050", "num_experts": 2, "top_k": 1, "img_size": 32, "val_fraction": 0.4}
# Height and width of the images and masks: not the network's, and not all alike.
SIZES = [(40, 56), (33, 47), (64, 64), (24, 30), (50, 20)]


def write_pairs(folder: Path, count: int, names: str = "image-{}") -> None:
    for kind in ("Image", "GT_Object"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        image, truth = camouflaged_pair(np.random.default_rng(index), 64)
        height, width = SIZES[index % len(SIZES)]
        name = names.format(index)
        Image.fromarray(image[:height, :width]).save(folder / "Image" / f"{name}.jpg")
        Image.fromarray(truth[:height, :width] * np.uint8(255)).save(folder / "GT_Object" / f"{name}.png")


def random_net(seed: int) -> SegmentationNet:
    torch.manual_seed(seed)
    net, _ = create_net(ARCHITECTURE, pretrained=False)
    with torch.no_grad():
        for parameter in net.decoder.parameters():  # so that its output is not flat
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.2)
    return net

"""Real nets as lists of tensor shapes. Nothing is downloaded and nothing is allocated: written down from the nets'
definitions, or taken from a library's model without its memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bench.cases import Case, Shape, Unavailable, import_timm, make_torchvision_work

#: The nets that the targets for real nets hold for: 18 to 86 M parameters.
RESNET50, EDGENEXT, SEGMENTATION, VIT_B = "ResNet-50", "EdgeNeXt-base", "746 tensors, 31 M", "ViT-B/16"
REAL_NETS = (RESNET50, EDGENEXT, SEGMENTATION, VIT_B)


def resnet50() -> Case:
    """ResNet-50's 161 parameters (25,557,032), written down from its definition."""
    shapes: list[Shape] = []

    def convolution(inputs: int, outputs: int, kernel: int) -> None:
        # A convolution without a bias, and the normalisation that follows it.
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(inputs, width, 1)
            convolution(width, width, 3)
            convolution(width, 4 * width, 1)
            if block == 0:
                convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    shapes.extend([(1000, inputs), (1000,)])
    return Case(RESNET50, tuple(shapes))


def vit_b() -> Case:
    """ViT-B/16's 152 parameters (86,567,656)."""
    return _vit(VIT_B, width=768, depth=12, patch=16)


def vit_b_bf16() -> Case:
    """The same in bfloat16, averaged in float32: how large nets are trained."""
    return replace(vit_b(), name=f"{VIT_B}, f32 <- bf16", live_dtype=torch.bfloat16)


def vit_h() -> Case:
    """ViT-H/14's 392 parameters (632,045,800)."""
    return _vit("ViT-H/14", width=1280, depth=32, patch=14)


def _vit(name: str, width: int, depth: int, patch: int, classes: int = 1000) -> Case:
    # https://arxiv.org/abs/2010.11929, images of 224 pixels, biases everywhere.
    norm: list[Shape] = [(width,), (width,)]
    block: list[Shape] = [
        *(*norm, (3 * width, width), (3 * width,), (width, width), (width,)),
        *(*norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)),
    ]
    stem: list[Shape] = [(1, 1, width), (1, (224 // patch) ** 2 + 1, width), (width, 3, patch, patch), (width,)]
    return Case(name, (*stem, *block * depth, *norm, (classes, width), (classes,)))


def llama_7b(free: int) -> Case:
    """Llama-7B in bfloat16, averaged in float32, with as many of its 32 layers as leave room for several averages.

    Args:
        free: memory in bytes. The weights, four averages of them and one temporary copy in float32 (22 bytes a
            parameter) shall fit into three quarters of it.

    Raises:
        Unavailable: not even one layer fits.
    """
    width, hidden, words = 4096, 11008, 32000
    layer: list[Shape] = [(width, width)] * 4 + [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    ends: list[Shape] = [(words, width), (width,), (words, width)]

    def cut(layers: int) -> Case:
        name = f"Llama-7B, {layers} of 32 layers, f32 <- bf16"
        return Case(name, (ends[0], *layer * layers, *ends[1:]), torch.float32, torch.bfloat16)

    fitting = [layers for layers in range(1, 33) if 22 * cut(layers).params <= 0.75 * free]
    if not fitting:
        raise Unavailable(f"one layer needs {22 * cut(1).params / 0.75e9:.0f} GB, {free / 1e9:.0f} GB are free")
    return cut(fitting[-1])


def edgenext_base() -> Case:
    """EdgeNeXt-base's 214 parameters (18.5 M, classifier included), from timm.

    Raises:
        Unavailable: timm is not installed, or does not load.
    """
    timm = import_timm()
    with torch.device("meta"):
        return _case_of(EDGENEXT, timm.create_model("edgenext_base", pretrained=False))


def sd15_unet() -> Case:
    """The 686 parameters (859.5 M) of Stable Diffusion 1.5's UNet, from diffusers.

    Raises:
        Unavailable: diffusers is not installed, or does not load.
    """
    try:
        make_torchvision_work()
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from None
    with torch.device("meta"):
        # https://arxiv.org/abs/2112.10752; what differs from the class's defaults.
        net: Any = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return _case_of("SD-1.5 UNet", net)


def segmentation_list() -> Case:
    """746 tensors like a segmentation net with experts: 514 of at most 1,024 elements, 9 of 1 M and more.

    An approximation: the counts, the classes of size and the 31 M in all are that net's; the sizes within a class are
    spread evenly on a logarithmic scale, and the classes are interleaved as layers interleave them.
    """
    small = [int(2 ** (4 + 6 * index / 513)) for index in range(514)]  # 16 ... 1,024: norms, biases, gates
    large = [1_000_000 + 150_000 * index for index in range(9)]  # 1.0 M ... 2.2 M: 14.4 M together
    middle = [int(2 ** (11 + 8 * index / 222)) for index in range(223)]  # 2,048 ... 524,288: 21 M before scaling
    left = 31_000_000 - sum(small) - sum(large)
    middle = [max(1025, int(size * left / sum(middle))) for size in middle]
    classes = [_strided(sizes, step) for sizes, step in ((small, 5), (middle, 7), (large, 2))]
    # Each tensor stands where its share of its own class puts it.
    placed = [(index / len(sizes), size) for sizes in classes for index, size in enumerate(sizes)]
    return Case(SEGMENTATION, tuple((size,) for _, size in sorted(placed)))


def _strided(sizes: list[int], step: int) -> list[int]:
    """All sizes in another order: every `step`-th, from each start."""
    return [size for start in range(step) for size in sizes[start::step]]


def _case_of(name: str, model: nn.Module) -> Case:
    return Case(name, tuple(tuple(parameter.shape) for parameter in model.parameters()))

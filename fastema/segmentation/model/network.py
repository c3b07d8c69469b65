"""The network: a timm backbone, and a decoder that goes from coarse to fine with experts at every level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastema.errors import UserError
from fastema.segmentation.model.backbones import create_backbone
from fastema.segmentation.model.experts import Mixture, conv_norm_act, create_experts


@dataclass(frozen=True)
class Architecture:
    """Hold what is needed to build the network again, as plain values."""

    backbone: str  # name of a timm model
    num_experts: int = 7  # per level of the decoder; 0 for a plain decoder
    top_k: int = 2  # experts per image; ignored without experts

    def __post_init__(self) -> None:
        if self.num_experts < 0:
            raise UserError(f"the number of experts must not be negative, got {self.num_experts}")
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"top-k must be between 1 and the number of experts ({self.num_experts}), got {self.top_k}")


class Output(NamedTuple):
    """The network's result."""

    logits: Tensor  # [N, 1, H, W], at the image's size
    side_logits: list[Tensor]  # fine to coarse, each [N, 1, H, W], at the image's size; [] in evaluation mode
    balance: Tensor  # scalar, the mean over the levels; 0 without experts
    usage: Tensor  # [levels, experts], fine to coarse: share of the images that chose each; detached


class Decoded(NamedTuple):
    """The decoder's result: one entry a level, fine to coarse."""

    logits: list[Tensor]  # each [N, 1, H_i, W_i]; only the finest in evaluation mode
    balance: Tensor  # scalar
    usage: Tensor  # [levels, experts]


class PyramidDecoder(nn.Module):
    """Add each level, reduced to `width` channels, to the upsampled coarser one; experts refine the sum."""

    def __init__(self, channels: Sequence[int], width: int = 64, num_experts: int = 0, top_k: int = 2) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(conv_norm_act(count, width) for count in channels)
        self.smooth = nn.ModuleList(conv_norm_act(width, width, kernel=3) for _ in channels)
        levels = range(len(channels)) if num_experts else ()
        self.mixtures = nn.ModuleList(Mixture(create_experts(num_experts, width), width, top_k) for _ in levels)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, kernel_size=1) for _ in channels)

    def forward(self, pyramid: Sequence[Tensor]) -> Decoded:  # [N, C_i, H_i, W_i], fine to coarse
        merged: Tensor | None = None
        logits: list[Tensor] = []
        balances: list[Tensor] = []
        usages: list[Tensor] = []
        for level in reversed(range(len(self.laterals))):
            features = self.laterals[level](pyramid[level])
            if merged is not None:
                features = features + F.interpolate(merged, features.shape[-2:], mode="bilinear", align_corners=False)
            merged = self.smooth[level](features)
            if self.mixtures:
                merged, balance, usage = self.mixtures[level](merged)
                balances.insert(0, balance)
                usages.insert(0, usage)
            if self.training or level == 0:
                logits.insert(0, self.heads[level](merged))
        if not self.mixtures:
            return Decoded(logits, logits[0].new_zeros(()), logits[0].new_zeros(len(self.laterals), 0))
        return Decoded(logits, torch.stack(balances).mean(), torch.stack(usages))


class SegmentationNet(nn.Module):
    """Map images, float [N, 3, H, W] in [0, 1], to an `Output`.

    Args:
        backbone: returns feature maps, fine to coarse, as timm's `features_only` models do.
        channels: of each feature map.
        mean: per colour, subtracted before the backbone.
        std: per colour, divided by after that.
        num_experts: per level of the decoder; 0 for a plain decoder.
        top_k: experts per image.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        num_experts: int = 0,
        top_k: int = 2,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self._channels_last = getattr(backbone, "output_fmt", None) == "NHWC"  # some transformers of timm
        self.decoder = PyramidDecoder(channels, num_experts=num_experts, top_k=top_k)
        # Constants: they move with the model but are in no checkpoint.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Output:
        pyramid = self.backbone((images - self.mean) / self.std)
        if self._channels_last:
            pyramid = [features.permute(0, 3, 1, 2) for features in pyramid]
        decoded = self.decoder(pyramid)
        logits, *side_logits = [_resize(level, images.shape[-2:]) for level in decoded.logits]
        return Output(logits, side_logits, decoded.balance, decoded.usage)

    def backbone_levels(self) -> list[list[nn.Module]]:
        """Return the backbone's modules by level, shallow first: the largest that lie within one level.

        A parameter directly on a module that spans several levels (a vision transformer's position embedding) is in
        none of them.
        """
        depths = parameter_depths(self.backbone)
        levels: list[list[nn.Module]] = [[] for _ in self.decoder.laterals]
        depth = 0

        def divide(module: nn.Module, prefix: str) -> None:
            nonlocal depth
            within = {depths[prefix + name] for name, _ in module.named_parameters() if prefix + name in depths}
            if len(within) > 1:
                for name, child in module.named_children():
                    divide(child, f"{prefix}{name}.")
                return
            depth = next(iter(within), depth)  # without parameters: the level of the module before it
            levels[depth].append(module)

        divide(self.backbone, "")
        return levels


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode for a block; afterwards each module has its mode back."""
    were_training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in were_training:  # not net.train(): frozen parts were in evaluation mode
            module.training = True


def check_input_size(net: nn.Module, name: str, size: int) -> None:
    """Raise `UserError` if the network cannot take square images of `size`; some transformers take only their own."""
    try:
        with eval_mode(net), torch.no_grad():
            net(torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever the backbone raises
        raise UserError(f"backbone {name} cannot take --img-size {size}: {error}") from error


def create_net(architecture: Architecture, pretrained: bool) -> tuple[SegmentationNet, str]:
    """Create the network; return it and the source of its backbone's weights, in words."""
    backbone = create_backbone(architecture.backbone, pretrained)
    shape = (backbone.module, backbone.channels, backbone.mean, backbone.std)
    return SegmentationNet(*shape, architecture.num_experts, architecture.top_k), backbone.weights


def parameter_depths(backbone: nn.Module) -> dict[str, int]:
    """Return, by parameter name, the shallowest level of the pyramid that depends on it; the last if none does.

    Found in autograd's graph, so it is right for any architecture.
    """
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in backbone.named_parameters()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    size = getattr(backbone, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    device = next(iter(parameters.values())).device
    with eval_mode(backbone), torch.enable_grad():
        pyramid = torch.func.functional_call(backbone, parameters, torch.zeros(1, *size, device=device))
    depths: dict[str, int] = {}
    seen = set()
    for depth, features in enumerate(pyramid):
        nodes = [features.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                depths[names[id(node.variable)]] = depth
            nodes += [following for following, _ in node.next_functions]
    return dict.fromkeys(parameters, len(pyramid) - 1) | depths


def _resize(logits: Tensor, size: torch.Size) -> Tensor:
    # In half precision, interpolation makes visible steps.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(wide, size, mode="bilinear", align_corners=False)

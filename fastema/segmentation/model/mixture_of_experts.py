"""A gated mixture of experts: per image, the top-k experts run and their results are added by weight.

Each expert runs once, on its own images. One that no image chose does not run and its weights get no gradient:
DistributedDataParallel needs `find_unused_parameters=True`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# The balance loss counts choices over this many images. Within a batch of one or two every choice looks unbalanced, and
# the loss would only make the gate indifferent: Qiu et al., "Demons in the Detail" (2025).
_BALANCE_WINDOW = 64


class Mixed(NamedTuple):
    """A mixture's result."""

    features: Tensor  # [N, C, H, W]
    balance: Tensor  # scalar
    usage: Tensor  # [experts], share of the images that chose each; sums to top_k; detached


class Mixture(nn.Module):
    """Add the weighted results of an image's `top_k` experts to its features.

    The gate is a linear layer on the globally pooled features, in float32 under autocast too (as the router of the
    Switch Transformer); the chosen experts' probabilities are rescaled to sum to one.

    Args:
        experts: modules from [n, C, H, W] to a summand of the same shape, for any n ≥ 1.
        width: C.
        top_k: experts per image.

    Raises:
        ValueError: `top_k` is not between 1 and the number of experts.
    """

    recent_usage: Tensor

    def __init__(self, experts: Sequence[nn.Module], width: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= len(experts):
            raise ValueError(f"top_k must be between 1 and the number of experts ({len(experts)}), got {top_k}")
        self.experts = nn.ModuleList(experts)
        self.gate = nn.Linear(width, len(experts))
        self.top_k = top_k
        # Each expert's share of the recent choices; saved, so that a resumed run is exact.
        self.register_buffer("recent_usage", torch.full((len(experts),), 1 / len(experts)))

    def forward(self, features: Tensor) -> Mixed:
        probabilities = self._gate(features)
        weights, chosen = probabilities.topk(self.top_k, dim=1)
        weights = weights / weights.sum(1, keepdim=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts))
        balance = self._balance(probabilities, counts)
        return Mixed(self._mix(features, weights, chosen, counts), balance, counts / len(features))

    def _gate(self, features: Tensor) -> Tensor:  # [N, experts]
        with torch.autocast(features.device.type, enabled=False):
            pooled = features.float().mean((2, 3)).to(self.gate.weight.dtype)
            return self.gate(pooled).softmax(1)

    def _mix(self, features: Tensor, weights: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)  # [N * top_k], by expert, then by image
        images = order // self.top_k
        scale = weights.flatten()[order].view(-1, 1, 1, 1)
        per_expert = counts.tolist()  # the one synchronisation with the device
        mixed = features.clone()
        for expert, own, share in zip(self.experts, images.split(per_expert), scale.split(per_expert), strict=True):
            if len(own):
                added = expert(features.index_select(0, own)) * share
                mixed.index_add_(0, own, added.to(mixed.dtype))  # autocast may have changed the dtype
        return mixed

    def _balance(self, probabilities: Tensor, counts: Tensor) -> Tensor:
        """Return experts · Σ fᵢ Pᵢ, 1 when balanced: "Switch Transformers" (Fedus et al., JMLR 2022), eq. 4.

        f are the shares of the choices, without a gradient; P the mean probabilities, with one.
        """
        shares = (counts / counts.sum()).to(self.recent_usage.dtype)
        if self.training:
            fresh = min(1.0, len(probabilities) / _BALANCE_WINDOW)
            shares = torch.lerp(self.recent_usage, shares, fresh)
            self.recent_usage.copy_(shares)
        return len(self.experts) * (shares * probabilities.mean(0)).sum()

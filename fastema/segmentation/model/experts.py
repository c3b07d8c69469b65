"""A gated mixture of experts, of seven kinds, each for a cue that the others miss.

An expert returns what to add to the features. All keep [N, C, H, W], at any size down to one pixel. They normalise by
groups, not over the batch: an expert runs only on the images that chose it, which may be one. One that no image chose
does not run and its weights get no gradient: DistributedDataParallel needs `find_unused_parameters=True`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The balance loss counts choices over this many images. Within a batch of one or two every choice looks unbalanced, and
# the loss would only make the gate indifferent: Qiu et al., "Demons in the Detail" (2025).
_BALANCE_WINDOW = 64


class Texture(nn.Module):
    """Find fine repeating structure, by convolutions of growing dilation.

    The receptive field block of Liu, Huang, Wang (ECCV 2018), used on camouflaged objects by SINet (Fan et al.,
    CVPR 2020).
    """

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(width, width // 2, 3, padding=dilation, dilation=dilation, bias=False)
            for dilation in (scale, 2 * scale, 3 * scale)
        )
        self.join = conv_norm_act(3 * (width // 2), width)

    def forward(self, features: Tensor) -> Tensor:
        return self.join(torch.cat([branch(features) for branch in self.branches], 1))


class Attention(nn.Module):
    """Find distant regions that look alike, by attention from every pixel to a small grid of pooled tokens.

    The linear spatial-reduction attention of PVTv2 (Wang et al., 2022): its cost grows with the pixels, not their
    square. Positions enter through a depthwise convolution (Chu et al., ICLR 2023).
    """

    HEADS = 4

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.grid = 7 * scale
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = group_norm(width)
        self.queries = nn.Conv2d(width, width, 1)
        self.keys_values = nn.Conv2d(width, 2 * width, 1)
        self.project = conv_norm_act(width, width)

    def forward(self, features: Tensor) -> Tensor:
        features = self.norm(features + self.position(features))
        tokens = _adaptive_pool(features, (self.grid, self.grid))
        queries = self._heads(self.queries(features))  # [N, heads, C / heads, H * W]
        keys, values = (self._heads(part) for part in self.keys_values(tokens).chunk(2, 1))
        weights = (keys.transpose(2, 3) @ queries / keys.shape[2] ** 0.5).softmax(2)  # [N, heads, tokens, H * W]
        return self.project(features + (values @ weights).reshape(features.shape))

    def _heads(self, maps: Tensor) -> Tensor:
        count, channels = maps.shape[:2]
        return maps.reshape(count, self.HEADS, channels // self.HEADS, -1)


class LocalGlobal(nn.Module):
    """Relate a detail to the whole image: a local convolution, plus one context vector an image.

    The context is the attention-weighted mean of GCNet (Cao et al., ICCVW 2019).
    """

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.local = conv_norm_act(width, width, kernel=3, dilation=scale)
        self.attention = nn.Conv2d(width, 1, 1, bias=False)  # a softmax does not change with a bias
        self.context = nn.Sequential(
            nn.Conv2d(width, width // 4, 1), group_norm(width // 4), nn.GELU(), nn.Conv2d(width // 4, width, 1)
        )
        self.join = conv_norm_act(width, width)

    def forward(self, features: Tensor) -> Tensor:
        weights = self.attention(features).flatten(2).softmax(2).view(-1, 1, *features.shape[2:])
        whole = (features * weights).sum((2, 3), keepdim=True)  # [N, C, 1, 1]
        return self.join(self.local(features) + self.context(whole))


class Frequency(nn.Module):
    """Find what differs in spectrum but not in colour, by a learned gain per channel and frequency band.

    The global filter of Rao et al. (NeurIPS 2021), with rings of equal frequency in place of a weight per bin, which
    makes it independent of H and W. Camouflage shows in frequencies: Zhong et al. (CVPR 2022).
    """

    BANDS = 8

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.bands = self.BANDS * scale
        self.enter = conv_norm_act(width, width)
        # From a gain of 1, so that weight decay leads to no filter.
        self.deviation = nn.Parameter(0.1 * torch.randn(width, self.bands))
        self.join = conv_norm_act(2 * width, width)

    def forward(self, features: Tensor) -> Tensor:
        features = self.enter(features)
        # cuFFT has half precision only for powers of two, and the CPU has none.
        with torch.autocast(features.device.type, enabled=False):
            wide = features.float()
            gain = torch.einsum("cb,bhw->chw", 1 + self.deviation.float(), self._rings(wide))
            filtered = torch.fft.irfft2(torch.fft.rfft2(wide, norm="ortho") * gain, s=wide.shape[-2:], norm="ortho")
        return self.join(torch.cat([features, filtered.to(features.dtype)], 1))

    def _rings(self, features: Tensor) -> Tensor:
        """Return [bands, H, W // 2 + 1]: each bin's share of each band; overlapping triangles that sum to one."""
        height, width = features.shape[-2:]
        vertical = torch.fft.fftfreq(height, device=features.device)
        horizontal = torch.fft.rfftfreq(width, device=features.device)
        radius = torch.hypot(vertical[:, None], horizontal) / 0.5**0.5  # 0 to 1
        centres = torch.linspace(0, 1, self.bands, device=features.device).view(-1, 1, 1)
        return (1 - (radius - centres).abs() * (self.bands - 1)).clamp(min=0)


class Edge(nn.Module):
    """Find outlines, by fixed Sobel and Laplace filters and a learned mix of their responses."""

    filters: Tensor

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.dilation = scale
        sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        laplace = torch.tensor([[1.0, 2.0, 1.0], [2.0, -12.0, 2.0], [1.0, 2.0, 1.0]]) / 16
        filters = torch.stack([sobel, sobel.T, laplace]).unsqueeze(1)  # [3, 1, 3, 3]
        self.register_buffer("filters", filters.repeat(width, 1, 1, 1), persistent=False)
        self.mix = conv_norm_act(3 * width, width)
        self.join = conv_norm_act(width, width, kernel=3)

    def forward(self, features: Tensor) -> Tensor:
        # Zeros would make an edge of the image's border.
        padded = _replicate_pad(_replicate_pad(features, self.dilation, dim=2), self.dilation, dim=3)
        filters = self.filters.to(features.dtype)
        responses = F.conv2d(padded, filters, dilation=self.dilation, groups=features.shape[1])
        return self.join(self.mix(responses))


class PyramidContext(nn.Module):
    """Describe the scene by means over grids of several sizes, as PSPNet does (Zhao et al., CVPR 2017)."""

    GRIDS = (1, 2, 3, 6)

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.grids = [grid * scale for grid in self.GRIDS]
        part = width // len(self.grids)
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(width, part, 1), nn.GELU()) for _ in self.grids)
        self.join = conv_norm_act(width + part * len(self.grids), width, kernel=3)

    def forward(self, features: Tensor) -> Tensor:
        maps = [features]
        for grid, branch in zip(self.grids, self.branches, strict=True):
            maps.append(_resized(branch(_adaptive_pool(features, (grid, grid))), features))
        return self.join(torch.cat(maps, 1))


class Contrast(nn.Module):
    """Find what stands out from its surroundings: centre minus surround, at several distances.

    As in the saliency model of Itti, Koch, Niebur (PAMI 1998): the fine scale minus a coarse one, interpolated.
    """

    DISTANCES = (2, 4, 8)

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.distances = [distance * scale for distance in self.DISTANCES]
        self.mix = conv_norm_act(len(self.distances) * width, width)
        self.join = conv_norm_act(width, width, kernel=3)

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        differences = []
        for distance in self.distances:
            surround = _adaptive_pool(features, (math.ceil(height / distance), math.ceil(width / distance)))
            differences.append(features - _resized(surround, features))
        return self.join(self.mix(torch.cat(differences, 1)))


KINDS = (Texture, Attention, LocalGlobal, Frequency, Edge, PyramidContext, Contrast)
_NAMES = ("texture", "attention", "local-global", "frequency", "edge", "pyramid", "contrast")


class Expert(nn.Module):
    """Apply one of `KINDS` and then a pixelwise MLP; return what to add to the features.

    A transformer block with the kind in place of attention (Yu et al., "MetaFormer", CVPR 2022). A gain per channel
    keeps the result small at first (LayerScale, Touvron et al., ICCV 2021).
    """

    def __init__(self, kind: nn.Module, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm = group_norm(width)
        self.think = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))
        self.gain = nn.Parameter(torch.full((width,), 0.1))  # one dimension, so no weight decay

    def forward(self, features: Tensor) -> Tensor:
        seen = self.kind(features)
        return self.gain.view(-1, 1, 1) * (seen + self.think(self.norm(features + seen)))


def create_experts(count: int, width: int) -> list[nn.Module]:
    """Create the first `count` kinds; after the last, the kinds again at the next scale (larger dilation, finer grids).

    The features have `width` channels, a multiple of 8.
    """
    return [Expert(KINDS[index % len(KINDS)](width, 1 + index // len(KINDS)), width) for index in range(count)]


def expert_names(count: int) -> list[str]:
    """Return the names of what `create_experts` creates: `texture, attention, ..., contrast, texture 2, ...`."""
    rounds = [divmod(index, len(_NAMES)) for index in range(count)]
    return [f"{_NAMES[kind]} {scale + 1}" if scale else _NAMES[kind] for scale, kind in rounds]


def _adaptive_pool(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average over a grid, as two matrix products.

    torch's adaptive pooling cannot be compiled for sizes that vary, and has no deterministic gradient on a GPU.
    """
    height, width = features.shape[-2:]
    return _cells(height, grid[0], features) @ features @ _cells(width, grid[1], features).T


def _cells(size: int, count: int, like: Tensor) -> Tensor:
    """Return [count, size]: the weight of each pixel of a line in the mean of each cell."""
    pixel = torch.arange(size, device=like.device)
    cell = torch.arange(count, device=like.device).unsqueeze(1)
    inside = (pixel * count < (cell + 1) * size) & ((pixel + 1) * count > cell * size)
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)


def _replicate_pad(features: Tensor, width: int, dim: int) -> Tensor:
    # torch's own replicating pad has no deterministic gradient on a GPU.
    first, last = features.narrow(dim, 0, 1), features.narrow(dim, features.shape[dim] - 1, 1)
    return torch.cat([first] * width + [features] + [last] * width, dim)


def _resized(features: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(features, like.shape[-2:], mode="bilinear", align_corners=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a norm over groups of 8 channels; with one each, a single pixel would become 0."""
    return nn.GroupNorm(max(1, channels // 8), channels)


def conv_norm_act(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    """Return convolution, group norm and GELU, keeping the size."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        group_norm(outputs),
        nn.GELU(),
    )


class Mixed(NamedTuple):
    """A mixture's result."""

    features: Tensor  # [N, C, H, W]
    balance: Tensor  # scalar
    usage: Tensor  # [experts], share of the images that chose each; sums to top_k; detached


class Mixture(nn.Module):
    """Add the weighted results of an image's `top_k` experts, each run once, to its features.

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

"""Seven kinds of experts: each looks for what the others cannot see, and returns what it would add to the features.

All keep [N, C, H, W], at any size down to one pixel. They normalise by groups, not over the batch: an expert runs on
those images only that chose it, maybe one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Texture(nn.Module):
    """Fine repeating structure: the same kernel size at growing dilations.

    As the receptive field block of Liu, Huang, Wang (ECCV 2018), which SINet (Fan et al., CVPR 2020) took to
    camouflaged objects.
    """

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(width, width // 2, 3, padding=dilation, dilation=dilation, bias=False)
            for dilation in (scale, 2 * scale, 3 * scale)
        )
        self.join = normalised(3 * (width // 2), width)

    def forward(self, features: Tensor) -> Tensor:
        return self.join(torch.cat([branch(features) for branch in self.branches], 1))


class Attention(nn.Module):
    """Far regions that look alike: every pixel asks a small grid of pooled tokens.

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
        self.project = normalised(width, width)

    def forward(self, features: Tensor) -> Tensor:
        features = self.norm(features + self.position(features))
        tokens = _pooled(features, (self.grid, self.grid))
        queries = self._heads(self.queries(features))  # [N, heads, C / heads, H * W]
        keys, values = (self._heads(part) for part in self.keys_values(tokens).chunk(2, 1))
        weights = (keys.transpose(2, 3) @ queries / keys.shape[2] ** 0.5).softmax(2)  # [N, heads, tokens, H * W]
        return self.project(features + (values @ weights).reshape(features.shape))

    def _heads(self, maps: Tensor) -> Tensor:
        count, channels = maps.shape[:2]
        return maps.reshape(count, self.HEADS, channels // self.HEADS, -1)


class LocalGlobal(nn.Module):
    """A detail in the light of the whole image: a local convolution, plus one context vector an image.

    The context is the attention-weighted mean of GCNet (Cao et al., ICCVW 2019).
    """

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.local = normalised(width, width, kernel=3, dilation=scale)
        self.attention = nn.Conv2d(width, 1, 1, bias=False)  # a softmax would not see it
        self.context = nn.Sequential(
            nn.Conv2d(width, width // 4, 1), group_norm(width // 4), nn.GELU(), nn.Conv2d(width // 4, width, 1)
        )
        self.join = normalised(width, width)

    def forward(self, features: Tensor) -> Tensor:
        weights = self.attention(features).flatten(2).softmax(2).view(-1, 1, *features.shape[2:])
        whole = (features * weights).sum((2, 3), keepdim=True)  # [N, C, 1, 1]
        return self.join(self.local(features) + self.context(whole))


class Frequency(nn.Module):
    """What differs in spectrum where it does not in colour: a learned gain per channel and band of frequencies.

    After the global filter of Rao et al. (NeurIPS 2021), but with rings of equal frequency in place of a weight per
    bin: independent of H and W. That camouflage shows in frequencies: Zhong et al. (CVPR 2022).
    """

    BANDS = 8

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.bands = self.BANDS * scale
        self.enter = normalised(width, width)
        self.deviation = nn.Parameter(0.1 * torch.randn(width, self.bands))  # from a gain of 1: decays to no filter
        self.join = normalised(2 * width, width)

    def forward(self, features: Tensor) -> Tensor:
        features = self.enter(features)
        # cuFFT knows half precision only for powers of two, and the CPU not at all.
        with torch.autocast(features.device.type, enabled=False):
            wide = features.float()
            gain = torch.einsum("cb,bhw->chw", 1 + self.deviation.float(), self._rings(wide))
            filtered = torch.fft.irfft2(torch.fft.rfft2(wide, norm="ortho") * gain, s=wide.shape[-2:], norm="ortho")
        return self.join(torch.cat([features, filtered.to(features.dtype)], 1))

    def _rings(self, features: Tensor) -> Tensor:
        """[bands, H, W // 2 + 1]: how much each bin belongs to each band; overlapping hats that sum to one."""
        height, width = features.shape[-2:]
        vertical = torch.fft.fftfreq(height, device=features.device)
        horizontal = torch.fft.rfftfreq(width, device=features.device)
        radius = torch.hypot(vertical[:, None], horizontal) / 0.5**0.5  # 0 to 1
        centres = torch.linspace(0, 1, self.bands, device=features.device).view(-1, 1, 1)
        return (1 - (radius - centres).abs() * (self.bands - 1)).clamp(min=0)


class Edge(nn.Module):
    """Outlines: fixed Sobel and Laplace filters, of which the learned part only mixes the answers."""

    filters: Tensor

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.reach = scale
        sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        laplace = torch.tensor([[1.0, 2.0, 1.0], [2.0, -12.0, 2.0], [1.0, 2.0, 1.0]]) / 16
        filters = torch.stack([sobel, sobel.T, laplace]).unsqueeze(1)  # [3, 1, 3, 3]
        self.register_buffer("filters", filters.repeat(width, 1, 1, 1), persistent=False)
        self.mix = normalised(3 * width, width)
        self.join = normalised(width, width, kernel=3)

    def forward(self, features: Tensor) -> Tensor:
        # Replicated, for zeros would make an edge of the image's border.
        padded = _extended(_extended(features, self.reach, dim=2), self.reach, dim=3)
        filters = self.filters.to(features.dtype)
        answers = F.conv2d(padded, filters, dilation=self.reach, groups=features.shape[1])
        return self.join(self.mix(answers))


class PyramidContext(nn.Module):
    """What kind of scene this is: means over grids of several sizes, as in PSPNet (Zhao et al., CVPR 2017)."""

    GRIDS = (1, 2, 3, 6)

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.grids = [grid * scale for grid in self.GRIDS]
        part = width // len(self.grids)
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(width, part, 1), nn.GELU()) for _ in self.grids)
        self.join = normalised(width + part * len(self.grids), width, kernel=3)

    def forward(self, features: Tensor) -> Tensor:
        maps = [features]
        for grid, branch in zip(self.grids, self.branches, strict=True):
            maps.append(_resized(branch(_pooled(features, (grid, grid))), features))
        return self.join(torch.cat(maps, 1))


class Contrast(nn.Module):
    """What stands out from its surroundings: centre minus surround, at several distances.

    As in the saliency model of Itti, Koch, Niebur (PAMI 1998): the fine scale minus a coarse one, interpolated.
    """

    DISTANCES = (2, 4, 8)

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.distances = [distance * scale for distance in self.DISTANCES]
        self.mix = normalised(len(self.distances) * width, width)
        self.join = normalised(width, width, kernel=3)

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        differences = []
        for distance in self.distances:
            surround = _pooled(features, (math.ceil(height / distance), math.ceil(width / distance)))
            differences.append(features - _resized(surround, features))
        return self.join(self.mix(torch.cat(differences, 1)))


KINDS = (Texture, Attention, LocalGlobal, Frequency, Edge, PyramidContext, Contrast)
_NAMES = ("texture", "attention", "local-global", "frequency", "edge", "pyramid", "contrast")


class Expert(nn.Module):
    """A kind's answer, thought over pixel by pixel: returns what to add to the features.

    The two halves of a transformer's block, with the kind in place of attention (Yu et al., "MetaFormer", CVPR 2022).
    A gain per channel keeps the answer small at first (LayerScale, Touvron et al., ICCV 2021).
    """

    def __init__(self, kind: nn.Module, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm = group_norm(width)
        self.think = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))
        self.gain = nn.Parameter(torch.full((width,), 0.1))  # of one dimension: optimizers' groups spare it the decay

    def forward(self, features: Tensor) -> Tensor:
        seen = self.kind(features)
        return self.gain.view(-1, 1, 1) * (seen + self.think(self.norm(features + seen)))


def create_experts(count: int, width: int) -> list[nn.Module]:
    """The first `count` kinds; after the last, the kinds again at the next scale (wider reach, finer grids).

    Args:
        count: how many.
        width: channels of the features; a multiple of 8.
    """
    return [Expert(KINDS[index % len(KINDS)](width, 1 + index // len(KINDS)), width) for index in range(count)]


def expert_names(count: int) -> list[str]:
    """What `create_experts` creates, for logs: `texture, attention, ..., contrast, texture 2, ...`."""
    rounds = [(_NAMES[index % len(_NAMES)], 1 + index // len(_NAMES)) for index in range(count)]
    return [name if scale == 1 else f"{name} {scale}" for name, scale in rounds]


def _pooled(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means over a grid; where that is finer than the features, pixels are repeated.

    The adaptive pooling of torch, as two products: that one cannot be compiled for sizes that vary, and on a GPU has
    no deterministic gradient.
    """
    height, width = features.shape[-2:]
    return _cells(height, grid[0], features) @ features @ _cells(width, grid[1], features).T


def _cells(size: int, count: int, like: Tensor) -> Tensor:
    """[count, size]: the weight of every pixel of a line in the mean of every cell; cells overlap if they must."""
    pixel = torch.arange(size, device=like.device)
    cell = torch.arange(count, device=like.device).unsqueeze(1)
    inside = (pixel * count < (cell + 1) * size) & ((pixel + 1) * count > cell * size)
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)


def _extended(features: Tensor, reach: int, dim: int) -> Tensor:
    """Repeats the outermost pixels; as torch's replicating pad, whose gradient is not deterministic on a GPU."""
    first, last = features.narrow(dim, 0, 1), features.narrow(dim, features.shape[dim] - 1, 1)
    return torch.cat([first] * reach + [features] + [last] * reach, dim)


def _resized(features: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(features, like.shape[-2:], mode="bilinear", align_corners=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of 8 channels: of one, a single pixel would be normalised to nothing."""
    return nn.GroupNorm(max(1, channels // 8), channels)


def normalised(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, group norm, GELU; keeps the size."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        group_norm(outputs),
        nn.GELU(),
    )

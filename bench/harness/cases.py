"""The cases that are measured: lists of tensor shapes, synthetic or of real nets, and models that have them.

A case holds parameters only: peers treat buffers differently (copy, average or ignore them), so with buffers they would
not do the same work. Nothing is downloaded; a net's shapes are written down from its definition, or read from a
library's model on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class Unavailable(Exception):
    """Raised where a case or a peer cannot be measured here; tables show the message in its place."""


@dataclass(frozen=True)
class Case:
    """A list of parameters and the dtypes of both sides.

    Args:
        name: as the table shows it.
        shapes: one a tensor, in the model's order.
        shadow_dtype, live_dtype: of the average and of the model.
    """

    name: str
    shapes: tuple[Shape, ...]
    shadow_dtype: torch.dtype = torch.float32
    live_dtype: torch.dtype = torch.float32

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def decay(self) -> float:
        """Return 0.999; for 16-bit averages 0.9, because rounding loses updates at 0.99 and FastEMA refuses it."""
        return 0.9 if self.shadow_dtype.itemsize == 2 else 0.999

    @property
    def live_bytes(self) -> int:
        return self.params * self.live_dtype.itemsize

    @property
    def shadow_bytes(self) -> int:
        return self.params * self.shadow_dtype.itemsize

    @property
    def update_bytes(self) -> int:
        """Return the least bytes an update moves: the shadow read and written once, the live weights read once."""
        return 2 * self.shadow_bytes + self.live_bytes

    def with_shapes(self, shapes: Iterable[Shape]) -> Case:
        """Return a case of the same dtypes with other tensors."""
        return replace(self, shapes=tuple(shapes))


class _Leaf(nn.Module):
    """A weight and a bias, as in most leaf modules of real nets."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        for name, tensor in zip(("weight", "bias"), tensors, strict=False):
            self.register_parameter(name, nn.Parameter(tensor))


def build_model(case: Case, device: torch.device, seed: int = 0) -> nn.Module:
    """Return a model with the case's parameters, each in a storage of its own.

    Two parameters a leaf module, as in real nets: with one flat list `AveragedModel`, which walks the modules, would
    take a third less time.
    """
    # One random block, repeated: drawing 64 M normal numbers would take longer than measuring.
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(1 << 20, generator=generator).to(device, case.live_dtype)
    tensors = [_filled(shape, block) for shape in case.shapes]
    return nn.Sequential(*(_Leaf(tensors[index : index + 2]) for index in range(0, len(tensors), 2)))


def _filled(shape: Shape, block: Tensor) -> Tensor:
    tensor = torch.empty(shape, dtype=block.dtype, device=block.device)
    for piece in tensor.view(-1).split(block.numel()):
        piece.copy_(block[: piece.numel()])
    return tensor


# ---- synthetic lists ----


def small_tensors() -> Case:
    """Return 1,000 tensors of 256 floats: an update moves little and visits many tensors."""
    return Case("1,000 x 256", ((256,),) * 1000)


def one_element_tensors() -> Case:
    """Return 600 tensors of one element: an update moves 7 kB, so its time is its host part."""
    return Case("600 x 1", ((1,),) * 600)


def one_large_tensor() -> Case:
    """Return 25 M floats in one tensor, the size of ResNet-50: memory bandwidth alone bounds an update."""
    return Case("25 M in one", ((25_000_000,),))


def mixed_one_tensor() -> Case:
    """Return 64 M bfloat16 weights in one tensor, averaged in float32."""
    return Case("64 M in one, f32 <- bf16", ((64_000_000,),), torch.float32, torch.bfloat16)


def mixed_list() -> Case:
    """Return the same 64 M as 64 matrices: temporaries take 4 MB instead of 256 MB."""
    return Case("64 x 1 M, f32 <- bf16", ((1000, 1000),) * 64, torch.float32, torch.bfloat16)


def half_list() -> Case:
    """Return the same 64 matrices, averaged in bfloat16."""
    return Case("64 x 1 M, bf16 <- bf16", ((1000, 1000),) * 64, torch.bfloat16, torch.bfloat16)


def ladder(tensors: int, elements: int) -> Case:
    """Return equal tensors of float32, one point of `bench.scale`."""
    return Case(f"{tensors:,} x {elements:,}", ((elements,),) * tensors)


# ---- real nets ----

#: The nets of the tables, 18 to 86 M parameters.
RESNET50, EDGENEXT, SEGMENTATION, VIT_B = "ResNet-50", "EdgeNeXt-base", "746 tensors, 31 M", "ViT-B/16"
REAL_NETS = (RESNET50, EDGENEXT, SEGMENTATION, VIT_B)


def resnet50() -> Case:
    """Return ResNet-50's 161 parameters (25,557,032), written down from its definition."""
    shapes: list[Shape] = []

    def convolution(inputs: int, outputs: int, kernel: int) -> None:
        # A convolution without a bias and its normalisation.
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


def resnet50_bf16() -> Case:
    """Return the same in bfloat16, averaged in float32."""
    return replace(resnet50(), name=f"{RESNET50}, f32 <- bf16", live_dtype=torch.bfloat16)


def vit_b() -> Case:
    """Return ViT-B/16's 152 parameters (86,567,656)."""
    return _vit(VIT_B, width=768, depth=12, patch=16)


def vit_b_bf16() -> Case:
    """Return the same in bfloat16, averaged in float32, as large nets are trained."""
    return replace(vit_b(), name=f"{VIT_B}, f32 <- bf16", live_dtype=torch.bfloat16)


def vit_h() -> Case:
    """Return ViT-H/14's 392 parameters (632,045,800)."""
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
    """Return as many of Llama-7B's 32 layers as fit, in bfloat16, averaged in float32.

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
    """Return EdgeNeXt-base's 214 parameters (18.5 M, classifier included), from timm.

    Raises:
        Unavailable: timm is not installed, or does not load.
    """
    timm = import_timm()
    with torch.device("meta"):
        return _case_of(EDGENEXT, timm.create_model("edgenext_base", pretrained=False))


def sd15_unet() -> Case:
    """Return the 686 parameters (859.5 M) of Stable Diffusion 1.5's UNet, from diffusers.

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
    """Return 746 tensors like a segmentation net with experts: 514 of at most 1,024 elements, 9 of 1 M and more.

    An approximation: the counts, the size classes and the total of 31 M are that net's; sizes within a class are spaced
    evenly on a logarithmic scale, and the classes are interleaved as layers interleave them.
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
    """Return the sizes reordered: every `step`-th, from each start."""
    return [size for start in range(step) for size in sizes[start::step]]


def _case_of(name: str, model: nn.Module) -> Case:
    return Case(name, tuple(tuple(parameter.shape) for parameter in model.parameters()))


# ---- packages that may be missing ----


def make_torchvision_work() -> None:
    """Make torchvision importable beside a CPU-only torch, because several packages import it where it is installed.

    Raises:
        Unavailable: torchvision is broken in another way.
    """
    try:
        import fastema.segmentation.torchvision_shim  # noqa: F401
    except ImportError:
        pass  # not installed: then nobody imports it
    except RuntimeError as error:
        raise Unavailable(f"torchvision does not load ({error})") from None


def import_timm() -> Any:
    """Import timm, also beside a CPU-only torch.

    Raises:
        Unavailable: it is not installed, or does not load.
    """
    make_torchvision_work()
    try:
        import timm
        import timm.utils
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from None
    except RuntimeError as error:
        raise Unavailable(f"does not load ({error})") from None
    return timm

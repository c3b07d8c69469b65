"""What is measured: lists of tensor shapes, and models made of them. Nothing is downloaded.

Cases hold parameters only. Peers disagree about buffers (copied, averaged, ignored), so with buffers they would not do
the same work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class Unavailable(Exception):
    """Why a case or a peer cannot be measured here; shown in its place."""


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
    def live_bytes(self) -> int:
        return self.params * self.live_dtype.itemsize

    @property
    def shadow_bytes(self) -> int:
        return self.params * self.shadow_dtype.itemsize

    @property
    def update_bytes(self) -> int:
        """The floor of an update: the shadow read and written once, the live weights read once."""
        return 2 * self.shadow_bytes + self.live_bytes

    def with_shapes(self, shapes: Iterable[Shape]) -> Case:
        """The same dtypes over other tensors."""
        return replace(self, shapes=tuple(shapes))


class _Leaf(nn.Module):
    """As most leaves of real nets: a weight and a bias."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        for name, tensor in zip(("weight", "bias"), tensors, strict=False):
            self.register_parameter(name, nn.Parameter(tensor))


def build_model(case: Case, device: torch.device, seed: int = 0) -> nn.Module:
    """A model that has the case's parameters, two a leaf module, each in memory of its own.

    Two a leaf, as in real nets: in one flat list `AveragedModel`, which walks the modules, would take a third less.
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
    """1,000 tensors of 256 floats: what an update costs where there is next to nothing to move."""
    return Case("1,000 x 256", ((256,),) * 1000)


def one_element_tensors() -> Case:
    """600 tensors of one element: 7 kB to move, so that an update is its host part and nothing else."""
    return Case("600 x 1", ((1,),) * 600)


def one_large_tensor() -> Case:
    """25 M floats in one tensor, the size of ResNet-50: what an update costs where memory is all there is."""
    return Case("25 M in one", ((25_000_000,),))


def mixed_one_tensor(live_dtype: torch.dtype = torch.bfloat16) -> Case:
    """64 M 16-bit weights in one tensor, averaged in float32."""
    return Case(f"64 M in one, f32 <- {_short(live_dtype)}", ((64_000_000,),), torch.float32, live_dtype)


def mixed_list(live_dtype: torch.dtype = torch.bfloat16) -> Case:
    """The same 64 M as 64 matrices: temporaries of 4 MB instead of 256 MB, which is kinder to torch's ways."""
    return Case(f"64 x 1 M, f32 <- {_short(live_dtype)}", ((1000, 1000),) * 64, torch.float32, live_dtype)


def validation_list() -> Case:
    """25 M floats in 1,000 tensors: what has to change places for a validation."""
    return Case("1,000 x 25,000", ((25_000,),) * 1000)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]


# ---- real nets ----

REAL_NET_NAMES = ("ResNet-50", "EdgeNeXt-base", "746 tensors, 31 M")


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
    return Case(REAL_NET_NAMES[0], tuple(shapes))


def edgenext_base() -> Case:
    """EdgeNeXt-base's 214 parameters (18.5 M, classifier included), from timm, without their memory.

    Raises:
        Unavailable: timm is not installed, or does not load.
    """
    timm = import_timm()
    with torch.device("meta"):
        model = timm.create_model("edgenext_base", pretrained=False)
    return Case(REAL_NET_NAMES[1], tuple(tuple(parameter.shape) for parameter in model.parameters()))


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
    return Case(REAL_NET_NAMES[2], tuple((size,) for _, size in sorted(placed)))


def _strided(sizes: list[int], step: int) -> list[int]:
    """All sizes in another order: every `step`-th, from each start."""
    return [size for start in range(step) for size in sizes[start::step]]


REAL_NETS: tuple[Callable[[], Case], ...] = (resnet50, edgenext_base, segmentation_list)


def import_timm():  # type: ignore[no-untyped-def]  # a module of a package that may be missing
    """timm, also next to a CPU-only torch, whose torchvision needs help (see `torchvision_shim`).

    Raises:
        Unavailable: it is not installed, or does not load.
    """
    try:
        from fastema.segmentation.torchvision_shim import import_torchvision

        import_torchvision()
        import timm
        import timm.utils
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from None
    except RuntimeError as error:
        raise Unavailable(f"does not load ({error})") from None
    return timm

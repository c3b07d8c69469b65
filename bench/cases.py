"""What is measured: lists of tensor shapes, and models made of them. Synthetic lists here, real nets in `nets`.

Cases hold parameters only. Peers disagree about buffers (copied, averaged, ignored), so with buffers they would not do
the same work.
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
    def decay(self) -> float:
        """0.999; of 16-bit averages 0.9, since at 0.99 they stand still, and FastEMA refuses them."""
        return 0.9 if self.shadow_dtype.itemsize == 2 else 0.999

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


def mixed_one_tensor() -> Case:
    """64 M 16-bit weights in one tensor, averaged in float32."""
    return Case("64 M in one, f32 <- bf16", ((64_000_000,),), torch.float32, torch.bfloat16)


def mixed_list() -> Case:
    """The same 64 M as 64 matrices: temporaries of 4 MB instead of 256 MB, which is kinder to torch's ways."""
    return Case("64 x 1 M, f32 <- bf16", ((1000, 1000),) * 64, torch.float32, torch.bfloat16)


def half_list() -> Case:
    """The same 64 matrices, averaged in 16 bits."""
    return Case("64 x 1 M, bf16 <- bf16", ((1000, 1000),) * 64, torch.bfloat16, torch.bfloat16)


def ladder(tensors: int, elements: int) -> Case:
    """Equal tensors of float32, a rung of `bench.scale`."""
    return Case(f"{tensors:,} x {elements:,}", ((elements,),) * tensors)


# ---- packages that may be missing ----


def make_torchvision_work() -> None:
    """Several packages import it where it is installed, and next to a CPU-only torch it does not load by itself.

    Raises:
        Unavailable: torchvision is broken in another way.
    """
    from fastema.segmentation.torchvision_shim import import_torchvision

    try:
        import_torchvision()
    except ImportError:
        pass  # not installed: then nobody imports it
    except RuntimeError as error:
        raise Unavailable(f"torchvision does not load ({error})") from None


def import_timm() -> Any:
    """timm, also next to a CPU-only torch.

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

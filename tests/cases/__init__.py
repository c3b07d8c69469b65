"""The test matrix as data, and the small models and comparisons that several rooms use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: (shadow, live)
DTYPE_PAIRS = tuple((shadow, live) for shadow in FLOATS for live in FLOATS)
#: Around the widths of vectors, the smallest and the largest chunk.
SIZES = (0, 1, 3, 4, 5, 15, 16, 17, 1023, 1024, 1025, 4095, 4096, 4097, 16383, 16384, 16385)
#: In elements: 1, 2 and 3 leave no vector aligned.
OFFSETS = (0, 1, 2, 3)
#: 0 keeps, 1 copies; from 0.5 on the rule is computed from the live end.
WEIGHTS = (0.0, 1e-12, 1e-4, 0.1, 0.4999999, 0.5, 0.75, 0.999, 1.0)
COPIED_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

#: Name -> a tensor of this layout with room for any dtype.
LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "contiguous": lambda dtype: values(6, 35, dtype=dtype),
    "transposed": lambda dtype: values(7, 9, dtype=dtype).t(),
    "permuted": lambda dtype: values(2, 3, 5, 7, dtype=dtype).permute(3, 0, 2, 1),
    "channels_last": lambda dtype: values(4, 3, 5, 7, dtype=dtype).to(memory_format=torch.channels_last),
    "columns": lambda dtype: values(5, 11, dtype=dtype)[:, 3:8],
    "every_other": lambda dtype: values(31, dtype=dtype)[::2],
    "rows_at_odd_offset": lambda dtype: values(5, 7, dtype=dtype)[1:4],
    "zero_dim": lambda dtype: values(1, dtype=dtype)[0],
    "empty": lambda dtype: values(0, 4, dtype=dtype),
    "one_element": lambda dtype: values(1, 1, dtype=dtype),
    "odd": lambda dtype: values(1021, dtype=dtype),
}


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers over four orders of magnitude, positive and negative."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    scale = torch.randint(-2, 3, shape, generator=generator, device="cpu").double()
    numbers = numbers * 10.0**scale
    if dtype.is_complex:
        imaginary = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return torch.complex(numbers, imaginary).to(torch.get_default_device(), dtype)
    if dtype == torch.bool:
        return (numbers > 0).to(torch.get_default_device())
    return numbers.to(torch.get_default_device(), dtype)


def with_offset(tensor: Tensor, offset: int) -> Tensor:
    """Return a copy of `tensor`, `offset` elements into a larger storage with sentinels on both sides."""
    larger = torch.full((tensor.numel() + offset + 19,), 77).to(tensor.dtype)
    part = larger[offset : offset + tensor.numel()]
    part.copy_(tensor)
    return part


def as_applied(average: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a swap puts into a model of `dtype`: of a float32 average the nearest bfloat16, ties away from zero.

    A cast takes ties to even.
    """
    if (average.dtype, dtype) != (torch.float32, torch.bfloat16):
        return average.to(dtype)
    bits = average.contiguous().view(torch.int32)
    is_tie = (bits & 0xFFFF) == 0x8000
    return torch.where(is_tie, (bits + 1).view(torch.float32), average).to(dtype)  # one bit further from zero


def move(tensors: Iterable[Tensor], seed: int) -> None:
    """Change every tensor once, in place, as a training step does."""
    seen: set[int] = set()
    with torch.no_grad():
        for tensor in tensors:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if tensor.dtype == torch.bool:
                tensor.logical_not_()
            elif tensor.is_floating_point() or tensor.is_complex():
                tensor.mul_(0.9).add_(values(*tensor.shape, dtype=tensor.dtype, seed=seed + len(seen)), alpha=0.25)
            else:
                tensor.add_(1)


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def train(model: nn.Module, seed: int = 1) -> None:
    """One step of `move` for all of a model."""
    move(tensors_of(model), seed)


def raw(tensor: Tensor) -> bytes:
    """The bits of a tensor's elements."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.numel() == 0:
        return b""
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).cpu().numpy().tobytes()


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer, bit for bit."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: raw(tensor) for name, tensor in named}


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Linear and convolution-free batch norm: parameters, running statistics and an integer counter."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).to(dtype)


class Recorder(TorchDispatchMode):
    """Notes the name of every torch operation that runs inside it, less the ignored ones."""

    def __init__(self, *ignored: Any) -> None:
        super().__init__()
        self.ignored = ignored
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.ignored:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class AliveBytes(TorchDispatchMode):
    """Counts the most bytes that the results of torch operations held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {each.untyped_storage()._cdata for each in args if isinstance(each, Tensor)}
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage()._cdata not in before:
            storage = result.untyped_storage()
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._storages.values()))
        return result

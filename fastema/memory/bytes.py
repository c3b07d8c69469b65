"""Bytes of storages: views of them, new ones, and the bytes that tensors cover."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def flat(storage: torch.UntypedStorage, begin: int, end: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return bytes [begin, end) of `storage` as a 1-D tensor."""
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    return tensor.set_(storage, begin // dtype.itemsize, ((end - begin) // dtype.itemsize,), (1,))


def whole(storage: torch.UntypedStorage) -> Tensor:
    """Return all bytes of `storage` as a 1-D tensor."""
    return flat(storage, 0, storage.nbytes())


def view_in(storage: torch.UntypedStorage, like: Tensor, dtype: torch.dtype, offset: Any) -> Tensor:
    """Return a tensor of the shape and strides of `like` that begins `offset` elements into `storage`."""
    view = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, like.shape, like.stride())
    view = view.conj() if like.is_conj() else view  # flags beside the memory
    return torch._neg_view(view) if like.is_neg() else view


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key of the tensor's memory, dtype and layout: equal for every alias."""
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def allocate(nbytes: int, device: torch.device, like: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return new memory that can take the place of `like`'s."""
    # What takes the place of pinned memory must be pinned: offloaded parameters are copied to the GPU meanwhile.
    pin = device.type == "cpu" == like.device.type and whole(like).is_pinned()  # a storage's own method warns in 2.10
    return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pin).untyped_storage()


# ---- which bytes tensors cover ----


@dataclass(frozen=True)
class Run:
    """Bytes [begin, end) of a storage, seen as elements of `dtype`, averaged or copied."""

    begin: int
    end: int
    dtype: torch.dtype
    copy: bool


def element_runs(tensor: Tensor) -> list[tuple[int, int]]:
    """Return the elements [begin, end) of its storage that `tensor` covers, ascending.

    Raises:
        ValueError: two indices of the tensor share an element (it was expanded).
    """
    if tensor.numel() == 0:
        return []
    dense = span = 1  # elements that lie together; elements from first to last
    outer: list[tuple[int, int]] = []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride < span:
            raise ValueError(
                f"has overlapping elements (shape {tuple(tensor.shape)}, strides {tensor.stride()}): it was expanded; "
                "make it contiguous()"
            )
        if not outer and stride == dense:
            dense *= size
        else:
            outer.append((stride, size))
        span += stride * (size - 1)
    begins = torch.tensor([tensor.storage_offset()], device="cpu")
    for stride, size in outer:
        begins = (begins[:, None] + stride * torch.arange(size, device="cpu")).flatten()
    return [(begin, begin + dense) for begin in begins.sort().values.tolist()]


def merged(runs: Iterable[Run]) -> list[Run]:
    """Return the union of runs of one rule, ascending and disjoint; neighbours of one dtype become one run.

    Raises:
        ValueError: tensors of different dtypes overlap.
    """
    result: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.begin, run.end)):
        last = result[-1] if result else None
        if last is None or run.begin > last.end or (run.begin == last.end and run.dtype != last.dtype):
            result.append(run)
        elif run.dtype != last.dtype:
            raise ValueError(
                f"shares memory as {run.dtype} with a tensor that is {last.dtype}: average only one of them"
            )
        elif run.end > last.end:
            result[-1] = Run(last.begin, run.end, run.dtype, run.copy)
    return result


def without(runs: Iterable[Run], taken: list[Run]) -> list[Run]:
    """Return `runs` minus the bytes of `taken`; both are merged()."""
    result: list[Run] = []
    for run in runs:
        begin = run.begin
        for other in taken:
            if other.end <= begin or other.begin >= run.end:
                continue
            if other.begin > begin:
                result.append(Run(begin, other.begin, run.dtype, run.copy))
            begin = max(begin, other.end)
        if begin < run.end:
            result.append(Run(begin, run.end, run.dtype, run.copy))
    return result


def gaps(runs: Iterable[Run], nbytes: int) -> list[tuple[int, int]]:
    """Return the bytes [begin, end) of a storage of `nbytes` that no run covers; `runs` are disjoint."""
    result, position = [], 0
    for run in sorted(runs, key=lambda run: run.begin):
        if run.begin > position:
            result.append((position, run.begin))
        position = run.end
    if position < nbytes:
        result.append((position, nbytes))
    return result

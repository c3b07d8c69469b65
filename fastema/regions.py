"""Which parts of a storage the managed tensors cover: disjoint runs of elements, and the rest.

Tied and overlapping tensors are covered once; a transposed or channels_last tensor is one run like any other; only a
tensor with gaps (a slice of columns) falls into several.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Bytes [begin, end) of a storage, seen as elements of `dtype`, averaged or copied."""

    begin: int
    end: int
    dtype: torch.dtype
    copy: bool


def element_runs(tensor: Tensor) -> list[tuple[int, int]]:
    """The elements [begin, end) of its storage that `tensor` covers, ascending.

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
    """The union of runs of one rule, ascending and disjoint; neighbours of one dtype become one run.

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
    """`runs` minus the bytes of `taken`; both are merged()."""
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
    """The bytes [begin, end) of a storage of `nbytes` that no run covers; `runs` are disjoint."""
    result, position = [], 0
    for run in sorted(runs, key=lambda run: run.begin):
        if run.begin > position:
            result.append((position, run.begin))
        position = run.end
    if position < nbytes:
        result.append((position, nbytes))
    return result

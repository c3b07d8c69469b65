"""A tensor of the averaged module and the live one in the same position."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastema.core.tensors import why_no_storage


class UseTorchFallback(Exception):
    """Signal that torch's own update must run: it gives the result, or the error."""


@dataclass(frozen=True)
class Pair:
    """A tensor of the averaged module and the live one in the same position."""

    averaged: Tensor
    live: Tensor
    copy: bool  # at every update, rather than averaged

    @property
    def is_regular(self) -> bool:
        tensors = (self.averaged, self.live)
        return self.averaged.shape == self.live.shape and not any(why_no_storage(tensor) for tensor in tensors)


def pairs_of(averaged: nn.Module, model: nn.Module, use_buffers: bool) -> tuple[list[Pair], tuple[int, int]]:
    """Return the pairs of an AveragedModel and a live model, as torch zips them: surplus tensors are left out.

    Returns:
        The pairs, and how many tensors the two sides have.

    Raises:
        UseTorchFallback: the numbers of buffers differ, which torch itself reports.
    """
    module: nn.Module = averaged.module  # type: ignore[assignment]
    buffers, live_buffers = list(module.buffers()), list(model.buffers())
    if use_buffers:
        ours, theirs = [*module.parameters(), *buffers], [*model.parameters(), *live_buffers]
        copied = []
    else:
        ours, theirs = list(averaged.parameters()), list(model.parameters())
        if len(buffers) != len(live_buffers):
            raise UseTorchFallback
        copied = [Pair(a, b, copy=True) for a, b in zip(buffers, live_buffers, strict=True)]
    pairs = [Pair(a, b, copy=not (a.is_floating_point() or a.is_complex())) for a, b in zip(ours, theirs, strict=False)]
    return pairs + copied, (len(ours) + len(copied), len(theirs) + len(copied))


def strides(tensor: Tensor) -> list[int]:
    """Return the strides of the dimensions longer than 1, which say where elements are."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def span(tensor: Tensor) -> tuple[str, int, int]:
    """Return the tensor's bytes [begin, end)."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return str(tensor.device), begin, begin
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return str(tensor.device), begin, begin + (last + 1) * tensor.dtype.itemsize

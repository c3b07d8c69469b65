"""The swap of an averaged module and the live model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastema.core.buffers import SwapBuffer
from fastema.core.given_pairs import Pair, span, strides
from fastema.core.swap import Swap, exchange_of
from fastema.core.tensors import why_no_storage
from fastema.memory.bytes import Run, allocate, element_runs, flat, gaps, merged, view_in

_OWNER = "another AveragedModel is swapped into the same model: leave that block first"
_DROPPED = (
    "an AveragedModel was deleted while it was swapped into a model: the model keeps the averaged weights, and the "
    "trained ones are lost. Leave the swapped() block first"
)


def swap_of(pairs: list[Pair], names: dict[int, list[str]], host: Any, modules: Iterable[nn.Module]) -> Swap:
    """Return the swap of averaged and live tensors.

    Where two storages differ (dtype, device, or live weights that are slices of one buffer), the average is copied into
    scratch memory of the live layout, which is swapped in.

    Args:
        pairs: of all tensors.
        names: of the live tensors, by id.
        host: the backend whose `StorageExchange` to use.
        modules: of the live model.

    Raises:
        ValueError: a tensor has no storage of its own, or shapes differ.
    """
    for pair in pairs:
        for tensor in (pair.averaged, pair.live):
            reason = why_no_storage(tensor)
            if reason is not None:
                raise ValueError(f"swapped(): a tensor {reason}")
        if pair.averaged.shape != pair.live.shape:
            shapes = f"{tuple(pair.averaged.shape)} and {tuple(pair.live.shape)}"
            raise ValueError(f"swapped() needs the model that is averaged: two tensors have shapes {shapes}")
    groups: dict[int, list[Pair]] = {}
    for pair in pairs:
        if pair.averaged.numel() and span(pair.averaged) != span(pair.live):
            groups.setdefault(pair.live.untyped_storage()._cdata, []).append(pair)
    with torch.inference_mode(False), torch.no_grad():
        buffers = _buffers_of(groups)
        versioned = [tensor for pair in pairs for tensor in (pair.averaged, pair.live)]
        exchange = exchange_of(buffers, versioned, host)
        tensors = [(names.get(id(pair.live), []), pair.live, pair.copy) for group in groups.values() for pair in group]
        swap = Swap(_OWNER, _DROPPED, tensors, exchange, buffers, modules)
        for buffer in buffers:
            buffer.free()
    return swap


def _buffers_of(groups: dict[int, list[Pair]]) -> list[SwapBuffer]:
    """Return the buffer to swap with each live storage: the averaged one, or scratch memory."""
    owners: dict[int, set[int]] = {}  # averaged storage -> live storages that use it
    for key, pairs in groups.items():
        for pair in pairs:
            owners.setdefault(pair.averaged.untyped_storage()._cdata, set()).add(key)
    buffers = []
    for pairs in groups.values():
        live = pairs[0].live.untyped_storage()
        other = pairs[0].averaged.untyped_storage()
        rest = _unmanaged(pairs, live)
        is_direct = (
            not rest
            and other.nbytes() == live.nbytes()
            and other.device == live.device
            and len(owners[other._cdata]) == 1
            and other._cdata not in groups
            and all(_is_same_place(pair, other) for pair in pairs)
        )
        if is_direct:
            buffers.append(SwapBuffer(live, other, [], [], [], 0))
            continue
        memory = allocate(live.nbytes(), live.device, live)
        casts = [
            (view_in(memory, pair.live, pair.live.dtype, pair.live.storage_offset()), pair.averaged.detach())
            for pair in pairs
        ]
        buffers.append(SwapBuffer(live, memory, [(flat(memory, *gap), flat(live, *gap)) for gap in rest], casts, [], 0))
    return buffers


def _unmanaged(pairs: Iterable[Pair], live: torch.UntypedStorage) -> list[tuple[int, int]]:
    """Return the bytes of a live storage outside all pairs."""
    runs = []
    for tensor in (pair.live for pair in pairs):
        size = tensor.dtype.itemsize
        try:
            runs += [Run(begin * size, end * size, torch.uint8, True) for begin, end in element_runs(tensor)]
        except ValueError as error:
            raise ValueError(f"swapped(): a tensor {error}") from None
    return gaps(merged(runs), live.nbytes())


def _is_same_place(pair: Pair, other: torch.UntypedStorage) -> bool:
    a, b = pair.averaged, pair.live
    return (
        a.untyped_storage()._cdata == other._cdata
        and (a.dtype, a.storage_offset(), strides(a)) == (b.dtype, b.storage_offset(), strides(b))
        and (a.is_conj(), a.is_neg()) == (b.is_conj(), b.is_neg())
    )

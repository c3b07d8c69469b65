"""One storage of a model and its shadows, which hold the averages of the tensors on it.

A shadow has the layout of the live storage (wider, if its dtype is), so tied and overlapping tensors are averaged once
and a transposed or channels_last tensor needs no special case. Where these tensors span less than half of the
storage, the shadow holds that span alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastema.backends import contract
from fastema.backends.contract import Segment
from fastema.backends.exchange import ContentsExchange
from fastema.core import offload
from fastema.core.pairs import Pair
from fastema.core.swap import Swap, SwapBuffer, exchange_of
from fastema.memory.bytes import Run, allocate, element_runs, flat, gaps, merged, view_in, whole, without

_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
_COMPLEX = {torch.float64: torch.complex128}
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}
_ALIGNMENT = 64  # bytes: a span begins at a multiple, so that live and shadow are aligned alike


_OWNER = "another FastEMA is applied to the same model: the live weights are its average now; restore() that one first"
_DROPPED = (
    "a FastEMA was deleted while its weights were applied: the model keeps the averaged weights, and the trained ones "
    "are lost. Call restore() first; or copy_to(), if that is intended"
)


def shadow_dtype(live: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the average of a `live` tensor: `wanted`, else float32 for 16-bit weights, else the same."""
    if wanted is None:
        return _WIDER.get(live, live)
    return _COMPLEX.get(wanted, torch.complex64) if live.is_complex else wanted


def _real(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a kernel averages: complex numbers are pairs of real ones."""
    return _REAL.get(dtype, dtype)


class ShadowStorage:
    """A live storage and its shadows, all of the same layout.

    The float32 average of a bfloat16 storage on the same device is kept in two planes (`fastema.memory.planes`): the
    shadow is the high one, a bfloat16 that can take the place of the weights, and the low one lies beside it.

    A shadow is two storages over one memory: `memory`, for the kernels alone, and the one whose views users get and
    which changes places with the live storage. So a user who replaces the memory of a view frees nothing that a kernel
    writes to.

    Args:
        pairs: of the tensors on this storage.
        wanted: the shadow's dtype; None: see `shadow_dtype`.
        device: the shadow's; None: the live storage's.
        count: how many shadows.
        host: the backend whose `second_owner` to use.
        planes: True to keep a float32 average of bfloat16 in two planes.

    Raises:
        ValueError: tensors that cannot be mirrored together; names them.
    """

    def __init__(
        self,
        pairs: list[Pair],
        wanted: torch.dtype | None,
        device: torch.device | None,
        count: int,
        host: Any,
        planes: bool = False,
    ) -> None:
        self.live = pairs[0].live.untyped_storage()
        self._host = host
        live_dtype, widened = _real(pairs[0].live.dtype), _widened_dtype(pairs, wanted)
        self.device = device or self.live.device
        on_one_device = self.device == self.live.device
        is_split = planes and on_one_device and (live_dtype, widened) == (torch.bfloat16, torch.float32)
        self._dtype = None if is_split else widened  # of all elements of a shadow; None: those of the live storage
        self._itemsizes = (1, 1) if self._dtype is None else (live_dtype.itemsize, self._dtype.itemsize)
        self.is_direct = self._dtype is None and on_one_device  # a shadow can take the live storage's place
        self.runs = _runs_of(pairs, keep_bytes=widened is None)
        self.begin, self.end = _span(self.runs, self.live.nbytes())  # bytes of the live storage that are mirrored
        self.is_part = self.end - self.begin < self.live.nbytes()
        self.rest = [] if self.is_part else gaps(self.runs, self.live.nbytes())
        self.shadows = [
            whole(allocate(self._in_shadow(self.end), self.device, self.live)) for _ in range(count)
        ]  # [count], bytes of the storages that are handed out
        elements = (self.end - self.begin) // live_dtype.itemsize
        self.lows = [
            torch.zeros(elements, dtype=torch.int16, device=self.device) for _ in range(count if is_split else 0)
        ]  # [count], the low planes; empty: there are none
        self.refresh_memory()
        covered = sum(run.end - run.begin for run in self.runs)
        self.overlaps = covered != sum(pair.live.numel() * pair.live.dtype.itemsize for pair in pairs)

    def refresh_memory(self) -> None:
        """Let kernels use the memory that the shadows have now."""
        self.memory = [self._host.second_owner(shadow) for shadow in self.shadows]  # [count], bytes
        self.segments: list[Segment] = []  # [runs]
        for run in self.runs:
            shadows = [self._elements_of(run, memory.untyped_storage()) for memory in self.memory]
            begin, end = (run.begin - self.begin) // 2, (run.end - self.begin) // 2  # of int16
            live = flat(self.live, run.begin, run.end, run.dtype)
            self.segments.append(Segment(shadows, live, run.copy, [low[begin:end] for low in self.lows]))

    def copy_to_new_memory(self) -> None:
        """Copy what the kernels wrote to the memory that the shadows have now."""
        for shadow, memory in zip(self.shadows, self.memory, strict=True):
            if shadow.data_ptr() != memory.data_ptr():
                shadow.copy_(memory)

    def _in_shadow(self, live_byte: int) -> int:
        """Return where a byte of the live storage is in a shadow."""
        live_itemsize, itemsize = self._itemsizes
        return (live_byte - self.begin) // live_itemsize * itemsize

    def _elements_of(self, run: Run, shadow: torch.UntypedStorage) -> Tensor:
        """Return the elements of a shadow that a run of the live storage has there."""
        return flat(shadow, self._in_shadow(run.begin), self._in_shadow(run.end), self._dtype or run.dtype)

    def _offset(self, tensor: Tensor) -> Any:
        """Return how many elements into a shadow a live tensor begins."""
        return tensor.storage_offset() - self.begin // tensor.dtype.itemsize

    def view_of(self, tensor: Tensor, which: int) -> Tensor:
        """Return the shadow of a live tensor: the same place, shape and strides."""
        dtype = tensor.dtype if self._dtype is None else shadow_dtype(tensor.dtype, self._dtype)
        return view_in(self.shadows[which].untyped_storage(), tensor, dtype, self._offset(tensor))

    def low_of(self, tensor: Tensor, which: int) -> Tensor | None:
        """Return the low plane of the shadow of a live tensor; None: it has none."""
        return self.lows[which].as_strided(tensor.shape, tensor.stride(), self._offset(tensor)) if self.lows else None

    def in_model(self, shadow_view: Tensor) -> Tensor:
        """Return the place in the live storage of which a direct shadow has `shadow_view`."""
        offset = shadow_view.storage_offset() + self.begin // shadow_view.dtype.itemsize
        return view_in(self.live, shadow_view, shadow_view.dtype, offset)

    def swap_buffer(self, which: int) -> SwapBuffer:
        """Return what takes the live storage's place: the shadow itself, or scratch memory for it in the live dtype."""
        shadow = self.shadows[which].untyped_storage()
        storage = shadow if self.is_direct else allocate(self.end - self.begin, self.live.device, self.live)
        rest = [(flat(storage, *gap), flat(self.live, *gap)) for gap in self.rest]
        spans = [(run, (run.begin - self.begin, run.end - self.begin)) for run in self.runs]
        casts = [(flat(storage, *at, run.dtype), self._elements_of(run, shadow)) for run, at in spans]
        parts = [(flat(self.live, run.begin, run.end), flat(storage, *at)) for run, at in spans]
        casts, parts = [] if self.is_direct else casts, parts if self.is_part else []
        return SwapBuffer(self.live, storage, rest, casts, parts, self.begin)


def keep_in_storages(
    pairs: Iterable[Pair],
    dtype: torch.dtype | None,
    device: torch.device | None,
    count: int,
    host: Any,
    may_split: bool,
) -> list[ShadowStorage]:
    """Make storages for the averages of these tensors, and let the pairs take them.

    Args:
        dtype, device, count, host: see `ShadowStorage`.
        may_split: True if float32 averages of bfloat16 tensors may be kept in two planes.

    Raises:
        ValueError: a tensor whose storage cannot be mirrored; names it.
    """
    groups: dict[int, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.live.untyped_storage()._cdata, []).append(pair)
    _refuse_two_storages_over_one_memory([group[0] for group in groups.values()])
    storages = []
    for group in groups.values():
        live_device = group[0].live.device
        planes = may_split and offload.transfer_between(live_device, device or live_device) is None
        storages.append(ShadowStorage(group, dtype, device, count, host, planes))
        for pair in group:
            pair.keep_in(storages[-1], count)
    return storages


def _refuse_two_storages_over_one_memory(pairs: list[Pair]) -> None:
    """Raise ValueError where two storages share memory. `pairs`: one tensor of each storage."""
    spans = []
    for pair in pairs:
        storage = pair.live.untyped_storage()
        if storage.nbytes() == 0:
            continue
        if storage.data_ptr() == 0:
            raise ValueError(f"{pair.name!r} has no memory: its storage was freed, or it is a fake tensor")
        spans.append((str(storage.device), storage.data_ptr(), storage.data_ptr() + storage.nbytes(), pair.name))
    spans.sort()
    for (device, _, end, name), (next_device, begin, _, next_name) in pairwise(spans):
        if device == next_device and begin < end:
            raise ValueError(
                f"{name!r} and {next_name!r} are different storages over the same memory, which an exchange of "
                "pointers cannot follow: clone() one of them, or make one a view of the other"
            )


def swap_of(
    storages: Sequence[ShadowStorage],
    which: int,
    pairs: Sequence[Pair],
    versioned: Sequence[Tensor],
    host: Any,
    contents_of: Sequence[contract.Plan] | None,
    modules: Sequence[nn.Module] = (),
) -> Swap:
    """Return the swap of live weights and average `which`.

    Args:
        pairs: of the tensors on these storages.
        versioned: tensors that recorded graphs may refer to.
        host: the backend whose `StorageExchange` to use.
        contents_of: the plans that exchange contents; None: pointers are exchanged.
        modules: of the model.

    Raises:
        ValueError: contents could not be put back exactly.
    """
    if contents_of is not None and not all(storage.is_direct for storage in storages):
        raise ValueError(
            "in_place=True exchanges contents, and live and shadow differ in dtype or device, so that the live "
            "weights could not be put back exactly: use apply_shadow() without it, or give FastEMA the model's own "
            "dtype and device"
        )
    with torch.inference_mode(False), torch.no_grad():
        buffers = sorted((s.swap_buffer(which) for s in storages), key=lambda buffer: bool(buffer.parts))
        exchange: contract.StorageExchange | ContentsExchange
        if contents_of is None:
            exchange = exchange_of(buffers, versioned, host)
        else:
            places = [(buffer.live, buffer.storage) for buffer in buffers]
            exchange = ContentsExchange(contents_of, which, versioned, places)
        return Swap(_OWNER, _DROPPED, pairs, exchange, buffers, modules)


def _span(runs: list[Run], nbytes: int) -> tuple[int, int]:
    """Return the bytes to mirror: from the first to the last managed one if that is less than half, else all."""
    if not runs:
        return 0, nbytes
    begin, end = min(run.begin for run in runs) // _ALIGNMENT * _ALIGNMENT, max(run.end for run in runs)
    return (begin, end) if 2 * (end - begin) < nbytes else (0, nbytes)


def _widened_dtype(pairs: list[Pair], wanted: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of a shadow that is not of the live dtype, else None: a storage widens as a whole."""
    dtypes = {_real(pair.live.dtype) for pair in pairs}
    averaged = [pair.live.dtype for pair in pairs if pair.rule == "average"]
    widened = {_real(shadow_dtype(dtype, wanted)) for dtype in averaged if shadow_dtype(dtype, wanted) != dtype}
    if not widened:
        return None
    if len(dtypes) > 1:
        names = ", ".join(repr(pair.name) for pair in pairs[:3])
        raise ValueError(
            f"{names} share one storage with different dtypes ({', '.join(sorted(map(str, dtypes)))}), so their shadow "
            "cannot have another dtype than they have: clone() them apart"
        )
    return widened.pop()


def _runs_of(pairs: list[Pair], keep_bytes: bool) -> list[Run]:
    """Return the disjoint runs of one storage; where tensors of both rules overlap, averaging wins."""
    averaged: list[Run] = []
    copied: list[Run] = []
    for pair in pairs:
        copy = pair.copy
        itemsize = pair.live.dtype.itemsize
        dtype = torch.uint8 if copy and keep_bytes else _real(pair.live.dtype)
        try:
            runs = element_runs(pair.live)
        except ValueError as error:
            raise ValueError(f"{pair.name!r} {error}. To leave it out, return 'skip' for it from the policy.") from None
        (copied if copy else averaged).extend(Run(begin * itemsize, end * itemsize, dtype, copy) for begin, end in runs)
    try:
        average = merged(averaged)
        return average + without(merged(copied), average)
    except ValueError as error:
        raise ValueError(f"{pairs[0].name!r} {error}") from None

"""One live storage, its shadows (one for each decay), and the runs of both that an update reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastema.policy import Managed
from fastema.regions import Run, element_runs, gaps, merged, without

_UNIT = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
_COMPLEX = {torch.float64: torch.complex128}
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}


def shadow_dtype(live: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the average of a `live` tensor: `wanted`, else float32 for 16-bit weights, else the same."""
    if wanted is None:
        return _WIDER.get(live, live)
    return _COMPLEX.get(wanted, torch.complex64) if live.is_complex else wanted


def _unit(dtype: torch.dtype) -> torch.dtype:
    """What a kernel sees: complex numbers are pairs."""
    return _UNIT.get(dtype, dtype)


def flat(storage: torch.UntypedStorage, begin: int, end: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Bytes [begin, end) of `storage` as a 1-D tensor."""
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    return tensor.set_(storage, begin // dtype.itemsize, ((end - begin) // dtype.itemsize,), (1,))


def _allocate(nbytes: int, device: torch.device, like: torch.UntypedStorage) -> torch.UntypedStorage:
    # What takes the place of pinned memory must be pinned: offloaded parameters are copied to the GPU meanwhile.
    pin = device.type == "cpu" == like.device.type and like.is_pinned()
    return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pin).untyped_storage()


class Mirror:
    """A live storage and its shadows, all of the same layout.

    Args:
        entries: the managed tensors on this storage.
        wanted: the shadow's dtype; None: see `shadow_dtype`.
        device: the shadow's; None: the live storage's.
        count: how many shadows.

    Raises:
        ValueError: tensors that cannot be mirrored together; names them.
    """

    def __init__(
        self, entries: list[Managed], wanted: torch.dtype | None, device: torch.device | None, count: int
    ) -> None:
        self.live = entries[0].tensor.untyped_storage()
        self._shadow_unit = _common_shadow_unit(entries, wanted)  # None: every run keeps its dtype
        self._live_itemsize = _unit(entries[0].tensor.dtype).itemsize
        self.device = device or self.live.device
        self.is_direct = self._shadow_unit is None and self.device == self.live.device
        self.runs = _runs_of(entries, keep_bytes=self._shadow_unit is None)
        self.rest = gaps(self.runs, self.live.nbytes())
        self.lives = [flat(self.live, run.begin, run.end, run.dtype) for run in self.runs]  # [runs]
        self._storages = [_allocate(self._scaled(self.live.nbytes()), self.device, self.live) for _ in range(count)]
        self.shadows = [
            [
                flat(storage, self._scaled(run.begin), self._scaled(run.end), self._shadow_unit or run.dtype)
                for run in self.runs
            ]
            for storage in self._storages
        ]  # [count][runs]
        self.whole_shadows = [flat(storage, 0, storage.nbytes()) for storage in self._storages]  # [count]
        covered = sum(run.end - run.begin for run in self.runs)
        self.overlaps = covered != sum(entry.tensor.numel() * entry.tensor.dtype.itemsize for entry in entries)

    def _scaled(self, live_bytes: int) -> int:
        """Where a byte of the live storage is in a shadow."""
        if self._shadow_unit is None:
            return live_bytes
        return live_bytes // self._live_itemsize * self._shadow_unit.itemsize

    def view_of(self, tensor: Tensor, which: int) -> Tensor:
        """The shadow of a live tensor: the same place, shape and strides."""
        dtype = tensor.dtype
        if self._shadow_unit is not None:
            dtype = shadow_dtype(dtype, self._shadow_unit)
        empty = torch.empty(0, dtype=dtype, device=self.device)
        view = empty.set_(self._storages[which], tensor.storage_offset(), tensor.shape, tensor.stride())
        view = view.conj() if tensor.is_conj() else view  # flags beside the memory
        return torch._neg_view(view) if tensor.is_neg() else view

    def stand_in(self, which: int) -> StandIn:
        """What takes the live storage's place: the shadow itself, or scratch memory for it in the live dtype."""
        storage = (
            self._storages[which] if self.is_direct else _allocate(self.live.nbytes(), self.live.device, self.live)
        )
        rest = [(flat(storage, *gap), flat(self.live, *gap)) for gap in self.rest]
        casts = []
        if not self.is_direct:
            scratch = [flat(storage, run.begin, run.end, run.dtype) for run in self.runs]
            casts = list(zip(scratch, self.shadows[which], strict=True))
        return StandIn(self.live, storage, rest, casts)


@dataclass
class StandIn:
    """A storage that changes places with a live one."""

    live: torch.UntypedStorage
    storage: torch.UntypedStorage
    rest: list[tuple[Tensor, Tensor]]  # of the two: the bytes that nothing manages
    casts: list[tuple[Tensor, Tensor]]  # scratch <- shadow; empty where the storage is the shadow itself

    @property
    def needs_filling(self) -> bool:
        """Whether the exchange of pointers alone is not enough."""
        return bool(self.rest or self.casts)

    def fill(self) -> None:
        """Before it goes in: casts the average into the scratch memory, and carries the rest along."""
        if self.casts and self.storage.nbytes() != self.live.nbytes():
            self.storage.resize_(self.live.nbytes())
        for scratch, shadow in self.casts:
            scratch.copy_(shadow)
        self.carry_rest()

    def carry_rest(self) -> None:
        """Before either exchange: what takes the live storage's place gets the bytes that nothing manages."""
        for other, live in self.rest:
            other.copy_(live)

    def free(self) -> None:
        """After it came out: gives scratch memory back."""
        # numpy() marks a storage as fixed: an array taken in the block still reads the scratch memory.
        if self.casts and self.storage.resizable() and self.live.resizable():
            scratch = self.casts[0][0]
            if scratch.device.type != "cpu":  # what reads it was enqueued before on this stream, not the allocating one
                scratch.record_stream(torch.get_device_module(scratch.device).current_stream(scratch.device))
            self.storage.resize_(0)


def _common_shadow_unit(entries: list[Managed], wanted: torch.dtype | None) -> torch.dtype | None:
    """The dtype of a shadow that is not of the live dtype, or None. One storage widens as a whole or not at all."""
    units = {_unit(entry.tensor.dtype) for entry in entries}
    averaged = [entry.tensor.dtype for entry in entries if entry.rule == "average"]
    widened = {_unit(shadow_dtype(dtype, wanted)) for dtype in averaged if shadow_dtype(dtype, wanted) != dtype}
    if not widened:
        return None
    if len(units) > 1:
        names = ", ".join(repr(entry.name) for entry in entries[:3])
        raise ValueError(
            f"{names} share one storage with different dtypes ({', '.join(sorted(map(str, units)))}), so their shadow "
            "cannot have another dtype than they have: clone() them apart"
        )
    return widened.pop()


def _runs_of(entries: list[Managed], keep_bytes: bool) -> list[Run]:
    """The disjoint runs of one storage; where tensors of both rules overlap, averaging wins."""
    averaged: list[Run] = []
    copied: list[Run] = []
    for entry in entries:
        copy = entry.rule == "copy"
        itemsize = entry.tensor.dtype.itemsize
        unit = torch.uint8 if copy and keep_bytes else _unit(entry.tensor.dtype)
        try:
            runs = element_runs(entry.tensor)
        except ValueError as error:
            raise ValueError(f"{entry.name!r} {error}. A policy that returns 'skip' for it leaves it alone.") from None
        (copied if copy else averaged).extend(Run(begin * itemsize, end * itemsize, unit, copy) for begin, end in runs)
    try:
        average = merged(averaged)
        return average + without(merged(copied), average)
    except ValueError as error:
        raise ValueError(f"{entries[0].name!r} {error}") from None

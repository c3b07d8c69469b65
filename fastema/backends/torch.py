"""The torch backend: plain torch operations, for machines without a compiler and for readers of csrc/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastema.backends import contract, exchange
from fastema.memory import planes
from fastema.memory.atomic_steps import Step, run_atomically
from fastema.memory.bytes import place_of
from fastema.memory.streams import Streams, has_streams, is_available

NAME = "torch"
StorageExchange = exchange.StorageExchange

# Elements of a batch. On a CPU its temporaries stay in the cache; on a GPU a launch takes as long as many elements.
_BATCH, _GPU_BATCH = 1 << 18, 1 << 22


def why_unusable(device_type: str) -> str | None:
    """Return why the backend cannot run on this kind of device, or None."""
    if not is_available(device_type):
        return f"torch sees no {device_type.upper()} device"
    return None


def probe(device: torch.device) -> None:
    """Return None: torch's operations run wherever it has tensors."""


def describe(device_type: str) -> str:
    """Describe what runs on this kind of device."""
    swap = "by pointer" if exchange.SWAPS_POINTERS else "by contents (this torch cannot swap storages)"
    return f"torch operations, swap {swap}"


class _Part(NamedTuple):
    """A segment under one of its shadows."""

    shadow: Tensor
    live: Tensor
    low: Tensor | None


class Plan:
    """shadow <- shadow + weight * (live - shadow) for every segment; see `contract.Plan`."""

    def __init__(self, segments: Sequence[contract.Segment], views: Sequence[Tensor]) -> None:
        count = len(segments[0].shadows) if segments else 0
        self._parts = [
            [_Part(s.shadows[which], s.live, s.lows[which] if s.lows else None) for s in segments]
            for which in range(count)
        ]
        copied = [segment.copy for segment in segments]
        averaged = [not copy for copy in copied]
        self._copied = [list(compress(parts, copied)) for parts in self._parts]
        self._batches = [_batches(compress(parts, averaged)) for parts in self._parts]
        self._views = list(views)
        self._nonfinite: Tensor | int = 0
        tensors = [tensor for s in segments for tensor in (s.live, *s.shadows, *s.lows)]
        self._streams = [
            Streams(device, (tensor for tensor in tensors if tensor.device == device))
            for device in {tensor.device for tensor in tensors}
            if has_streams(device)
        ]

    @torch.no_grad()
    def update(self, args: contract.UpdateArgs) -> None:
        if args.skip is not None and bool(args.skip):  # on a GPU this waits; the kernels do not
            return
        weights = args.weights if args.device_weights is None else args.device_weights.tolist()
        if self._parts and len(weights) != len(self._parts):
            raise ValueError(f"got {len(weights)} weights for {len(self._parts)} shadows")
        for streams in self._streams:
            streams.note_current()
        for which, (copied, batches) in enumerate(zip(self._copied, self._batches, strict=True)):
            for shadow, live, low in copied:
                if low is None:
                    shadow.copy_(live)
                else:
                    _scatter(planes.split(live.to(torch.float32)), [shadow], [low])
            for batch in batches:
                self._average(batch, weights[which], args.skip_nonfinite, counts_live=which == 0)
        torch.autograd.graph.increment_version(self._views)

    def _average(self, batch: list[_Part], weight: float, skip_nonfinite: bool, counts_live: bool) -> None:
        shadows, lives = [part.shadow for part in batch], [part.live for part in batch]
        lows = [part.low for part in batch if part.low is not None]
        opmath = torch.float64 if shadows[0].dtype == torch.float64 else torch.float32
        old, new = _joined(shadows), _joined(lives).to(shadows[0].device, opmath)
        old = planes.join(old, _joined(lows)) if lows else old.to(opmath)
        copies = weight >= (1.0 if opmath == torch.float64 else 1.0 - 2.0**-25)  # what opmath rounds to 1
        result = torch.lerp(old, new, weight)
        average = new if copies else result  # lerp keeps a NaN
        if skip_nonfinite:
            is_bad = ~result.isfinite()
            if is_bad.device.type != "cpu" or is_bad.any():  # a GPU would wait
                is_live = new.isfinite()
                takes_live = is_live if copies else is_live & ~old.isfinite()  # as in csrc/ema_math.h
                average = torch.where(is_bad, torch.where(takes_live, new, old), average)
                # A live value is counted once for all shadows.
                self._nonfinite = self._nonfinite + (is_bad if counts_live else is_bad & is_live).count_nonzero()
        _scatter(planes.split(average) if lows else (average,), shadows, lows)

    def nonfinite_count(self) -> int:
        return int(self._nonfinite)

    @torch.no_grad()
    def exchange(self, which: int) -> None:
        """Swap the contents of live and of one shadow, a block at a time."""
        run_atomically(self.exchange_steps(which))

    def exchange_steps(self, which: int) -> list[Step]:
        """Return the steps of `exchange()`, for `run_atomically`."""
        parts = self._parts[which] if self._parts else []
        if any(part.shadow.dtype != part.live.dtype for part in parts):
            raise ValueError("contents of different dtypes cannot be exchanged exactly")
        return [
            step
            for shadow, live, _ in parts
            for step in exchange.contents_steps(shadow.view(torch.uint8), live.view(torch.uint8))
        ]


def _batches(parts: Iterable[_Part]) -> list[list[_Part]]:
    """Group small parts of the same dtypes: an operation on 256 elements takes as long as one on none."""
    batches: list[list[_Part]] = []
    open_batches: dict[Any, tuple[list[_Part], int]] = {}
    for part in parts:
        shadow, live, low = part
        if shadow.dim() != 1:  # a tensor of a compiled graph: see `Averages.update_operands`
            batches.append([part])
            continue
        alike = shadow.dtype, shadow.device, live.dtype, live.device, low is None
        most = _BATCH if live.device.type == "cpu" else _GPU_BATCH
        batch, elements = open_batches.get(alike, ([], most))
        if elements + shadow.numel() > most:
            batch, elements = [], 0
            batches.append(batch)
        batch.append(part)
        open_batches[alike] = batch, elements + shadow.numel()
    return batches


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _scatter(results: Sequence[Tensor], *targets: list[Tensor]) -> None:
    """Copy each result, 1-D, into the tensors of its batch in turn."""
    for result, parts in zip(results, targets, strict=False):
        if len(parts) == 1:
            parts[0].copy_(result)
        else:
            torch._foreach_copy_(parts, result.split([part.numel() for part in parts]))


def second_owner(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's storage. In C++ they get a second owner; here no kernel keeps raw addresses."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


class Watch:
    """A check that the model still holds what a plan was built for; see `contract.Watch`."""

    def __init__(
        self,
        dicts: Sequence[dict[str, Any]],
        tensors: Sequence[Tensor],
        shadows: Sequence[Tensor] = (),
        loose: Sequence[tuple[dict[str, Any], str]] = (),
    ) -> None:
        self._slots = [
            (
                slots,
                list(slots.values()),
                [any(slots is other and key == name for other, name in loose) for key in slots],
            )
            for slots in dicts
        ]
        self._places = [(tensor, place_of(tensor), tensor.untyped_storage().data_ptr()) for tensor in tensors]
        self._shadows = [shadow.untyped_storage() for shadow in shadows]
        self._memory = [(shadow.data_ptr(), shadow.nbytes()) for shadow in self._shadows]

    def holds(self) -> bool:
        return (
            self.layout_holds()
            and all(tensor.untyped_storage().data_ptr() == address for tensor, _, address in self._places)
            and self.shadows_hold()
        )

    def layout_holds(self) -> bool:
        for slots, values, loose in self._slots:
            if len(slots) != len(values) or not all(
                is_loose or now is then for now, then, is_loose in zip(slots.values(), values, loose, strict=True)
            ):
                return False
        return all(tensor.layout == torch.strided and place_of(tensor) == place for tensor, place, _ in self._places)

    def shadows_hold(self) -> bool:
        return [(shadow.data_ptr(), shadow.nbytes()) for shadow in self._shadows] == self._memory

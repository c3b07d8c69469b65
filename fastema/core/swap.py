"""The swap of averaged and live weights, for FastEMA and AveragedModel.

`enter()` checks everything before it changes anything. `leave()` looks at the model first: tensors with other memory,
another dtype or a new object get their trained values by copy. If that is impossible, nothing is changed, and the error
carries the trained values.
"""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastema.backends.contract import StorageExchange
from fastema.backends.exchange import ContentsExchange
from fastema.core import sharded
from fastema.core.checks import first_few
from fastema.core.compiled import Merges, clear_caches
from fastema.core.pairs import Pair
from fastema.core.tensors import has_own_operations, why_not_writable
from fastema.memory.bytes import element_runs, place_of, view_in, whole
from fastema.memory.streams import current_stream, has_streams

#: The swaps that are entered now, by id; empty: no model has averages in it.
entered: dict[int, weakref.ref[Swap]] = {}

#: Offset of the version counters, unique for each swap and larger than training ever counts, so that a backward through
#: a graph recorded before a swap, or inside another one, raises.
_version_steps = itertools.count(1 << 30)


class SwapError(RuntimeError):
    """The trained weights cannot be put back, because the model changed while the averages were in it.

    Nothing was changed. `live` has copies of the trained values by name. Repair the model and call `restore()` again,
    or load them.
    """

    def __init__(self, message: str, live: dict[str, Tensor]) -> None:
        super().__init__(message)
        self.live = live


def refuse_foreign(what: str, storage_ids: frozenset[int], own: Swap | None = None) -> None:
    """Raise RuntimeError while a swap other than `own` uses any of these storages (`_cdata`)."""
    for key, reference in list(entered.items()):
        swap = reference()
        if swap is None:
            entered.pop(key, None)  # an interrupt came between its two halves: it was never entered
        elif swap is not own and swap.is_entered and swap.storage_ids & storage_ids:
            raise RuntimeError(f"{what} while {swap.owner}")


class _Live(NamedTuple):
    """A tensor whose average is in the model."""

    pair: Pair
    place: tuple[Any, ...]  # of its local memory when the swap was built: see `place_of`
    value: Tensor  # the live value meanwhile

    def is_in_place(self, now: Tensor) -> bool:
        """Return True if `now` is at the same place of the same storage."""
        return sharded.has_storage(now) and place_of(now) == self.place

    def why_not_copied_to(self, now: Tensor | None, taken: frozenset[int]) -> str | None:
        """Return why the live value cannot be copied into `now`; None: it can. `taken`: storages not to write to."""
        if now is None:
            return "is gone"
        reason = why_not_writable(now, self.value.dtype, type(self.pair.live))
        if reason is not None:
            return f"{reason} now"
        if now.shape != self.value.shape:
            return f"has shape {tuple(now.shape)} now, was {tuple(self.value.shape)}"
        if now.untyped_storage()._cdata in taken:
            return "is in the memory of other weights or averages now"
        return None


@dataclass
class SwapBuffer:
    """A storage that changes places with a live one, or whose contents do so with a part of it."""

    live: torch.UntypedStorage
    storage: torch.UntypedStorage
    rest: list[tuple[Tensor, Tensor]]  # of the two: the bytes that nothing manages
    casts: list[tuple[Tensor, Tensor]]  # scratch <- average; empty where the storage is the shadow itself
    parts: list[tuple[Tensor, Tensor]]  # bytes of the two whose contents change places; empty: the pointers do
    begin: int  # the byte of the live storage at which this one begins

    def __post_init__(self) -> None:
        self.nbytes = self.storage.nbytes()  # in use; scratch memory is given back meanwhile

    @property
    def needs_filling(self) -> bool:
        return bool(self.rest or self.casts)

    def fill(self) -> None:
        """Cast the average into scratch memory, and copy what is not managed, before the exchange."""
        if self.casts and self.storage.nbytes() != self.nbytes:
            self.storage.resize_(self.nbytes)
        for scratch, average in self.casts:
            scratch.copy_(average)
        self.copy_rest()

    def copy_rest(self) -> None:
        """Copy the bytes that nothing manages to the side that goes into the model."""
        for other, live in self.rest:
            other.copy_(live)

    def free(self) -> None:
        """Give scratch memory back, after it came out."""
        # numpy() marks a storage as fixed: an array taken in the block still reads the scratch memory.
        if self.casts and self.storage.resizable() and self.live.resizable():
            scratch = self.casts[0][0]
            if has_streams(scratch.device):  # what reads it was enqueued before on this stream, not the allocating one
                scratch.record_stream(current_stream(scratch.device))
            self.storage.resize_(0)

    def view_of(self, tensor: Tensor) -> Tensor:
        """Return the place of a live tensor in this storage."""
        offset = tensor.storage_offset() - self.begin // tensor.dtype.itemsize
        return view_in(self.storage, tensor, tensor.dtype, offset)


def exchange_of(buffers: Sequence[SwapBuffer], versioned: Sequence[Tensor], host: Any) -> StorageExchange:
    """Return the exchange of live storages and `buffers`: by pointers, or by contents for parts of a storage.

    Args:
        versioned: tensors whose version counters are raised, which autograd checks.
        host: the backend whose `StorageExchange` to use.
    """
    by_pointer = [buffer for buffer in buffers if not buffer.parts]
    return host.StorageExchange(
        [whole(buffer.live) for buffer in by_pointer],
        [whole(buffer.storage) for buffer in by_pointer],
        versioned,
        [part for buffer in buffers for part in buffer.parts],
    )


class Swap:
    """A swap of averages and live weights, which can be entered and left any number of times.

    Args:
        owner: for the errors of others: "another ... is applied to the same model: do ... first".
        dropped: the warning if this object is deleted while entered.
        pairs: of the live tensors that change places.
        exchange: a backend's `StorageExchange`, or a `ContentsExchange`.
        buffers: one for each live storage; those that `exchange` swaps by pointer come first, in its order.
        modules: of the model, whose adapters must not be merged on one side of the swap only.
    """

    def __init__(
        self,
        owner: str,
        dropped: str,
        pairs: Iterable[Pair],
        exchange: StorageExchange | ContentsExchange,
        buffers: Sequence[SwapBuffer],
        modules: Iterable[nn.Module] = (),
    ) -> None:
        self._merges = Merges(modules)
        self.owner = owner
        self.storage_ids = frozenset(s._cdata for buffer in buffers for s in (buffer.live, buffer.storage))
        self._dropped = dropped
        buffer_of = {buffer.live._cdata: buffer for buffer in buffers}
        self._lives = [
            _Live(pair, place_of(pair.live), buffer_of[pair.live.untyped_storage()._cdata].view_of(pair.live))
            for pair in pairs
        ]
        self._exchange = exchange
        self._buffers = buffers
        self._sizes = [(buffer.live.nbytes(), buffer.nbytes) for buffer in buffers]
        self.by_contents = isinstance(exchange, ContentsExchange)
        self._with_parts = [index for index, buffer in enumerate(buffers) if buffer.parts]
        self._filled = [buffer for buffer in buffers if buffer.needs_filling and not self.by_contents]
        # Where only pointers are swapped, no torch operation runs, so its modes need not be set: that would take a
        # third of the time of a swap.
        self._swaps_only_pointers = not self.by_contents and not self._filled and not self._with_parts

    @property
    def is_entered(self) -> bool:
        return self._exchange.entered

    def live_values(self) -> dict[str, Tensor]:
        """Return the live values by name while the averages are in the model. They share its memory."""
        return {name: live.value for live in self._lives for name in live.pair.names}

    def enter(self) -> None:
        """Swap the averages in.

        Raises:
            RuntimeError: sizes or devices of two storages differ, memory is short, or an adapter is merged into the
                weights. Nothing is changed.
        """
        self._merges.enter()
        clear_caches()  # they hold what was computed from the live weights
        if self._swaps_only_pointers:
            self._enter()
        else:
            with torch.inference_mode(False), torch.no_grad():
                self._enter()

    def _enter(self) -> None:
        try:
            for buffer in self._filled:
                buffer.fill()
            entered[id(self)] = weakref.ref(self)
            self._exchange.enter(next(_version_steps))
        except BaseException:
            if not self._exchange.entered:
                entered.pop(id(self), None)
                self._free()  # a failed swap must not keep scratch memory
            raise

    def leave(self, is_unchanged: Callable[[], bool], tensors_now: Callable[[], dict[str, Tensor]]) -> bool:
        """Swap the live values back. After an exception it can be called again.

        Args:
            is_unchanged: return True if the model has the same tensors in the same places of the same storages.
            tensors_now: return the model's tensors by name.

        Returns:
            True if the model was as `enter()` left it. If not, plans and watches must be rebuilt.

        Raises:
            SwapError: a tensor cannot take its live value, or an adapter is merged into the averages. Nothing is
                changed.
        """
        merged = self._merges.changed()
        if merged is not None:
            raise self._error([merged])
        clear_caches()
        if self._swaps_only_pointers:
            if is_unchanged() and self._exchange.leave_untouched():
                entered.pop(id(self), None)
                return True
        elif is_unchanged() and self._exchange.untouched() and not any(map(self._damage, self._with_parts)):
            with torch.inference_mode(False), torch.no_grad():
                self._leave(())
            return True
        with torch.inference_mode(False), torch.no_grad():
            self._leave_changed(tensors_now())
        return False

    def _leave(self, staying: Sequence[int]) -> None:
        for index, buffer in enumerate(self._buffers):
            if buffer.rest and not self.by_contents and index not in staying:
                buffer.copy_rest()
        self._exchange.leave(staying)
        entered.pop(id(self), None)
        self._free()

    def _free(self) -> None:
        for buffer in self._filled:
            buffer.free()

    def _leave_changed(self, now: dict[str, Tensor]) -> None:
        """Copy the live values of tensors that the exchange no longer reaches, then exchange the others."""
        damage = {buffer.live._cdata: self._damage(index) for index, buffer in enumerate(self._buffers)}
        taken = self.storage_ids | self._unmanaged(now)
        with_parts = {self._buffers[index].live._cdata for index in self._with_parts}
        copies: list[tuple[Tensor, _Live]] = []
        errors: list[str] = []
        changes: list[str] = []
        for live in self._lives:
            storage, names = live.place[0], live.pair.names  # the live one that it was in
            for name in names:
                tensor = sharded.local_part(now[name]) if name in now else None
                if tensor is not None and live.is_in_place(tensor):
                    reason = damage[storage]
                    if reason is None:
                        continue  # the exchange reaches it
                else:
                    reason = live.why_not_copied_to(tensor, taken)
                if reason is None:
                    assert tensor is not None
                    copies.append((tensor, live))
                    if not live.pair.copy:
                        changes.append(f"{name!r} was replaced or moved")
                elif live.pair.copy and not (storage in with_parts and damage[storage]):
                    changes.append(f"{name!r} {reason} and keeps the value that it has")
                else:
                    errors.append(f"{name!r} {reason}")
            if not live.pair.copy and damage[storage] is not None and not errors:
                # The average, or the live value, is lost with the storage.
                errors.append(f"{names[0]!r} {damage[storage]}")
        errors += _shared(copies)
        if errors:
            raise self._error(errors)
        try:  # to the dtype and device of now: memory may be short
            values = [live.value.to(tensor.device, tensor.dtype) for tensor, live in copies]
        except RuntimeError as error:
            raise self._error([str(error)]) from error
        for (tensor, _), value in zip(copies, values, strict=True):
            _write(tensor, value)
        self._leave([index for index, buffer in enumerate(self._buffers) if damage[buffer.live._cdata] is not None])
        if changes:
            warnings.warn(
                f"the model was changed while the averaged weights were in it: {first_few(changes, 5, '; ')}. All "
                "others have their trained values again, by copy where they were replaced or moved",
                stacklevel=6,
            )

    def _unmanaged(self, now: dict[str, Tensor]) -> frozenset[int]:
        """Return the storages (`_cdata`) of the model's tensors that are not of the swap."""
        managed = {name for live in self._lives for name in live.pair.names}
        others = (sharded.local_part(tensor) for name, tensor in now.items() if name not in managed)
        return frozenset(other.untyped_storage()._cdata for other in others if sharded.has_storage(other))

    def _error(self, errors: list[str]) -> SwapError:
        return SwapError(
            "the model was changed while the averaged weights were in it, and cannot take all of its trained "
            f"values back: {first_few(errors, 5, '; ')}. Nothing was changed. The trained values are in this "
            "error's `.live`, by name; or undo the change and call restore() again",
            {name: value.clone() for name, value in self.live_values().items()},
        )

    def _damage(self, index: int) -> str | None:
        """Return why a live storage cannot be swapped back; None: it can."""
        buffer, (live_bytes, buffer_bytes) = self._buffers[index], self._sizes[index]
        if buffer.live.nbytes() != live_bytes:
            return f"is in a storage of {buffer.live.nbytes():,} bytes now, had {live_bytes:,}"
        if buffer.storage.nbytes() != buffer_bytes:
            return f"has its trained value in a storage that was resized to {buffer.storage.nbytes():,} bytes"
        if isinstance(self._exchange, ContentsExchange) and not self._exchange.is_untouched(index):
            return "is in other memory now, and contents were exchanged in place"
        return None

    def __del__(self) -> None:
        # Nothing is swapped back: a user may mean to keep the averaged weights, and weights must not change whenever
        # the garbage collector runs.
        exchange = getattr(self, "_exchange", None)
        if exchange is None or not exchange.entered or sys.is_finalizing():
            return
        entered.pop(id(self), None)
        warnings.warn(self._dropped, RuntimeWarning, stacklevel=2)


def _write(tensor: Tensor, value: Tensor) -> None:
    """Copy into the memory of a tensor, also past a class that has operations of its own."""
    # Inference tensors can be written to in inference mode only.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if not has_own_operations(type(tensor)):
            tensor.copy_(value)
            return
        view_in(tensor.untyped_storage(), tensor, tensor.dtype, tensor.storage_offset()).copy_(value)
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _shared(copies: Iterable[tuple[Tensor, _Live]]) -> list[str]:
    """Return what to say of tensors that share memory now and did not: they cannot all take their live values."""
    runs = [(tensor.untyped_storage()._cdata, *run, live) for tensor, live in copies for run in _byte_runs(tensor)]
    runs.sort(key=lambda run: run[:3])
    errors = {}
    for before, after in pairwise(runs):
        (storage, _, end, live), (other_storage, begin, _, other) = before, after
        shares = storage == other_storage and begin < end
        if shares and live is not other and not _overlapped(live.value, other.value):
            errors[id(other)] = f"{other.pair.name!r} shares its memory with {live.pair.name!r} now"
    return list(errors.values())


def _byte_runs(tensor: Tensor) -> list[tuple[int, int]]:
    size = tensor.dtype.itemsize
    return [(begin * size, end * size) for begin, end in element_runs(tensor)]


def _overlapped(one: Tensor, other: Tensor) -> bool:
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    return any(a < d and c < b for a, b in _byte_runs(one) for c, d in _byte_runs(other))

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
from typing import Any

import torch
from torch import Tensor

from fastema.backends.contract import StorageExchange
from fastema.backends.torch import ContentsExchange, place_of
from fastema.core.memory import whole
from fastema.core.model import dtensor
from fastema.core.swap.buffers import SwapBuffer
from fastema.core.text import first_few

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


@dataclass
class SwapEntry:
    """One live tensor of a swap."""

    names: list[str]  # all its names in the model
    place: tuple[Any, ...]  # of its local memory: see `place_of`
    is_copied: bool  # its rule is "copy": its average may be lost
    live_view: Tensor  # the live value while the average is in the model

    def is_in_place(self, now: Tensor) -> bool:
        """Return True if `now` is at the same place of the same storage."""
        return now.layout == torch.strided and place_of(now) == self.place

    def why_not_copied_to(self, now: Tensor | None, taken: frozenset[int]) -> str | None:
        """Return why the live value cannot be copied into `now`; None: it can. `taken`: storages of the exchange."""
        if now is None:
            return "is gone"
        if now.shape != self.live_view.shape:
            return f"has shape {tuple(now.shape)} now, was {tuple(self.live_view.shape)}"
        if now.layout != torch.strided or now.is_quantized or now.is_meta:
            kind = "on the meta device" if now.is_meta else f"quantised or of layout {now.layout}"
            return f"is {kind} now"
        if now.untyped_storage()._cdata in taken:
            return "is in the memory of other weights or averages now"
        return None


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
        tensors: of each live tensor of the swap all its names, itself, and whether its rule is "copy".
        exchange: a backend's `StorageExchange`, or a `ContentsExchange`.
        buffers: one for each live storage; those that `exchange` swaps by pointer come first, in its order.
    """

    def __init__(
        self,
        owner: str,
        dropped: str,
        tensors: Iterable[tuple[list[str], Tensor, bool]],
        exchange: StorageExchange | ContentsExchange,
        buffers: Sequence[SwapBuffer],
    ) -> None:
        self.owner = owner
        self.storage_ids = frozenset(s._cdata for buffer in buffers for s in (buffer.live, buffer.storage))
        self._dropped = dropped
        buffer_of = {buffer.live._cdata: buffer for buffer in buffers}
        self._entries = [
            SwapEntry(names, place_of(tensor), is_copied, buffer_of[tensor.untyped_storage()._cdata].view_of(tensor))
            for names, tensor, is_copied in tensors
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
        return {name: entry.live_view for entry in self._entries for name in entry.names}

    def enter(self) -> None:
        """Swap the averages in.

        Raises:
            RuntimeError: sizes or devices of two storages differ, or memory is short. Nothing is changed.
        """
        torch.clear_autocast_cache()  # it holds casts of the live weights
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
            SwapError: a tensor cannot take its live value. Nothing is changed.
        """
        torch.clear_autocast_cache()
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
        with_parts = {self._buffers[index].live._cdata for index in self._with_parts}
        copies: list[tuple[Tensor, Tensor]] = []
        errors: list[str] = []
        changes: list[str] = []
        for entry in self._entries:
            storage = entry.place[0]  # the live one that it was in
            for name in entry.names:
                tensor = dtensor.local_part(now[name]) if name in now else None
                if tensor is not None and entry.is_in_place(tensor):
                    reason = damage[storage]
                    if reason is None:
                        continue  # the exchange reaches it
                else:
                    reason = entry.why_not_copied_to(tensor, self.storage_ids)
                if reason is None:
                    assert tensor is not None
                    copies.append((tensor, entry.live_view))
                    if not entry.is_copied:
                        changes.append(f"{name!r} was replaced or moved")
                elif entry.is_copied and not (storage in with_parts and damage[storage]):
                    changes.append(f"{name!r} {reason} and keeps the value that it has")
                else:
                    errors.append(f"{name!r} {reason}")
            if not entry.is_copied and damage[storage] is not None and not errors:
                # The average, or the live value, is lost with the storage.
                errors.append(f"{entry.names[0]!r} {damage[storage]}")
        if errors:
            raise SwapError(
                "the model was changed while the averaged weights were in it, and cannot take all of its trained "
                f"values back: {first_few(errors, 5, '; ')}. Nothing was changed. The trained values are in this "
                "error's `.live`, by name; or undo the change and call restore() again",
                {name: value.clone() for name, value in self.live_values().items()},
            )
        for tensor, value in copies:
            # Inference tensors can be written to in inference mode only.
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(value)
        self._leave([index for index, buffer in enumerate(self._buffers) if damage[buffer.live._cdata] is not None])
        if changes:
            warnings.warn(
                f"the model was changed while the averaged weights were in it: {first_few(changes, 5, '; ')}. All "
                "others have their trained values again, by copy where they were replaced or moved",
                stacklevel=6,
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

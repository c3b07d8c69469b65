"""The exchange of averaged and live weights, for FastEMA and AveragedModel alike.

On the way in everything is checked before anything happens. On the way out the model is looked at first: tensors that
got other memory, another dtype or a new object meanwhile get their trained values back by copy, and where that cannot
be, nothing changes and the error carries the trained values.
"""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastema.backends.contract import StorageExchange
from fastema.backends.torch import ContentsExchange
from fastema.core import dtensor
from fastema.core.storages import SwapBuffer, whole
from fastema.core.text import first_few

#: The swaps that are entered now, by id. Empty: no model has averages in it.
entered: dict[int, weakref.ref[Swap]] = {}

#: By how much an exchange moves the version counters. Further than training ever counts, and another number every time,
#: so that a backward through a graph recorded before a swap, or inside another one, raises.
_version_steps = itertools.count(1 << 30)


class SwapError(RuntimeError):
    """The trained weights cannot go back into the model: it was changed while the averages were in it.

    Nothing was changed. `live` has the trained values, copied, by name; repair the model and call `restore()` again, or
    load them.
    """

    def __init__(self, message: str, live: dict[str, Tensor]) -> None:
        super().__init__(message)
        self.live = live


def refuse_foreign(what: str, storages: frozenset[int], own: Swap | None = None) -> None:
    """Raise RuntimeError while a swap other than `own` has any of these storages (`_cdata`)."""
    for reference in list(entered.values()):
        swap = reference()
        if swap is not None and swap is not own and swap.is_entered and swap.storages & storages:
            raise RuntimeError(f"{what} while {swap.owner}")


@dataclass
class SwapEntry:
    """One live tensor that changes places."""

    names: list[str]  # those it has in the model
    place: tuple[Any, ...]  # of what of it lies in this process's memory: see `place_of`
    is_copied: bool  # its average is a copy, which has no history
    held: Tensor  # shows the live value while the average is in the model

    def is_in_place(self, now: Tensor) -> bool:
        """Return whether `now` is in the place of the same storage where the tensor was."""
        return now.layout == torch.strided and place_of(now) == self.place

    def why_not_into(self, now: Tensor | None, taken: frozenset[int]) -> str | None:
        """Return why the live value cannot be copied into `now`; None: it can. `taken`: storages of the exchange."""
        if now is None:
            return "is gone"
        if now.shape != self.held.shape:
            return f"has shape {tuple(now.shape)} now, was {tuple(self.held.shape)}"
        if now.layout != torch.strided or now.is_quantized or now.is_meta:
            kind = "on the meta device" if now.is_meta else f"quantised or of layout {now.layout}"
            return f"is {kind} now"
        if now.untyped_storage()._cdata in taken:
            return "is in the memory of other weights or averages now"
        return None


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key of the tensor's memory, dtype and layout: equal for every alias."""
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def exchange_of(buffers: Sequence[SwapBuffer], versioned: Sequence[Tensor], host: Any) -> StorageExchange:
    """Return the exchange of live storages and `buffers`, by pointers or, of parts of a storage, by contents.

    Args:
        versioned: tensors whose version counters tell autograd.
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
    """Averages and live weights that change places, as often as wanted.

    Args:
        owner: for the errors of others: "another ... is applied to the same model: do ... first".
        dropped: the warning where this is dropped while the averages are in the model.
        entries: all tensors that change places.
        exchange: a `StorageExchange` of a backend, or a `ContentsExchange`.
        buffers: what changes places with each live storage, or gives it its contents; first those that `exchange`
            has, in its order.
    """

    def __init__(
        self,
        owner: str,
        dropped: str,
        entries: Sequence[SwapEntry],
        exchange: StorageExchange | ContentsExchange,
        buffers: Sequence[SwapBuffer],
    ) -> None:
        self.owner = owner
        self.storages = frozenset(s._cdata for buffer in buffers for s in (buffer.live, buffer.storage))
        self._dropped = dropped
        self._entries = entries
        self._exchange = exchange
        self._buffers = buffers
        self._sizes = [(buffer.live.nbytes(), buffer.nbytes) for buffer in buffers]
        self.by_contents = isinstance(exchange, ContentsExchange)
        self._filled = [buffer for buffer in buffers if buffer.needs_filling and not self.by_contents]
        # Pointers change places in C++, and that is all: no operation of torch runs, so its modes do not matter. To
        # enter and leave them would take a third of the time of an exchange.
        self._has_parts = any(buffer.parts for buffer in buffers)
        self._is_bare = not self.by_contents and not self._filled and not self._has_parts

    @property
    def is_entered(self) -> bool:
        return self._exchange.entered

    def live_values(self) -> dict[str, Tensor]:
        """Return the live values by name while the averages are in the model. They share its memory."""
        return {name: entry.held for entry in self._entries for name in entry.names}

    def enter(self) -> None:
        """Put the averages into the model.

        Raises:
            RuntimeError: sizes or devices of two storages differ, or memory is short. Nothing is changed.
        """
        torch.clear_autocast_cache()  # it holds casts of the live weights
        if self._is_bare:
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
                self._free()  # memory for some of the scratch storages is none for the training
            raise

    def leave(self, is_unchanged: Callable[[], bool], tensors_now: Callable[[], dict[str, Tensor]]) -> bool:
        """Put the live values back. After an exception it can be called again.

        Args:
            is_unchanged: return whether the model has the same tensors in the same places of the same storages.
            tensors_now: return the model's tensors by name.

        Returns:
            Whether the model was as the exchange had left it. If not, plans and watches are out of date.

        Raises:
            SwapError: a tensor cannot take its live value. Nothing is changed.
        """
        torch.clear_autocast_cache()
        if self._is_bare:
            if is_unchanged() and self._exchange.leave_untouched():
                entered.pop(id(self), None)
                return True
        elif is_unchanged() and self._exchange.untouched() and self._parts_hold():
            with torch.inference_mode(False), torch.no_grad():
                self._leave(())
            return True
        with torch.inference_mode(False), torch.no_grad():
            self._leave_changed(tensors_now())
        return False

    def _parts_hold(self) -> bool:
        return not self._has_parts or not any(self._damage(i) for i, buffer in enumerate(self._buffers) if buffer.parts)

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
        """Copy live values to tensors that the exchange does not reach any more, then exchange."""
        damage = {buffer.live._cdata: self._damage(index) for index, buffer in enumerate(self._buffers)}
        parts = {buffer.live._cdata for buffer in self._buffers if buffer.parts}
        moves: list[tuple[Tensor, Tensor]] = []
        errors: list[str] = []
        news: list[str] = []
        for entry in self._entries:
            home = entry.place[0]  # the live storage in which it was
            for name in entry.names:
                tensor = dtensor.local_part(now[name]) if name in now else None
                if tensor is not None and entry.is_in_place(tensor):
                    reason = damage[home]
                    if reason is None:
                        continue  # the exchange reaches it
                else:
                    reason = entry.why_not_into(tensor, self.storages)
                if reason is None:
                    assert tensor is not None
                    moves.append((tensor, entry.held))
                    if not entry.is_copied:
                        news.append(f"{name!r} was replaced or moved")
                elif entry.is_copied and not (home in parts and damage[home]):
                    news.append(f"{name!r} {reason} and keeps the value that it has")
                else:
                    errors.append(f"{name!r} {reason}")
            if not entry.is_copied and damage[home] is not None and not errors:
                errors.append(f"{entry.names[0]!r} {damage[home]}")  # its average, or its value, is lost with it
        if errors:
            raise SwapError(
                "the model was changed while the averaged weights were in it, and cannot take all of its trained "
                f"values back: {first_few(errors, 5, '; ')}. Nothing was changed. The trained values are in this "
                "error's `.live`, by name; or undo the change and call restore() again",
                {name: value.clone() for name, value in self.live_values().items()},
            )
        for tensor, value in moves:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # such a tensor takes nothing elsewhere
                tensor.copy_(value)
        self._leave([index for index, buffer in enumerate(self._buffers) if damage[buffer.live._cdata] is not None])
        if news:
            warnings.warn(
                f"the model was changed while the averaged weights were in it: {first_few(news, 5, '; ')}. All others "
                "have their trained values again, by copy where they were replaced or moved",
                stacklevel=6,
            )

    def _damage(self, index: int) -> str | None:
        """Return why a live storage cannot have its memory or its contents back; None: it can."""
        buffer, (live, other) = self._buffers[index], self._sizes[index]
        if buffer.live.nbytes() != live:
            return f"is in a storage of {buffer.live.nbytes():,} bytes now, had {live:,}"
        if buffer.storage.nbytes() != other:
            return f"has its trained value in a storage that was resized to {buffer.storage.nbytes():,} bytes"
        if isinstance(self._exchange, ContentsExchange) and not self._exchange.is_untouched(index):
            return "is in other memory now, and contents were exchanged in place"
        return None

    def __del__(self) -> None:
        # Nothing is exchanged back: who keeps the model and drops the EMA may mean just that, and weights that change
        # whenever the garbage collector comes are worse than a warning.
        exchange = getattr(self, "_exchange", None)
        if exchange is None or not exchange.entered or sys.is_finalizing():
            return
        entered.pop(id(self), None)
        warnings.warn(self._dropped, RuntimeWarning, stacklevel=2)

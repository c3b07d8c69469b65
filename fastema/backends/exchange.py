"""The exchange of live weights and averages: of their contents for every backend, of their pointers for torch's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastema.backends import contract
from fastema.memory.atomic_steps import Step, run_atomically

Storage: TypeAlias = torch.UntypedStorage
Pair: TypeAlias = tuple[Tensor, Tensor]
_EXCHANGE_BLOCK = 1 << 20  # bytes held twice while contents change places
SWAPS_POINTERS = hasattr(torch.UntypedStorage, "_swap_data_ptr_")  # torch 2.13 has it, 2.11 does not


def contents_steps(first: Tensor, second: Tensor) -> list[Step]:
    """Return the steps that swap the contents of two tensors of bytes."""
    held = first.new_empty(min(_EXCHANGE_BLOCK, first.numel()))
    copy = torch.Tensor.copy_
    steps: list[Step] = []
    for a, b in zip(first.split(_EXCHANGE_BLOCK), second.split(_EXCHANGE_BLOCK), strict=True):
        block = held[: a.numel()]
        steps += [partial(copy, block, a), partial(copy, a, b), partial(copy, b, block)]
    return steps


class _Exchange:
    """An exchange of live and shadow; see `contract.StorageExchange`.

    After an exception at any point of `enter()` nothing has changed; after one in `leave()`, it can be called again.
    """

    def __init__(self, managed: Sequence[Tensor], pairs: Sequence[tuple[Storage, Storage]]) -> None:
        self._storages = list(pairs)  # live and other
        # Inference tensors carry no counter, and no graph refers to them.
        self._managed = tuple(tensor for tensor in managed if not tensor.is_inference())
        self._versions: tuple[int, ...] = ()
        self._swap: list[Step] = []  # done twice it changes nothing
        self._done: list[Any] = []
        self._as_entered: list[tuple[int, ...]] = []
        self.entered = False

    def enter(self, version_step: int) -> None:
        if self.entered:
            raise RuntimeError("the exchange is already entered")
        self._swap, self._done = self._steps(), []
        self._versions = tuple(tensor._version for tensor in self._managed)
        try:
            self.entered = True
            self._set_versions(tuple(version + version_step for version in self._versions))
            run_atomically(self._swap, self._done)
            self._as_entered = list(map(self._memory, range(len(self._storages))))
        except BaseException:
            if self.entered:
                self._undo()
            raise

    def untouched(self) -> bool:
        return all(map(self.is_untouched, range(len(self._storages))))

    def leave_untouched(self) -> bool:
        if not self.untouched():
            return False
        self._undo()
        return True

    def is_untouched(self, index: int) -> bool:
        """Return whether one pair of storages has the memory and the sizes that it had when `enter()` was done."""
        return self._memory(index) == self._as_entered[index]

    def leave(self, staying: Sequence[int] = ()) -> None:
        if not self.entered:
            raise RuntimeError("the exchange is not entered")
        if staying:
            self._swap = self._steps(staying)
            self._done = [None] * len(self._swap)
        self._undo()

    def _undo(self) -> None:
        if len(self._done) == len(self._swap):  # else enter() failed before, or this is called again after an error
            run_atomically(self._swap, self._done)
        self._set_versions(self._versions)
        self.entered = False

    def _memory(self, index: int) -> tuple[int, ...]:
        return tuple(fact for storage in self._storages[index] for fact in (storage.data_ptr(), storage.nbytes()))

    def _steps(self, staying: Sequence[int] = ()) -> list[Step]:
        raise NotImplementedError

    def _set_versions(self, versions: tuple[int, ...]) -> None:
        torch._C._autograd._unsafe_set_version_counter(self._managed, versions)


class ContentsExchange(_Exchange):
    """The exchange of the contents of live and shadow: addresses stay, as captured CUDA graphs need it."""

    def __init__(
        self,
        plans: Sequence[contract.Plan],
        which: int,
        managed: Sequence[Tensor],
        pairs: Sequence[tuple[Storage, Storage]],
    ) -> None:
        super().__init__(managed, pairs)
        self._plans = list(plans)  # of any backend
        self._which = which

    def _steps(self, staying: Sequence[int] = ()) -> list[Step]:
        return [
            step
            for plan in self._plans
            for step in (
                plan.exchange_steps(self._which)
                if hasattr(plan, "exchange_steps")
                else [partial(plan.exchange, self._which)]
            )
        ]


class StorageExchange(_Exchange):
    """The exchange of live and shadow by the pointers of their storages, and of `parts` by their contents."""

    def __init__(
        self,
        lives: Sequence[Tensor],
        others: Sequence[Tensor],
        managed: Sequence[Tensor],
        parts: Sequence[Pair] = (),
    ) -> None:
        pairs = zip(lives, others, strict=True)
        super().__init__(managed, [(live.untyped_storage(), other.untyped_storage()) for live, other in pairs])
        self._pairs = list(zip(lives, others, strict=True))
        self._parts = list(parts)

    def _steps(self, staying: Sequence[int] = ()) -> list[Step]:
        steps = [step for pair in self._parts for step in contents_steps(*pair)]
        for index, (live, other) in enumerate(self._storages):
            if index in staying:
                continue
            if live.nbytes() != other.nbytes() or live.device != other.device:
                raise ValueError("storages that change places must have equal size and device")
            if SWAPS_POINTERS:
                steps.append(partial(torch.UntypedStorage._swap_data_ptr_, live, other))  # type: ignore[attr-defined]
            else:
                steps += contents_steps(*self._pairs[index])
        return steps

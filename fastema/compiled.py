"""`ema.update()` inside a function that `torch.compile` compiles: one opaque op that says what it changes.

The compiler may hand the op other memory than the model's own (an optimizer step compiled into the same graph writes
its results to buffers first), so it works on the tensors it is given. Eager updates do not come this way.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

UpdateOperands = Callable[[list[Tensor], list[Tensor], "int | None", "Tensor | None"], None]

_handles = itertools.count(1)
_updates: dict[int, weakref.WeakMethod[UpdateOperands]] = {}


def register(update_operands: UpdateOperands) -> int:
    """A number by which the op finds the bound method to call; it does not keep its object alive."""
    handle = next(_handles)
    _updates[handle] = weakref.WeakMethod(update_operands, lambda _: _updates.pop(handle, None))
    return handle


@torch.library.custom_op(
    "fastema::update",
    mutates_args=("shadows",),
    schema="(Tensor(a!)[] shadows, Tensor[] lives, int handle, int? step, Tensor? found_inf) -> ()",
)
def update(
    shadows: Sequence[Tensor], lives: Sequence[Tensor], handle: int, step: int | None, found_inf: Tensor | None
) -> None:
    """FastEMA.update() on what its `Shadow.operands()` are in the graph; `handle` finds the FastEMA."""
    update_operands = _updates[handle]() if handle in _updates else None
    if update_operands is None:
        raise RuntimeError("the FastEMA that was compiled into this graph no longer exists")
    update_operands(list(shadows), list(lives), step, found_inf)


@update.register_fake
def _(
    shadows: Sequence[Tensor], lives: Sequence[Tensor], handle: int, step: int | None, found_inf: Tensor | None
) -> None:
    return None

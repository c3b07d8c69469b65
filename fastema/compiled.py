"""`ema.update()` inside a function that `torch.compile` compiles: one opaque op that says what it changes.

The compiler may hand the op other memory than the model's own (an optimizer step compiled into the same graph writes
its results to buffers first), so it works on the tensors it is given. Eager updates do not come this way.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastema.ema import FastEMA

_handles = itertools.count(1)
_emas: weakref.WeakValueDictionary[int, FastEMA] = weakref.WeakValueDictionary()


def register(ema: FastEMA) -> int:
    """A number by which the op finds `ema`."""
    handle = next(_handles)
    _emas[handle] = ema
    return handle


@torch.library.custom_op("fastema::update", mutates_args=("shadows",))
def update(
    shadows: Sequence[Tensor], lives: Sequence[Tensor], handle: int, step: int | None, found_inf: Tensor | None
) -> None:
    """FastEMA.update() on what its `Shadow.operands()` are in the graph; `handle` finds the FastEMA."""
    ema = _emas.get(handle)
    if ema is None:
        raise RuntimeError("the FastEMA that was compiled into this graph no longer exists")
    ema._update_operands(list(shadows), list(lives), step, found_inf)


@update.register_fake
def _(
    shadows: Sequence[Tensor], lives: Sequence[Tensor], handle: int, step: int | None, found_inf: Tensor | None
) -> None:
    return None

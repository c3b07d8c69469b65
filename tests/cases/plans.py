"""Plans over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastema.backends.contract import Segment


def plan_of(
    module: Any,
    shadows: Sequence[Sequence[Tensor]],
    lives: Sequence[Tensor],
    copies: Sequence[bool] | bool = False,
    views: Sequence[Tensor] = (),
    lows: Sequence[Sequence[Tensor]] = (),
) -> Any:
    """Return a backend's plan.

    Args:
        module: the backend.
        shadows: [K][segments].
        lives: [segments].
        copies: for each segment, or for all, whether it is copied.
        views: as `contract.Plan`.
        lows: [K][segments]; empty: there are none.
    """
    every = [copies] * len(lives) if isinstance(copies, bool) else copies
    return module.Plan(
        [
            Segment([shadow[i] for shadow in shadows], live, copy, [low[i] for low in lows])
            for i, (live, copy) in enumerate(zip(lives, every, strict=True))
        ],
        views,
    )

"""The base of the adapters for timm and diffusers: an engine whose averages are the library's own tensors.

Those classes hold their averages as ordinary tensors (a module's, or a list), are handed the live weights with every
call, and have their own formula for the decay. Here such averages become views of an engine's shadow, so that one
kernel updates them where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fastema.backends.contract import UpdateArgs
from fastema.core import state
from fastema.core.checks import OneThread, checked_decay, checked_device, checked_shadow_dtype, one_thread
from fastema.core.engine import Engine
from fastema.core.policy import Policy, Source, named_tensors
from fastema.core.storages import shadow_dtype
from fastema.core.tensors import refuse_elsewhere


class ExternalAverage:
    """The average of `source`, given the decay with every update; it lets NaN through as its originals do.

    Args:
        source: as FastEMA takes it.
        decay: the highest it will be given.
        policy, dtype, device: FastEMA's.
        may_split: True if float32 averages of bfloat16 tensors may be kept in two planes.
    """

    def __init__(
        self,
        source: Source,
        decay: float,
        policy: Policy,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        may_split: bool = False,
    ) -> None:
        refuse_elsewhere("this average", named_tensors(source))  # the engine would go on with parts of tensors
        self.source = source
        dtype = checked_shadow_dtype(dtype, checked_decay(decay))
        self._engine = Engine(source, policy=policy, dtype=dtype, device=checked_device(device), may_split=may_split)
        self._at_last_update = self._engine.averages
        self._one_thread = OneThread()

    def averages(self) -> dict[str, Tensor]:
        """Return the averages by name, sharing memory with the EMA. Right while swapped in, too."""
        return state.averages_by_name(self._engine.averages, 0)

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors that updates write, by name: the averages, or the high planes of those in two."""
        return state.by_name(self._engine.averages.weights(0), saved_only=False)

    def lows(self) -> dict[str, Tensor]:
        """Return the low planes of the averages that are in two, by name."""
        averages = state.stored_by_name(self._engine.averages, 0)
        return {name: average.low for name, average in averages.items() if average.low is not None}

    def fill(self, values: dict[str, Tensor]) -> None:
        """Copy values into the averages of the same names."""
        state.fill(self._engine.averages, 0, values)

    @one_thread
    def update(self, decay: float) -> bool:
        """Average `source` as it is now.

        Returns:
            Whether the live weights had moved in memory, so that the averages are other tensors now.
        """
        self._engine.refuse_while_applied("update()")
        self._engine.update(UpdateArgs([1.0 - checked_decay(decay)], skip_nonfinite=False))
        moved = self._engine.averages is not self._at_last_update
        self._at_last_update = self._engine.averages
        return moved

    def refuse_while_swapped(self, what: str) -> None:
        """Raise RuntimeError while any averages are in the weights, or others in the place of these averages."""
        self._engine.refuse_while_applied(what)

    def swapped(self) -> AbstractContextManager[None]:
        """Open a block in which the averages are in the live tensors."""
        return self._engine.swapped()

    def live_values(self) -> dict[str, Tensor]:
        """Return the trained values by name, while the averages are in their place."""
        return self._engine.averages.live_values()

    def restore(self) -> None:
        """Put the trained weights back before the end of the block, or after a `SwapError`."""
        self._engine.averages.restore()

    @property
    def is_applied(self) -> bool:
        return self._engine.is_applied


def shadow_like(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[torch.dtype | None, torch.device | None]:
    """Return the dtype and device for FastEMA with which its shadow is like averages that exist already.

    Averages in 16 bits are widened to float32, in which they move.

    Args:
        pairs: live tensor and its average, of all that is averaged.

    Raises:
        ValueError: no one dtype or device does for all.
    """
    known = [(live, average, shadow_dtype(average.dtype, None)) for live, average in pairs]
    dtype, device = None, None
    if any(wanted != shadow_dtype(live.dtype, None) for live, _, wanted in known):
        dtypes = {wanted for _, _, wanted in known}
        if len(dtypes) > 1:
            raise ValueError(f"the averages are in several dtypes ({_listed(dtypes)}): convert them to one")
        (dtype,) = dtypes
    if any(average.device != live.device for live, average, _ in known):
        devices = {average.device for _, average, _ in known}
        if len(devices) > 1:
            raise ValueError(
                f"the averages are on several devices ({_listed(devices)}), and not where the weights are: move them "
                "to one"
            )
        (device,) = devices
    return dtype, device


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))

"""The decays of a FastEMA: one or several targets, and which of their values an update at a given step uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastema.checks import checked_count, checked_decays
from fastema.schedules import make_schedule


class Decays:
    """Targets, schedule and start; numbers come as a float for one decay and as a tuple for a sequence of them.

    Args:
        decay, decay_type, total_steps, update_after_step, decay_args: as in FastEMA.

    Raises:
        ValueError, TypeError: as in FastEMA.
    """

    def __init__(
        self,
        decay: float | Sequence[float],
        decay_type: str,
        total_steps: int | None,
        update_after_step: int,
        decay_args: dict[str, Any],
    ) -> None:
        self.targets, self.several = checked_decays(decay)
        self.type = decay_type
        self.total_steps = total_steps
        self.schedule = make_schedule(decay_type, total_steps, decay_args)
        self._update_after_step = checked_count("update_after_step", update_after_step, at_least=0)

    def __len__(self) -> int:
        return len(self.targets)

    def at(self, step: int) -> list[float]:
        """The decays of an update at optimizer step `step`, from 1.

        Raises:
            ValueError: a schedule of the user's own left [0, 1].
        """
        if step <= self._update_after_step:
            return [0.0] * len(self.targets)
        decays = [self.schedule(target, step, self.total_steps) for target in self.targets]
        for decay in decays:
            if not 0.0 <= decay <= 1.0:
                raise ValueError(f"decay_type {self.type!r} gave decay {decay} at step {step}; it must be in [0, 1]")
        return decays

    def windows(self) -> list[float]:
        """How many updates each average reaches back: 1 / (1 - decay)."""
        return [math.inf if target == 1.0 else 1.0 / (1.0 - target) for target in self.targets]

    def one_or_all(self, values: Sequence[float]) -> Any:
        """What a user gets who gave one decay, or several."""
        return tuple(values) if self.several else values[0]

    def config(self) -> dict[str, Any]:
        """For a state: plain values that tell one configuration from another."""
        return {"decay": list(self.targets) if self.several else self.targets[0], "decay_type": self.type}

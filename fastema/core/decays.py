"""The target decays and the schedules of a FastEMA's averages."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from fastema.core.checks import checked_count, checked_decays, first_few
from fastema.schedules import make_schedule, schedule_class, takes_argument


def updates_back(decay: float) -> float:
    """Return how many updates an average with `decay` covers: 1 / (1 - decay)."""
    return math.inf if decay == 1.0 else 1.0 / (1.0 - decay)


def arguments_of(ema_params: Mapping[str, Any]) -> dict[str, Any]:
    """Return FastEMA's arguments for a recipe's dictionary; see `FastEMA.from_params`."""
    if "ema_params" in ema_params or isinstance(ema_params.get("ema"), bool):
        raise ValueError(
            f"from_params() needs the dictionary of the average, and got a whole training_params "
            f"({first_few([repr(name) for name in ema_params])}): pass training_params['ema_params'], and build no "
            "average where training_params['ema'] is false"
        )
    arguments = {"decay": 0.9999, **{name: value for name, value in ema_params.items() if value is not None}}
    decay_type = "exp" if arguments.pop("exp_activation", True) else "constant"
    arguments.setdefault("decay_type", decay_type)
    if not takes_argument(arguments["decay_type"], "beta"):
        arguments.pop("beta", None)
    return arguments


class Decays:
    """Targets and schedules of a FastEMA's averages; numbers come as a tuple where there are several.

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
        decay_args: Mapping[str, Any],
    ) -> None:
        targets, several = checked_decays(decay)
        if _is_sequence(decay_type):
            raise TypeError(
                f"decay_type is one name, the schedule of all averages, got {decay_type!r}: build a FastEMA for each "
                "schedule, or give several decays, sigma_rel, gamma or half-lives of one"
            )
        per_average = schedule_class(decay_type).per_average
        sequences = {
            name: tuple(value) for name, value in decay_args.items() if name in per_average and _is_sequence(value)
        }
        lengths = {"decay": len(targets)} if several else {}
        lengths |= {name: len(value) for name, value in sequences.items()}
        count = next(iter(lengths.values()), 1)
        if any(length != count for length in lengths.values()) or count == 0:
            given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(f"every sequence must have one entry for each average: {given}")
        self.several = bool(lengths)
        self.total_steps = total_steps
        self.update_after_step = checked_count("update_after_step", update_after_step, at_least=0)
        self.type = decay_type
        self._args = {name: list(sequences.get(name, ())) or value for name, value in decay_args.items()}
        self.schedules = tuple(
            make_schedule(decay_type, total_steps, {**decay_args, **{name: sequences[name][i] for name in sequences}})
            for i in range(count)
        )
        self.settles = all(schedule.settles for schedule in self.schedules)  # every decay reaches its target, and stays
        self._set_targets(targets if several else targets * count)

    def _set_targets(self, targets: tuple[float, ...]) -> None:
        self.targets = targets
        self._settled_at: float = math.inf  # from this step on every decay is its target
        self._pairs = list(zip(self.schedules, targets, strict=True))

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def highest(self) -> float:
        """The highest decay that can occur."""
        return max(target if schedule.has_target else 1.0 for schedule, target in self._pairs)

    def at(self, step: int, last_update: int | None = None) -> tuple[float, ...]:
        """Return the decay of every average for an update at optimizer step `step`.

        Args:
            step: from 1.
            last_update: the step of the update before, 0 if there was none; None: `step - 1`.

        Raises:
            ValueError: a user's schedule returned a decay outside [0, 1], or `step` is before the last update.
        """
        if step >= self._settled_at:
            return self.targets
        decays = self._of_schedules(step, step - 1 if last_update is None else last_update)
        for decay in decays:
            if not 0.0 <= decay <= 1.0:
                raise ValueError(f"decay_type {self.type!r} gave decay {decay} at step {step}; it must be in [0, 1]")
        if decays == self.targets and self.settles:
            self._settled_at = step
        return decays

    def _of_schedules(self, step: int, last_update: int) -> tuple[float, ...]:
        last_step, begin = self.total_steps, self.update_after_step
        # A list is faster than a generator, and this runs at every step until the decays have settled.
        return tuple([schedule.at(target, step, last_step, last_update, begin) for schedule, target in self._pairs])

    def warn_of_a_late_start(self, step: int, update_every: int) -> None:
        """Warn if a first update that is late gives what FastEMA was built on less, for the steps in between."""
        decays, without_gap = self._of_schedules(step, 0), self._of_schedules(step, step - update_every)
        lost = [which for which, pair in enumerate(zip(decays, without_gap, strict=True)) if pair[0] < pair[1]]
        if lost and step > self.update_after_step:
            which = lost[0]
            warnings.warn(
                f"the first update is told step {step}: of what FastEMA was built on, decay_type "
                f"{self.type!r} leaves {decays[which]:.3g}, since it was not updated in {step} steps. If that "
                f"is an average of earlier steps, say so before: load_state_dict({{'step': {step - 1}, 'num_updates': "
                f"{step - 1}, 'shadow': ...}}). If the average begins here, nothing is lost",
                stacklevel=4,
            )

    def checked(self, decay: float | Sequence[float], what: str) -> tuple[float, ...]:
        """Return `decay` as one value for each average.

        Args:
            decay: one for all, or one for each.
            what: the call that got it, for the errors.

        Raises:
            ValueError: out of range, another number of them, or a schedule that has no target decay.
        """
        targets, several = checked_decays(decay)
        if several and len(targets) != len(self):
            raise ValueError(f"{what} got {len(targets)} decays for {len(self)} averages")
        if not self.schedules[0].has_target:
            raise ValueError(f"{what} needs a target decay, and the {self.type!r} schedule has none")
        return targets if several else targets * len(self)

    def with_targets(self, targets: Sequence[float]) -> Decays:
        """Return the same schedules with other targets, one for each average."""
        other = copy.copy(self)
        other._set_targets(tuple(targets))
        return other

    def windows(self, step: int) -> list[float]:
        """Return how many updates each average covers: 1 / (1 - decay), by the decay at `step` without a target."""
        now = self.at(step)
        decays = self.targets if self.schedules[0].has_target else now
        return [updates_back(decay) for decay in decays]

    def one_or_all(self, values: Sequence[float]) -> Any:
        """Return a tuple for a user who gave several, else the one value."""
        return tuple(values) if self.several else values[0]

    def arguments(self) -> dict[str, Any]:
        """Return plain values from which this object can be rebuilt."""
        rest = {"total_steps": self.total_steps, "update_after_step": self.update_after_step}
        return {**self.config(), **rest}

    def config(self) -> dict[str, Any]:
        """Return plain values for a state."""
        decay = list(self.targets) if self.several else self.targets[0]
        return {"decay": decay, "decay_type": self.type, "decay_args": dict(self._args)}

    def of_state(self, state: Mapping[str, Any]) -> Decays:
        """Return the decays of a saved state; values that it lacks are taken from this object.

        Raises:
            ValueError: the state's schedule cannot be built here.
        """
        config = self.config()
        if all(state.get(key, config.get(key)) == config.get(key) for key in ("decay", "decay_type", "decay_args")):
            return self
        decay, decay_type = state.get("decay", config["decay"]), state.get("decay_type", self.type)
        if _is_sequence(decay_type) and len(set(decay_type)) == 1:  # 0.2.0 could have several
            decay_type = decay_type[0]
        args = state.get("decay_args", self._args if decay_type == self.type else {})
        try:
            return Decays(decay, decay_type, self.total_steps, self.update_after_step, args)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the state was averaged with decay={decay!r}, decay_type={decay_type!r}: {error}"
            ) from error


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)

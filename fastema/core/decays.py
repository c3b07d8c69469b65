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

    _settled_at: float = math.inf  # from this step on every decay is its target

    def __init__(
        self,
        decay: float | Sequence[float],
        decay_type: str | Sequence[str],
        total_steps: int | None,
        update_after_step: int,
        decay_args: Mapping[str, Any],
    ) -> None:
        targets, several = checked_decays(decay)
        several_types = _is_sequence(decay_type)
        types: tuple[str, ...] = tuple(decay_type) if several_types else (decay_type,)  # type: ignore[assignment]
        classes = [schedule_class(each) for each in types]
        per_average = {name for each in classes for name in each.per_average}
        sequences = {
            name: tuple(value) for name, value in decay_args.items() if name in per_average and _is_sequence(value)
        }
        lengths = {"decay": len(targets)} if several else {}
        lengths |= {"decay_type": len(types)} if several_types else {}
        lengths |= {name: len(value) for name, value in sequences.items()}
        count = next(iter(lengths.values()), 1)
        if any(length != count for length in lengths.values()) or count == 0:
            given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(f"every sequence must have one entry for each average: {given}")
        self.several = bool(lengths)
        self.targets = targets if several else targets * count
        self.total_steps = total_steps
        self.update_after_step = checked_count("update_after_step", update_after_step, at_least=0)
        self.type: str | list[str] = list(types) if several_types else types[0]  # the name, or one for each average
        self._args = {name: list(sequences[name]) if name in sequences else value for name, value in decay_args.items()}
        self._types = types if several_types else types * count
        schedules = []
        for which, each in enumerate(self._types):
            arguments = {name: sequences[name][which] if name in sequences else decay_args[name] for name in decay_args}
            if several_types:  # each takes its own
                takes = [name for name in arguments if takes_argument(each, name)]
                arguments = {name: arguments[name] for name in takes if arguments[name] is not None}
            schedules.append(make_schedule(each, total_steps, arguments))
        self.schedules = tuple(schedules)
        unknown = [name for name in decay_args if not any(takes_argument(each, name) for each in types)]
        if unknown:
            raise TypeError(f"FastEMA and decay_type {decay_type!r} do not take the arguments: {', '.join(unknown)}")

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def settles(self) -> bool:
        """True if every decay reaches its target and stays there."""
        return all(schedule.settles for schedule in self.schedules)

    @property
    def highest(self) -> float:
        """The highest decay that can occur."""
        pairs = zip(self.schedules, self.targets, strict=True)
        return max(target if schedule.has_target else 1.0 for schedule, target in pairs)

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
        for decay, name in zip(decays, self._types, strict=True):
            if not 0.0 <= decay <= 1.0:
                raise ValueError(f"decay_type {name!r} gave decay {decay} at step {step}; it must be in [0, 1]")
        if decays == self.targets and self.settles:
            self._settled_at = step
        return decays

    def _of_schedules(self, step: int, last_update: int) -> tuple[float, ...]:
        return tuple(
            schedule.at(target, step, self.total_steps, last_update, self.update_after_step)
            for schedule, target in zip(self.schedules, self.targets, strict=True)
        )

    def warn_of_a_late_start(self, step: int, update_every: int) -> None:
        """Warn if a first update that is late gives what FastEMA was built on less, for the steps in between."""
        decays, without_gap = self._of_schedules(step, 0), self._of_schedules(step, step - update_every)
        lost = [which for which, pair in enumerate(zip(decays, without_gap, strict=True)) if pair[0] < pair[1]]
        if lost and step > self.update_after_step:
            which = lost[0]
            warnings.warn(
                f"the first update is told step {step}: of what FastEMA was built on, decay_type "
                f"{self._types[which]!r} leaves {decays[which]:.3g}, since it was not updated in {step} steps. If that "
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
        without = [name for name, each in zip(self._types, self.schedules, strict=True) if not each.has_target]
        if without:
            raise ValueError(f"{what} needs a target decay, and the {without[0]!r} schedule has none")
        return targets if several else targets * len(self)

    def with_targets(self, targets: Sequence[float]) -> Decays:
        """Return the same schedules with other targets, one for each average."""
        other = copy.copy(self)
        other.targets = tuple(targets)
        other._settled_at = math.inf
        return other

    def windows(self, step: int) -> list[float]:
        """Return how many updates each average covers: 1 / (1 - decay), by the decay at `step` without a target."""
        now = self.at(step)
        pairs = zip(self.targets, self.schedules, now, strict=True)
        decays = [target if schedule.has_target else current for target, schedule, current in pairs]
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
        args = state.get("decay_args", self._args if decay_type == self.type else {})
        try:
            return Decays(decay, decay_type, self.total_steps, self.update_after_step, args)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the state was averaged with decay={decay!r}, decay_type={decay_type!r}: {error}"
            ) from error


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)

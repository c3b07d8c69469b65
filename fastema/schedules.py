"""Decay schedules: which decay an update at a given optimizer step uses.

A schedule maps (decay, step, total_steps) to the decay of that step. `EMA_DECAY_FUNCTIONS` is the registry behind
`FastEMA(decay_type=...)`; put your own class in it to give it a name.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from typing import Any


class IDecayFunction(ABC):
    """A decay schedule. Subclass it, and register the class in `EMA_DECAY_FUNCTIONS`.

    The constructor gets the keyword arguments that FastEMA does not know itself (`FastEMA(model, beta=15)`).

    Example:
        >>> class HalfDecay(IDecayFunction):
        ...     def __init__(self, **kwargs): ...
        ...     def __call__(self, decay, step, total_steps):
        ...         return decay / 2
        >>> EMA_DECAY_FUNCTIONS["half"] = HalfDecay
        >>> FastEMA(torch.nn.Linear(2, 2), decay=0.9, decay_type="half").decay_at(1)
        0.45
        >>> del EMA_DECAY_FUNCTIONS["half"]
    """

    #: Whether the schedule is undefined without `total_steps`.
    needs_total_steps: bool = False
    #: Whether the decay stays at the target once it has reached it.
    settles: bool = False

    @abstractmethod
    def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
        """Returns the decay, in [0, 1].

        Args:
            decay: the target decay, in [0, 1].
            step: number of optimizer steps so far, from 1.
            total_steps: number of optimizer steps of the whole training, if known.
        """


class ConstantDecay(IDecayFunction):
    """`decay`, always."""

    settles = True

    def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
        return decay


class ThresholdDecay(IDecayFunction):
    """`min(decay, (1 + step) / (10 + step))`: the warm-up of TensorFlow's ExponentialMovingAverage(num_updates=...)."""

    settles = True

    def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
        return min(decay, (1 + step) / (10 + step))


class ExpDecay(IDecayFunction):
    """`decay * (1 - exp(-beta * step / total_steps))`, as in super-gradients and YOLO."""

    needs_total_steps = True
    settles = True

    def __init__(self, beta: float = 15.0) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        self.beta = beta

    def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
        assert total_steps is not None  # FastEMA checks needs_total_steps
        return decay * (1 - math.exp(-self.beta * step / total_steps))


class LinearDecay(IDecayFunction):
    """`decay * step / total_steps`; `decay` from the last step on."""

    needs_total_steps = True
    settles = True

    def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
        assert total_steps is not None
        return decay * min(step / total_steps, 1.0)


class WarmupDecay(IDecayFunction):
    """`min(decay, 1 - (1 + step / inv_gamma) ** -power)`: the warm-up of timm, diffusers and ema-pytorch.

    power 2/3 for runs of a million steps and more, 3/4 to reach 0.999 in 10,000 steps (crowsonkb/k-diffusion).
    """

    settles = True

    def __init__(self, inv_gamma: float = 1.0, power: float = 2 / 3) -> None:
        if not (inv_gamma > 0 and power > 0):
            raise ValueError(f"inv_gamma and power must be positive, got {inv_gamma} and {power}")
        self.inv_gamma = inv_gamma
        self.power = power

    def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
        return min(decay, 1 - (1 + step / self.inv_gamma) ** -self.power)


EMA_DECAY_FUNCTIONS: dict[str, type[IDecayFunction]] = {
    "constant": ConstantDecay,
    "threshold": ThresholdDecay,
    "exp": ExpDecay,
    "linear": LinearDecay,
    "warmup": WarmupDecay,
}


def takes_argument(decay_type: str, name: str) -> bool:
    """Return whether a schedule's constructor takes an argument; True where the schedule is unknown."""
    if decay_type not in EMA_DECAY_FUNCTIONS:
        return True
    parameters = inspect.signature(EMA_DECAY_FUNCTIONS[decay_type]).parameters.values()
    return any(each.name == name or each.kind is each.VAR_KEYWORD for each in parameters)


def make_schedule(decay_type: str, total_steps: int | None, decay_args: dict[str, Any]) -> IDecayFunction:
    """Builds a registered schedule.

    Raises:
        ValueError: unknown `decay_type`, a schedule that needs `total_steps` without it, or a bad argument.
        TypeError: an argument that the schedule does not take.
    """
    if decay_type not in EMA_DECAY_FUNCTIONS:
        raise ValueError(f"unknown decay_type {decay_type!r}; known: {', '.join(sorted(EMA_DECAY_FUNCTIONS))}")
    if total_steps is not None and (not isinstance(total_steps, int) or total_steps < 1):
        raise ValueError(f"total_steps must be a positive int, got {total_steps!r}")
    schedule_class = EMA_DECAY_FUNCTIONS[decay_type]
    try:
        schedule = schedule_class(**decay_args)
    except TypeError as error:
        names = ", ".join(decay_args)
        raise TypeError(f"FastEMA and decay_type {decay_type!r} do not take the arguments: {names} ({error})") from None
    if schedule.needs_total_steps and total_steps is None:
        raise ValueError(f"decay_type {decay_type!r} needs total_steps, the number of optimizer steps of the training")
    return schedule

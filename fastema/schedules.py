"""Decay schedules: which decay the update at a given optimizer step uses.

`EMA_DECAY_FUNCTIONS` is the registry behind `FastEMA(decay_type=...)`; register a class of your own in it to give it a
name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any


class IDecayFunction:
    """A decay schedule. Subclass it, define `__call__` or `at`, and register the class in `EMA_DECAY_FUNCTIONS`.

    The constructor gets the keyword arguments that FastEMA does not know itself (`FastEMA(model, beta=15)`).

    Examples:
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
    #: Whether the decay stays at the target once it has reached it; `capturable=True` needs total_steps where not.
    settles: bool = False
    #: Whether `decay` matters; if not, `set_decay()` refuses.
    has_target: bool = True
    #: Arguments of the constructor that may differ between averages: a sequence of them makes as many averages.
    per_average: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> IDecayFunction:
        if cls.__call__ is IDecayFunction.__call__ and cls.at is IDecayFunction.at:
            raise TypeError(f"{cls.__name__} is abstract: define __call__(decay, step, total_steps), or at(...)")
        return super().__new__(cls)

    def __init__(self) -> None:
        pass

    def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
        """Return the decay, in [0, 1].

        Args:
            decay: the target decay, in [0, 1].
            step: number of optimizer steps so far, from 1.
            total_steps: number of optimizer steps of the whole training, if known.
        """
        return self.at(decay, step, total_steps, step - 1, 0)

    def at(self, decay: float, step: int, total_steps: int | None, last_update: int, update_after_step: int) -> float:
        """Return the decay, in [0, 1], for schedules that need to know more than `__call__` is told.

        Args:
            decay, step, total_steps: as for `__call__`.
            last_update: the optimizer step of the update before, 0 at the first one.
            update_after_step: as in FastEMA; up to it the average is to follow the model, which is decay 0.
        """
        return 0.0 if step <= update_after_step else self(decay, step, total_steps)


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
    """`min(decay, 1 - (1 + s / inv_gamma) ** -power)` with `s = max(0, step - update_after_step - 1)`.

    timm's and diffusers' warm-up to the bit, and ema-pytorch's: the first update after `update_after_step` copies.
    power 2/3 for runs of a million steps and more, 3/4 to reach 0.999 in 10,000 steps (crowsonkb/k-diffusion).
    """

    settles = True

    def __init__(self, inv_gamma: float = 1.0, power: float = 2 / 3) -> None:
        if not (inv_gamma > 0 and power > 0):
            raise ValueError(f"inv_gamma and power must be positive, got {inv_gamma} and {power}")
        self.inv_gamma = inv_gamma
        self.power = power

    def at(self, decay: float, step: int, total_steps: int | None, last_update: int, update_after_step: int) -> float:
        since = max(0, step - update_after_step - 1)
        return min(decay, 1 - (1 + since / self.inv_gamma) ** -self.power)


class DebiasedDecay(IDecayFunction):
    """`decay * (1 - decay**(n - 1)) / (1 - decay**n)` at update n: the initial weights count for nothing.

    It is an average that starts from zero, divided by the sum of its weights (Adam's bias correction). Decay 1 gives
    the mean of all weights since `update_after_step`.
    """

    settles = True

    def at(self, decay: float, step: int, total_steps: int | None, last_update: int, update_after_step: int) -> float:
        time, gap = _time_and_gap(step, last_update, update_after_step)
        if time == gap or decay == 0.0:
            return 0.0
        if gap == 0:
            return 1.0  # the same step once more adds nothing
        updates = time / gap
        if decay == 1.0:
            return 1.0 - 1.0 / updates
        log = math.log(decay)
        return decay * (math.expm1((updates - 1) * log) / math.expm1(updates * log))


class PowerDecay(IDecayFunction):
    """`(1 - gap / t) ** (gamma + 1)`: the average weighs step s of t by about `s ** gamma` (Karras et al. 2312.02696).

    t counts optimizer steps since `update_after_step`, and the gap those since the update before, so that updates at
    every second step give the same profile. The first update copies.

    Args:
        sigma_rel: the standard deviation of the profile over the length of the run, at most 0.2887; or
        gamma: the exponent; 0 is the plain mean. A sequence of either keeps as many averages.
    """

    has_target = False
    per_average = ("sigma_rel", "gamma")

    def __init__(self, sigma_rel: float | None = None, gamma: float | None = None) -> None:
        if (sigma_rel is None) == (gamma is None):
            raise ValueError(f"power takes sigma_rel or gamma, got sigma_rel={sigma_rel} and gamma={gamma}")
        if gamma is None:
            assert sigma_rel is not None
            gamma = gamma_of(sigma_rel)
        elif gamma != 0 and not _is_positive(gamma):
            raise ValueError(f"gamma must be a number of at least 0, got {gamma!r}")
        self.gamma = float(gamma)

    def at(self, decay: float, step: int, total_steps: int | None, last_update: int, update_after_step: int) -> float:
        time, gap = _time_and_gap(step, last_update, update_after_step)
        return (1.0 - gap / time) ** (self.gamma + 1.0) if time else 0.0


class HalfLifeDecay(IDecayFunction):
    """`2 ** (-gap * batch_size / half_life)`: after `half_life` steps, weights count half.

    Args:
        half_life: in optimizer steps; in images, with `batch_size`. A sequence keeps as many averages.
        batch_size: images a step.
        rampup_ratio: the half-life is at most this share of the run so far (EDM2's is 0.05).
    """

    has_target = False
    per_average = ("half_life",)

    def __init__(self, half_life: float, batch_size: float = 1, rampup_ratio: float | None = None) -> None:
        for name, value in (("half_life", half_life), ("batch_size", batch_size), ("rampup_ratio", rampup_ratio)):
            if value is not None and not _is_positive(value):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        self.half_life = half_life
        self.batch_size = batch_size
        self.rampup_ratio = rampup_ratio

    def at(self, decay: float, step: int, total_steps: int | None, last_update: int, update_after_step: int) -> float:
        time, gap = _time_and_gap(step, last_update, update_after_step)
        if not time:
            return 0.0
        half_life = self.half_life / self.batch_size
        if self.rampup_ratio is not None:
            half_life = min(half_life, self.rampup_ratio * time)
        return 2.0 ** (-gap / half_life)


class HalfLifeFractionDecay(IDecayFunction):
    """`2 ** (-gap / (half_life_fraction * t))`: the half-life is a share of the run so far.

    torchtitan's, whose default is 0.05; Anytime-WA (2602.03702). Close to power with
    `gamma = ln(2) / half_life_fraction - 1`.
    """

    has_target = False
    per_average = ("half_life_fraction",)

    def __init__(self, half_life_fraction: float = 0.05) -> None:
        if not _is_positive(half_life_fraction):
            raise ValueError(f"half_life_fraction must be a positive number, got {half_life_fraction!r}")
        self.half_life_fraction = half_life_fraction

    def at(self, decay: float, step: int, total_steps: int | None, last_update: int, update_after_step: int) -> float:
        time, gap = _time_and_gap(step, last_update, update_after_step)
        return 2.0 ** (-gap / (self.half_life_fraction * time)) if time else 0.0


EMA_DECAY_FUNCTIONS: dict[str, type[IDecayFunction]] = {
    "constant": ConstantDecay,
    "threshold": ThresholdDecay,
    "exp": ExpDecay,
    "linear": LinearDecay,
    "warmup": WarmupDecay,
    "debiased": DebiasedDecay,
    "power": PowerDecay,
    "half_life": HalfLifeDecay,
    "half_life_fraction": HalfLifeFractionDecay,
}


def takes_argument(decay_type: str, name: str) -> bool:
    """Return whether a schedule's constructor takes an argument; True where the schedule is unknown."""
    if decay_type not in EMA_DECAY_FUNCTIONS:
        return True
    constructor = EMA_DECAY_FUNCTIONS[decay_type].__init__
    if constructor is object.__init__:
        return False
    parameters = inspect.signature(constructor).parameters.values()
    return any(each.name == name or each.kind is each.VAR_KEYWORD for each in parameters)


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the power profile whose standard deviation is `sigma_rel` of the run's length.

    It is the largest real root of `g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2` (2312.02696, algorithm 2).

    Raises:
        ValueError: `sigma_rel` is not in (0, 0.2886]; gamma would be negative.

    Examples:
        >>> round(gamma_of(0.05), 2), round(gamma_of(0.10), 2)
        (16.97, 6.94)
    """
    if not _is_positive(sigma_rel) or not sigma_rel <= 12**-0.5:
        raise ValueError(
            f"sigma_rel must be in (0, {12**-0.5:.4f}], the standard deviation of the plain mean; got {sigma_rel!r}"
        )
    # The variance falls as gamma grows: bisection cannot miss, and needs no eigenvalues of a companion matrix.
    low, high = 0.0, 2.0 / sigma_rel
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sigma_rel_of(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def sigma_rel_of(gamma: float) -> float:
    """Return the standard deviation of the power profile over the length of the run.

    Examples:
        >>> round(sigma_rel_of(6.94), 3)
        0.1
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def make_schedule(decay_type: str, total_steps: int | None, decay_args: Mapping[str, Any]) -> IDecayFunction:
    """Build a registered schedule.

    Raises:
        ValueError: unknown `decay_type`, a schedule that needs `total_steps` without it, or a bad argument.
        TypeError: an argument that the schedule does not take.
    """
    kind = schedule_class(decay_type)
    if total_steps is not None and (not isinstance(total_steps, int) or total_steps < 1):
        raise ValueError(f"total_steps must be a positive int, got {total_steps!r}")
    try:
        schedule = kind(**decay_args)
    except TypeError as error:
        names = ", ".join(decay_args)
        raise TypeError(f"FastEMA and decay_type {decay_type!r} do not take the arguments: {names} ({error})") from None
    if schedule.needs_total_steps and total_steps is None:
        raise ValueError(f"decay_type {decay_type!r} needs total_steps, the number of optimizer steps of the training")
    return schedule


def _time_and_gap(step: int, last_update: int, update_after_step: int) -> tuple[int, int]:
    """Return the steps since `update_after_step`, and those since the last update or `update_after_step`."""
    if last_update > step:
        raise ValueError(f"step {step} lies before the last update's, {last_update}: steps must not decrease")
    time = max(0, step - update_after_step)
    return time, time - max(0, last_update - update_after_step)


def _is_positive(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def schedule_class(decay_type: str) -> type[IDecayFunction]:
    """Return what is registered under the name, or raise ValueError with the known names."""
    if not isinstance(decay_type, str) or decay_type not in EMA_DECAY_FUNCTIONS:
        raise ValueError(f"unknown decay_type {decay_type!r}; known: {', '.join(sorted(EMA_DECAY_FUNCTIONS))}")
    return EMA_DECAY_FUNCTIONS[decay_type]

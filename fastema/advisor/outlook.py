"""The gain that an average can bring at the end of a run, from the learning rate alone.

An average smooths the noise that the learning rate keeps up, and it is made of older weights. A rate that stays high
leaves much noise to smooth. A rate that went to 0 has smoothed it already, and the older weights are only older.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastema.core.checks import checked_count
from fastema.core.decays import Decays

Case = Literal["much", "some", "little"]

#: Learning-rate schedules by name: the share of the highest rate when a share of the run is done, without the floor.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "wsd": lambda done: min(1.0, 5 * (1 - done)),
    "restarts": lambda done: LR_SCHEDULES["cosine"](_share_of_cycle(done)),
}

_USE: dict[Case, str] = {
    "much": "Yes.",
    "some": "Yes, for a small gain at best.",
    "little": "You may: it costs little, but the last weights will be as good without it.",
}

#: The end's share of the highest rate from which on there is much to smooth, and below which there is little.
_MUCH = 0.5
LITTLE = 0.05
# In fewer updates the model still learns so fast that its older weights may cost more than their noise.
_SHORT = 500


@dataclass(frozen=True)
class Outlook:
    """The expected gain of an average at the end of a run.

    Attributes:
        case: "much", "some" or "little" to gain.
        use: whether to use an average.
        final_rate: the learning rate at the end, as a share of the highest.
        ratio: the learning rate at the average's mean age, divided by the one at the end; infinite if that is 0.
        mean_age: of the averaged weights, in updates before the end.
        share_of_run: the mean age as a share of the run.
        text: what that means.
    """

    case: Case
    use: str
    final_rate: float
    ratio: float
    mean_age: float
    share_of_run: float
    text: str


def expect(
    updates: int,
    lr_schedule: str = "constant",
    final_lr: float = 0.0,
    decay: float = 0.999,
    decay_type: str = "threshold",
    **decay_args: Any,
) -> Outlook:
    """Say whether an average will gain much, some or little at the end of a run.

    Args:
        updates: optimizer steps of the run.
        lr_schedule: "constant", "cosine", "linear", "wsd" (constant, then linear in the last fifth) or "restarts"
            (cosine with three cycles, each twice as long).
        final_lr: the rate at the end, as a share of the highest; "constant" ignores it.
        decay, decay_type, decay_args: the average, as in FastEMA.

    Raises:
        ValueError: no updates, an unknown schedule, a share outside [0, 1].

    Examples:
        >>> expect(10_000, "constant").case, expect(10_000, "cosine").case
        ('much', 'little')
    """
    checked_count("updates", updates, at_least=1)
    age = mean_age(updates, decay, decay_type, **decay_args)
    now = rate_at(lr_schedule, 1.0, final_lr)
    then = rate_at(lr_schedule, 1 - age / updates, final_lr)
    ratio = then / now if now else math.inf
    if now >= _MUCH:
        case: Case = "much"
        text = (
            "The learning rate stays high to the end, so the last weights jump around the best ones. Their average is "
            "steadier, and usually better once the model no longer improves fast."
        )
    elif now > LITTLE:
        case = "some"
        text = "The learning rate falls, but not to 0, so some noise is left to smooth. Expect a small gain or none."
    else:
        case = "little"
        text = (
            "The learning rate falls to almost 0, which smooths the weights as an average would. At the end expect no "
            "difference; before that, while the rate is high, the average is steadier."
        )
    if updates < _SHORT:
        text += f" In fewer than {_SHORT} updates the model still learns fast, and the average may be behind."
    return Outlook(case, _USE[case], now, ratio, age, age / updates, text)


def rate_at(lr_schedule: str, done: float, final_lr: float = 0.0) -> float:
    """Return the learning rate as a share of the highest, when a share `done` of the run is over.

    Raises:
        ValueError: an unknown schedule, a share outside [0, 1].
    """
    if lr_schedule not in LR_SCHEDULES:
        known = ", ".join(map(repr, LR_SCHEDULES))
        raise ValueError(f"lr_schedule must be one of {known}, got {lr_schedule!r}")
    if not 0 <= final_lr <= 1:
        raise ValueError(f"final_lr must be a share of the highest rate, from 0 to 1, got {final_lr}")
    return final_lr + (1 - final_lr) * LR_SCHEDULES[lr_schedule](done)


def schedule_of(rates: Sequence[float], done: float) -> tuple[str, float]:
    """Return the schedule, and its last rate as a share of the highest, that fit the learning rates of a run so far.

    Args:
        rates: in order, of any number of steps.
        done: the share of the run that is over.

    Examples:
        >>> schedule_of([0.1 * (1 - 0.98 * i / 60) for i in range(61)], done=1.0)
        ('linear', 0.02)
    """
    top = max(rates)
    first = max(i for i, rate in enumerate(rates) if rate == top)  # after a warm-up
    tail = [(done * (i + 1) / len(rates), rate / top) for i, rate in enumerate(rates)][first:]
    start = tail[0][0] if first else 0.0
    ends = sorted({0.0, 0.01, 0.05, 0.1, 0.2, round(tail[-1][1], 3)})

    def off(choice: tuple[str, float]) -> float:
        name, end = choice
        return sum(abs(rate_at(name, min(1.0, (at - start) / (1 - start)), end) - rate) for at, rate in tail)

    if start >= 1 or len(tail) < 2:
        return "constant", 0.0
    return min(((name, end) for name in ("constant", "linear", "cosine", "wsd") for end in ends), key=off)


def mean_age(updates: int, decay: float, decay_type: str = "threshold", **decay_args: Any) -> float:
    """Return how many updates old the weights in an average are on average, after `updates` of them.

    Examples:
        >>> round(mean_age(8_000, 0.999)), round(mean_age(100_000, 0.999))
        (800, 999)
    """
    decays = Decays(decay, decay_type, updates, 0, decay_args)
    age = 0.0
    for step in range(1, updates + 1):
        now = decays.at(step)[0]
        if now == decays.targets[0] and decays.settles and now < 1:
            # From here on the decay is constant: the age nears decay / (1 - decay).
            limit = now / (1 - now)
            return limit + (age - limit) * now ** (updates - step + 1)
        age = now * (age + 1)
    return age


def _share_of_cycle(done: float) -> float:
    """Return the share of its cycle, of three cycles each twice as long as the one before."""
    begin = 0.0
    for length in (1 / 7, 2 / 7):
        if done < begin + length:
            return (done - begin) / length
        begin += length
    return (done - begin) / (4 / 7)

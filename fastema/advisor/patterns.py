"""Advice whether to start an average now, from a few patterns in the base model's history.

An average brings something where weights move about a level (oscillation) or on their way (improving). It brings
nothing where they stand still, and it keeps what has gone wrong where training falls apart. But a schedule that forgets
the start, such as "threshold", loses nothing by an early one: there the verdicts concern the training, not the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Literal

from fastema.advisor.clock import Clock
from fastema.advisor.statistics import Shape, noise_of, oriented, shape_of, smoothed

Action = Literal["start", "wait", "fix first", "stop"]
Pattern = Literal[
    "improving",
    "oscillation",
    "plateau",
    "declining",
    "overfitted",
    "unstable",
    "collapse",
    "not learning",
    "too short",
]

_RISES = 2.0  # standard errors: a trend that chance brings about once in forty
_FALLS = -2.0
# With so few values a falling zigzag counts as unstable: nothing shows yet that it holds a level.
_FEW = 6
_FALLS_OF_FEW = -0.7
# Past its best: worse by so many noises, and by such a share of all that was gained.
_PAST_BEST = 3.0
_PAST_BEST_OF_WAY = 0.02
_LONG = 10  # evaluations without progress that make a plateau of small swings
_CHANCE = 0.15  # a score from 0 to 1 that stays below is hardly better than a guess
_ANYWAY = "With the threshold schedule an average may run from the first step all the same: it forgets its start."


@dataclass(frozen=True)
class StartAdvice:
    """Advice about the average.

    Attributes:
        action: "start", "wait", "fix first" or "stop".
        pattern: what the history shows.
        reason: why, with numbers.
        next_step: what to do.
        evidence: the numbers, in the metric's own units and direction.
    """

    action: Action
    pattern: Pattern
    reason: str
    next_step: str
    evidence: dict[str, float]


def should_start(history: Sequence[float], mode: str = "max", clock: Clock | None = None) -> StartAdvice:
    """Judge the base model's metric, an epoch a value.

    Two and three values have no noise to estimate: of them, only a fall by more than half of the value is a collapse,
    which is the one judgement that needs the metric's zero to mean something.

    Args:
        history: the metric of every epoch so far.
        mode: "max" if more is better, "min" if less is.
        clock: when each value was measured; None: an epoch each, from 1 on.

    Raises:
        ValueError: an empty history, values that are not finite numbers, an unknown mode.

    Examples:
        >>> advice = should_start([0.6712, 0.6823, 0.6912])
        >>> advice.action, advice.pattern
        ('start', 'improving')
    """
    advice = find_pattern(history, mode, clock)
    if advice.action in ("start", "stop") or advice.pattern == "collapse":
        return advice
    return replace(advice, next_step=f"{advice.next_step} {_ANYWAY}")


def find_pattern(history: Sequence[float], mode: str = "max", clock: Clock | None = None) -> StartAdvice:
    """Return the advice of `should_start`, without what it says of an average that runs all the same."""
    values = oriented(history, mode)
    sign = 1.0 if mode == "max" else -1.0
    when = Clock.counting(len(values)) if clock is None else clock
    fall = _collapse(values)
    if fall is not None:
        at, size = fall
        return StartAdvice(
            "fix first",
            "collapse",
            f"it went from {sign * values[at - 1]:.4g} to {sign * values[at]:.4g} in {when.at(at)}"
            + (" and stayed there" if at + 1 < len(values) else ""),
            "Go back to the last good checkpoint; lower the learning rate, clip gradients, look for bad samples. "
            "An average would only take the broken weights in.",
            {"epoch": at + 1, "fall": size},
        )
    if len(values) < 3:
        return StartAdvice(
            "start",
            "too short",
            f"{'one value' if len(values) == 1 else 'two values'} cannot be judged: nothing speaks against it"
            + (", but it is hardly better than a guess so far" if sign > 0 and 0 <= max(values) <= _CHANCE else ""),
            "Start now, with the threshold schedule: it forgets its start, so that an early one costs nothing.",
            {"epochs": len(values)},
        )
    shape = shape_of(values)
    if clock is not None and (advice := _not_learning(values, shape, sign, clock)) is not None:
        return advice
    return _past_best(values, shape, sign, when) or _judged(values, shape, sign, when)


def _not_learning(values: Sequence[float], shape: Shape, sign: float, when: Clock) -> StartAdvice | None:
    """Return the advice for a metric that has stood still since the training began."""
    if when.unit != "epoch" or when.labels[0] > max(1.0, when.gap) or shape.climbed or shape.drifting_surely:
        return None
    top = 1.0 if max(values) <= 1 else 100.0
    guess = sign > 0 and min(values) >= 0 and max(values) <= _CHANCE * top and max(values) - min(values) < 0.05 * top
    if not guess and not (shape.quiet and len(values) >= 5):
        return None
    return StartAdvice(
        "fix first",
        "not learning",
        f"it has stood at {sign * shape.level:.4g} since the training began"
        + (", which is hardly better than a guess" if guess else ""),
        "The training changes nothing: look at the learning rate, frozen weights, labels and preprocessing.",
        {"epochs": len(values), "level": sign * shape.level, "noise": shape.noise},
    )


def _past_best(values: Sequence[float], shape: Shape, sign: float, when: Clock) -> StartAdvice | None:
    """Return the advice for a metric that has been worse for long than it was at its best."""
    steady = smoothed(values)
    best = max(range(len(values)), key=steady.__getitem__)
    since = values[best + 1 :][-shape.epochs :]
    if len(since) < 3 or shape.significance >= _RISES:
        return None
    way, lost = steady[best] - values[0], steady[best] - median(since)
    noise = max(shape.noise, noise_of(values[best:]))
    if way <= max(_PAST_BEST * noise, 0.0) or lost <= max(_PAST_BEST * noise, _PAST_BEST_OF_WAY * way):
        return None
    top = max(range(max(0, best - 1), min(len(values), best + 2)), key=values.__getitem__)
    return StartAdvice(
        "stop",
        "overfitted",
        f"it was best in {when.at(top)}, at {sign * values[top]:.4g}, and since then it is worse by "
        f"{values[top] - median(since):.2g}",
        f"Stop, and take the checkpoint of {when.at(top)}. An average would follow the model down, only later.",
        {"best": top + 1, "value": sign * values[top], "lost": lost, "noise": noise},
    )


def _judged(values: Sequence[float], shape: Shape, sign: float, when: Clock) -> StartAdvice:
    evidence = {
        "epochs": shape.epochs,
        "level": sign * shape.level,
        "noise": shape.noise,
        "slope": sign * shape.slope,
        "significance": shape.significance,
    }
    drift = f"{sign * shape.slope:+.2g} {when.each} over the last {shape.epochs}, noise {shape.noise:.2g}"
    if shape.significance >= _RISES and shape.drifting:
        return StartAdvice(
            "start", "improving", f"it gets better steadily: {drift}", "Start the average now.", evidence
        )
    if shape.significance <= (_FALLS_OF_FEW if shape.epochs < _FEW else _FALLS) and shape.drifting:
        if _smooth(shape):
            return StartAdvice(
                "fix first",
                "declining",
                f"it gets worse steadily: {drift}",
                "Overfitting, or a learning rate that is too high: an average follows the model down, only later.",
                evidence,
            )
        return StartAdvice(
            "fix first",
            "unstable",
            f"it jumps about and loses ground: {drift}",
            "Lower the learning rate, warm it up or clip gradients until the metric holds a level.",
            evidence,
        )
    held = _held(values, shape)
    if shape.flat or (held >= _LONG and 3 * held >= len(values) and shape.nearly_flat):
        return StartAdvice(
            "wait",
            "plateau",
            f"it stands still at {sign * shape.level:.4g}, for {held} evaluations now: {drift}",
            "There is little to smooth: change the learning rate or the data first.",
            {**evidence, "held": held},
        )
    return StartAdvice(
        "start",
        "oscillation",
        f"it swings about {sign * shape.level:.4g} without losing ground: {drift}",
        "Start the average now: it smooths exactly this.",
        evidence,
    )


def _held(values: Sequence[float], shape: Shape) -> int:
    """Return for how many evaluations the metric has kept its level."""
    steady = smoothed(values)
    band = max(2 * shape.noise, 0.01 * shape.scale)
    held = next((i for i, value in enumerate(reversed(steady)) if abs(value - shape.level) > band), len(steady))
    return max(held, shape.epochs if shape.flat else 0)  # one swing at the end does not end a plateau


def _smooth(shape: Shape) -> bool:
    """Return whether an epoch's step is mostly trend: the noise of a difference is √2 that of a value."""
    return abs(shape.slope) > 2**0.5 * shape.noise


def _collapse(values: Sequence[float]) -> tuple[int, float] | None:
    """Return where the steepest fall of oriented values landed, and by how much, if it is a collapse that lasts."""
    if len(values) < 2:
        return None
    at = max(range(1, len(values)), key=lambda i: values[i - 1] - values[i])
    top, bottom = values[at - 1], values[at]
    fall = top - bottom
    if fall <= 0 or median(values[at:][-3:]) > top - fall / 2:
        return None
    before = values[:at]
    # Half of a value means something only where zero does: not for a metric that has both signs.
    one_sided = min(values) >= 0 or max(values) <= 0
    halved = one_sided and fall > 0.5 * max(abs(top), abs(bottom))
    if len(before) < 4:
        # Too few to know what is usual. Of a loss, half of the larger value is a doubling.
        return (at, fall) if halved else None
    usual = max(noise_of(before), median(abs(b - a) for a, b in pairwise(before)))
    way = max(before) - min(before)
    lost = fall > 6 * usual and fall > 0.75 * way and way > 6 * noise_of(before)
    return (at, fall) if lost or (halved and fall > 2 * usual) else None

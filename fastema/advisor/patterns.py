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

from fastema.advisor.statistics import Shape, noise_of, oriented, shape_of

Action = Literal["start", "wait", "fix first"]
Pattern = Literal["improving", "oscillation", "plateau", "declining", "unstable", "collapse", "too short"]

_RISES = 2.0  # standard errors: a trend that chance brings about once in forty
_FALLS = -2.0
# With so few values a falling zigzag counts as unstable: nothing shows yet that it holds a level.
_FEW = 6
_FALLS_OF_FEW = -0.7
_ANYWAY = "With the threshold schedule an average may run from the first step all the same: it forgets its start."


@dataclass(frozen=True)
class StartAdvice:
    """Advice about the average.

    Attributes:
        action: "start", "wait" or "fix first".
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


def should_start(history: Sequence[float], mode: str = "max") -> StartAdvice:
    """Judge the base model's metric, an epoch a value.

    Two and three values have no noise to estimate: of them, only a fall by more than half of the value is a collapse,
    which is the one judgement that needs the metric's zero to mean something.

    Args:
        history: the metric of every epoch so far.
        mode: "max" if more is better, "min" if less is.

    Raises:
        ValueError: an empty history, values that are not finite numbers, an unknown mode.

    Examples:
        >>> advice = should_start([0.6712, 0.6823, 0.6912])
        >>> advice.action, advice.pattern
        ('start', 'improving')
    """
    advice = find_pattern(history, mode)
    if advice.action == "start" or advice.pattern == "collapse":
        return advice
    return replace(advice, next_step=f"{advice.next_step} {_ANYWAY}")


def find_pattern(history: Sequence[float], mode: str = "max") -> StartAdvice:
    """Return the advice of `should_start`, without what it says of an average that runs all the same."""
    values = oriented(history, mode)
    sign = 1.0 if mode == "max" else -1.0
    fall = _collapse(values)
    if fall is not None:
        at, size = fall
        return StartAdvice(
            "fix first",
            "collapse",
            f"it went from {sign * values[at - 1]:.4g} to {sign * values[at]:.4g} in epoch {at + 1} and stayed there",
            "Go back to the last good checkpoint; lower the learning rate, clip gradients, look for bad samples. "
            "An average would only take the broken weights in.",
            {"epoch": at + 1, "fall": size},
        )
    if len(values) < 3:
        return StartAdvice(
            "start",
            "too short",
            f"{len(values)} {'epoch' if len(values) == 1 else 'epochs'}: nothing speaks against it",
            "Start now, with the threshold schedule: it forgets its start, so that an early one costs nothing.",
            {"epochs": len(values)},
        )
    return _judged(shape_of(values), sign)


def _judged(shape: Shape, sign: float) -> StartAdvice:
    evidence = {
        "epochs": shape.epochs,
        "level": sign * shape.level,
        "noise": shape.noise,
        "slope": sign * shape.slope,
        "significance": shape.significance,
    }
    drift = f"{sign * shape.slope:+.2g} an epoch over the last {shape.epochs}, noise {shape.noise:.2g}"
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
    if shape.quiet:
        return StartAdvice(
            "wait",
            "plateau",
            f"it stands still at {sign * shape.level:.4g}: {drift}",
            "There is nothing to smooth: change the learning rate or the data.",
            evidence,
        )
    return StartAdvice(
        "start",
        "oscillation",
        f"it swings about {sign * shape.level:.4g} without losing ground: {drift}",
        "Start the average now: it smooths exactly this.",
        evidence,
    )


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

"""Noise, trend and progress of a history, estimated from the history alone.

Everything is a median: one spike moves none of it. Values are oriented first, so that more is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from numbers import Real
from statistics import median

#: How many of the last evaluations are "now", at least. Longer, and an old rise hides a plateau; shorter, and noise
#: hides a trend. Of a long history it is a tenth.
RECENT = 10
_MOST = 200

# A change below half a percent of the improvement so far does not matter.
_MATTERS = 0.005
_MATTERS_OF_LEVEL = _MATTERS / 10

# Swings below these shares of the improvement so far are those of a plateau: at once, and where it lasts long.
_FLAT = 0.015
_NEARLY_FLAT = 0.03

_NORMAL = 1.4826  # the median of |x| times this is the standard deviation, for a normal x


def oriented(history: Sequence[float], mode: str, name: str = "history") -> list[float]:
    """Return the values as finite floats of which more is better.

    Raises:
        ValueError: empty, not numbers, NaN or infinite, or an unknown mode.
    """
    if mode not in ("max", "min"):
        raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise ValueError(f"{name} must be a sequence of numbers, an epoch each; got {history!r}")
    if not history:
        raise ValueError(f"{name} is empty: give the metric of every epoch so far")
    for epoch, value in enumerate(history, 1):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name}: not a number in epoch {epoch}: {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name}: {value} in epoch {epoch}: the training diverged there, or was not validated")
    return [float(value) if mode == "max" else -float(value) for value in history]


def noise_of(values: Sequence[float]) -> float:
    """Return the standard deviation of what is not trend.

    Second differences of independent noise of variance s² have variance 6 s² (1 + 4 + 1), and those of a straight
    line are 0. Three values have one second difference, fewer have none.
    """
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return _NORMAL * median(bends) / math.sqrt(6) if bends else 0.0


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the running median of three."""
    return [median(values[max(0, i - 1) : i + 2]) for i in range(len(values))]


def slope_of(values: Sequence[float]) -> float:
    """Return the Theil-Sen slope: the median over all pairs, in units an epoch; at least two values."""
    return median((b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2))


@dataclass(frozen=True)
class Shape:
    """Level, noise and trend of a history now.

    Attributes:
        epochs: how many epochs "now" has.
        level: the median of now.
        noise: the standard deviation of what is not trend, now.
        slope: units an epoch, now.
        gain: slope over all of now.
        significance: gain in units of its own standard error.
        climbed: whether the metric has improved by more than noise.
        scale: what a change is compared with: that improvement, or the level if there is none.
    """

    epochs: int
    level: float
    noise: float
    slope: float
    gain: float
    significance: float
    climbed: bool
    scale: float

    @property
    def quiet(self) -> bool:
        """True if the noise is too small to matter."""
        return self.noise <= _MATTERS * self.scale

    @property
    def flat(self) -> bool:
        """True if the swings are small beside the improvement so far."""
        return self.noise <= (_FLAT if self.climbed else _MATTERS) * self.scale

    @property
    def nearly_flat(self) -> bool:
        """True if the swings are those of a plateau where it lasts long."""
        return self.noise <= (_NEARLY_FLAT if self.climbed else 2 * _MATTERS) * self.scale

    @property
    def drifting_surely(self) -> bool:
        """True for a drift that matters and is no chance."""
        return self.drifting and abs(self.significance) >= 2

    @property
    def drifting(self) -> bool:
        """True if the gain or loss matters; a level may be large for no reason, so a tenth of that share of it."""
        return abs(self.gain) > (_MATTERS if self.climbed else _MATTERS_OF_LEVEL) * self.scale


def shape_of(values: Sequence[float]) -> Shape:
    """Return the shape of three oriented values and more."""
    now = values[-min(max(RECENT, len(values) // 10), _MOST) :]
    count = len(now)
    noise, slope, level = noise_of(now), slope_of(now), median(now)
    gain = slope * (count - 1)
    # The standard error of a least-squares slope is noise * sqrt(12 / (n³ - n)).
    error = noise * (count - 1) * math.sqrt(12 / (count**3 - count))
    # Rounding is not a trend: a constant history times a factor may differ in its last digit.
    rounding = 1e-9 * max(abs(value) for value in values)
    significance = gain / max(error, rounding) if abs(gain) > rounding else 0.0
    way = level - min(values)
    climbed = len(values) > count and way > max(6 * noise, _MATTERS_OF_LEVEL * abs(level), rounding)
    return Shape(count, level, noise, slope, gain, significance, climbed, way if climbed else abs(level))

"""Recommendation of a decay for a run of a given length.

What counts is how many optimizer steps a run has, not how many epochs. The guide's rule (0.99 for 20 to 60 epochs,
0.999 up to 150, 0.9999 beyond, if very stable) was found at 400 updates an epoch; the limits here are its in updates.
Far below them the window shrinks with the run, so that a short run ends with an average of its own late weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastema.advisor.windows import checked_rate, lag, settle_epochs, window
from fastema.core.checks import checked_count

Stability = Literal["unstable", "stable", "very stable"]

# The guide's epochs times its 400 updates an epoch.
_GUIDE_20_EPOCHS = 8_000
_GUIDE_60_EPOCHS = 24_000
_GUIDE_150_EPOCHS = 60_000

# A shorter run than the guide's shortest keeps its window of 100 as long as that is at most this part of the run.
# Chosen among 5, 10, 20, 40 and 80 on the tune set of bench/studies/advisor.py (300 to 3,000 updates): 10 is within 2 %
# of the best a little more often (89 to 85 %), but 2 % worse than no average in 5 % of the runs instead of 0.5 %.
_RUN_PER_WINDOW = 20
_GUIDE_WINDOW = 100
# An average of fewer is hardly one.
_SMALLEST_WINDOW = 5

#: Follows the run from the first update: by step n it looks back over about n / 9 updates, whatever the target.
SCHEDULE = "threshold"


@dataclass(frozen=True)
class Recommendation:
    """Settings with which to average a run.

    Attributes:
        decay: the target.
        decay_type: the schedule, as in FastEMA.
        start_epoch: after how many epochs to start; None: when `should_start` says so.
        window, lag: how far it looks back, in updates and in epochs.
        wait_epochs: how many epochs after the start it can be judged.
        reasons: why, a sentence each.
    """

    decay: float
    decay_type: str
    start_epoch: int | None
    window: float
    lag: float
    wait_epochs: float
    reasons: tuple[str, ...]


def recommend_decay(epochs: int, updates_per_epoch: float, stability: str = "stable") -> Recommendation:
    """Recommend decay, schedule, start and patience for a run.

    Args:
        epochs: of the whole run.
        updates_per_epoch: optimizer steps an epoch; see `updates_per_epoch()`.
        stability: "unstable", "stable", or "very stable" (a large batch, a metric that hardly jumps).

    Raises:
        ValueError: a number that is not positive, an unknown stability.

    Example:
        >>> recommend_decay(epochs=120, updates_per_epoch=400).decay
        0.999
    """
    checked_count("epochs", epochs, at_least=1)
    rate = checked_rate(updates_per_epoch)
    if stability not in get_args(Stability):
        known = ", ".join(map(repr, get_args(Stability)))
        raise ValueError(f"stability must be one of {known}, got {stability!r}")
    updates = epochs * rate
    decay, why = _decay(updates, stability)
    # The start is forgotten soon; the window must fill as well before the average is what it will be.
    wait = max(settle_epochs(decay, rate, decay_type=SCHEDULE), lag(decay, rate))
    reasons = [
        f"The run has {updates:,.0f} updates ({epochs} epochs of {rate:,.0f}).",
        why,
        f"{SCHEDULE}: the first averages look back over a ninth of the steps so far, so the starting weights are "
        "forgotten at once.",
    ]
    if stability == "unstable":
        reasons.append("Unstable: start only when should_start says so, else the average takes in what goes wrong.")
    return Recommendation(
        decay,
        SCHEDULE,
        None if stability == "unstable" else 0,
        window(decay),
        lag(decay, rate),
        wait,
        tuple(reasons),
    )


def _decay(updates: float, stability: str) -> tuple[float, str]:
    if updates < _GUIDE_20_EPOCHS:
        reach = min(_GUIDE_WINDOW, max(_SMALLEST_WINDOW, updates / _RUN_PER_WINDOW))
        # Three digits of the window are more than anybody can tell apart.
        decay = round(1 - 1 / reach, 3)
        return (
            decay,
            f"Short: a {_RUN_PER_WINDOW}th of the run, at least {_SMALLEST_WINDOW} and at most {_GUIDE_WINDOW}.",
        )
    if stability == "unstable":
        return 0.99, "Unstable: 100 updates smooth the jumps, and forget a bad phase soon."
    if updates < _GUIDE_60_EPOCHS:
        return (
            0.99,
            f"Fewer than {_GUIDE_60_EPOCHS:,} updates: a window of 1,000 would lag while the model still learns.",
        )
    if updates < _GUIDE_150_EPOCHS:
        return 0.999, f"{_GUIDE_60_EPOCHS:,} to {_GUIDE_150_EPOCHS:,} updates: long enough for a window of 1,000."
    if stability == "very stable":
        return 0.9999, f"{_GUIDE_150_EPOCHS:,} updates and more, and very stable: a window of 10,000 pays off."
    return 0.999, f"{_GUIDE_150_EPOCHS:,} updates and more, but 0.9999 is only for very stable training."

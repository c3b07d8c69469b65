"""Recommendation of a decay for a run.

The rule of thumb is the answer: 0.999 with the threshold schedule, from the first step. In step n its decay is at most
(1 + n) / (10 + n), so its weights are a tenth of the run so far old, and never more than 1,000 updates. No rule by run
length or learning rate did better on the problems of bench.studies.advisor.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastema.advisor.outlook import Outlook, expect
from fastema.advisor.windows import checked_rate, lag, scaled_decay, settle_epochs, window
from fastema.core.checks import checked_count

DECAY = 0.999
SCHEDULE = "threshold"


@dataclass(frozen=True)
class Recommendation:
    """Settings with which to average a run.

    Attributes:
        decay: the target.
        decay_type: the schedule, as in FastEMA.
        window, lag: how far it looks back at most, in updates and in epochs.
        wait_epochs: how many epochs after the start it can be judged.
        outlook: what to expect at the end.
        reasons: why, a sentence each.
    """

    decay: float
    decay_type: str
    window: float
    lag: float
    wait_epochs: float
    outlook: Outlook
    reasons: tuple[str, ...]


def recommend_decay(
    epochs: int,
    updates_per_epoch: float,
    lr_schedule: str = "constant",
    final_lr: float = 0.0,
    recipe_decay: float | None = None,
    batch_ratio: float = 1.0,
) -> Recommendation:
    """Recommend decay and schedule for a run, and say what to expect at its end.

    Args:
        epochs: of the whole run.
        updates_per_epoch: optimizer steps an epoch; see `updates_per_epoch()`.
        lr_schedule, final_lr: as in `expect()`.
        recipe_decay: the decay of the recipe that the run follows; None: the rule of thumb.
        batch_ratio: how many times as large this run's batch is as the recipe's. The decay is raised to this power, so
            that the average looks back over as many images.

    Raises:
        ValueError: a number that is not positive, an unknown schedule, a decay outside [0, 1].

    Examples:
        >>> recommend_decay(epochs=120, updates_per_epoch=400).decay
        0.999
        >>> round(recommend_decay(120, 400, recipe_decay=0.9999, batch_ratio=8).decay, 4)
        0.9992
    """
    checked_count("epochs", epochs, at_least=1)
    rate = checked_rate(updates_per_epoch)
    updates = max(1, round(epochs * rate))
    decay = scaled_decay(DECAY if recipe_decay is None else recipe_decay, batch_ratio)
    outlook = expect(updates, lr_schedule, final_lr, decay, SCHEDULE)
    # The start is forgotten soon; the window must fill as well before the average is what it will be.
    wait = max(settle_epochs(decay, rate, decay_type=SCHEDULE), min(lag(decay, rate), epochs / 10))
    why = (
        f"{DECAY:g} with the {SCHEDULE} schedule: the rule of thumb, which no other rule beat."
        if decay == DECAY
        else f"The recipe's decay to the power of {batch_ratio:g}, by which the batch grew."
    )
    reasons = (
        f"The run has {updates:,} updates ({epochs} epochs of {rate:,.0f}).",
        why,
        f"{SCHEDULE} forgets the starting weights at once, so start with the first step.",
    )
    return Recommendation(decay, SCHEDULE, window(decay), lag(decay, rate), wait, outlook, reasons)

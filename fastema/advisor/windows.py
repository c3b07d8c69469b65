"""The window of an average, and the share of it that is still the weights it started from.

All of it follows from `shadow = decay * shadow + (1 - decay) * live`: a weight that is k updates old counts
`(1 - decay) * decay**k`, which is about `1 / (1 - decay)` updates old on average; the starting weights count the
product of all decays so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from fastema.core.checks import checked_count, checked_decays
from fastema.core.decays import Decays, updates_back

#: Below this share of starting weights an average has settled: three windows of a constant decay (exp(-3) = 0.05).
SETTLED = 0.05

# A schedule of the user's own may never forget the start: this many updates are looked at.
_MOST_UPDATES = 10_000_000


def window(decay: float | Sequence[float]) -> Any:
    """Return how many updates the average looks back: 1 / (1 - decay); a tuple for several decays.

    Examples:
        >>> round(window(0.999))
        1000
    """
    return _of_each(decay, updates_back)


def lag(decay: float | Sequence[float], updates_per_epoch: float) -> Any:
    """Return how many epochs the average looks back; a tuple for several decays.

    Examples:
        >>> round(lag(0.9999, updates_per_epoch=400), 6)
        25.0
    """
    rate = checked_rate(updates_per_epoch)
    return _of_each(decay, lambda each: window(each) / rate)


def reflects_epoch(epoch: float, decay: float | Sequence[float], updates_per_epoch: float) -> Any:
    """Return the epoch whose weights the average resembles at the end of `epoch`; never one before the training.

    Examples:
        >>> round(reflects_epoch(86, 0.9999, updates_per_epoch=400), 6)
        61.0
    """
    return _of_each(decay, lambda each: max(0.0, epoch - lag(each, updates_per_epoch)))


def initial_share(
    decay: float | Sequence[float],
    updates: int,
    decay_type: str = "constant",
    total_steps: int | None = None,
    **decay_args: Any,
) -> Any:
    """Return the share of the starting weights in the average: the product of the decays; a tuple for several.

    Args:
        decay: the target, or several.
        updates: how many updates there were since the average was built.
        decay_type, total_steps, decay_args: the schedule, as in FastEMA.

    Raises:
        ValueError: as FastEMA's.

    Examples:
        >>> round(initial_share(0.999, 1000), 3), round(initial_share(0.999, 10, "threshold"), 6)
        (0.368, 6e-05)
    """
    checked_count("updates", updates, at_least=0)

    def share(each: float) -> float:
        decays = Decays(each, decay_type, total_steps, 0, decay_args)
        if decay_type == "constant":
            return each**updates
        product = 1.0
        for step in range(1, updates + 1):
            product *= decays.at(step)[0]
            if product == 0.0:
                break
        return product

    return _of_each(decay, share)


def settle_epochs(
    decay: float | Sequence[float],
    updates_per_epoch: float,
    share: float = SETTLED,
    decay_type: str = "constant",
    total_steps: int | None = None,
    **decay_args: Any,
) -> Any:
    """Return how many epochs pass until at most `share` of the average is starting weights; a tuple for several decays.

    Args:
        decay: the target, or several.
        updates_per_epoch: optimizer steps an epoch.
        share: in (0, 1).
        decay_type, total_steps, decay_args: the schedule, as in FastEMA.

    Returns:
        Epochs, infinite if it never happens.

    Examples:
        >>> round(settle_epochs(0.9999, updates_per_epoch=400), 1)
        74.9
    """
    rate = checked_rate(updates_per_epoch)
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}")

    def updates(each: float) -> float:
        decays = Decays(each, decay_type, total_steps, 0, decay_args)
        if each == 1.0 and decay_type == "constant":
            return math.inf
        if decay_type == "constant":
            return 1 if each == 0.0 else max(1, math.ceil(math.log(share) / math.log(each)))
        product = 1.0
        for step in range(1, _MOST_UPDATES + 1):
            product *= decays.at(step)[0]
            if product <= share:
                return step
        return math.inf

    return _of_each(decay, lambda each: updates(each) / rate)


def scaled_decay(decay: float, batch_ratio: float) -> float:
    """Return the decay that looks back over as many images with a batch `batch_ratio` times as large.

    Source: Busbridge et al., "How to Scale Your EMA", arXiv 2307.13813.

    Examples:
        >>> round(scaled_decay(0.999, 4), 6)
        0.996006
    """
    checked_decays(decay)
    if not 0 < batch_ratio < math.inf:
        raise ValueError(f"batch_ratio must be a positive number, got {batch_ratio}")
    return decay if batch_ratio == 1 else decay**batch_ratio


def distinct_decays(
    decays: Sequence[float], decay_type: str, steps: int, **decay_args: Any
) -> dict[float, tuple[float, ...]]:
    """Return the decays whose averages differ after `steps`, each with those that give the same average.

    The threshold schedule limits all decays alike at first: 0.99 and 0.999 are one average up to step 890.

    Examples:
        >>> distinct_decays([0.99, 0.999], "threshold", 890)
        {0.99: (0.999,)}
        >>> distinct_decays([0.99, 0.999], "threshold", 891)
        {0.99: (), 0.999: ()}
    """
    now = decays if decay_type != "threshold" else Decays(decays, decay_type, steps, 0, decay_args).at(steps)
    groups: dict[float, list[float]] = {}
    for decay, last in zip(decays, now, strict=True):
        groups.setdefault(last, []).append(decay)
    return {first: tuple(same) for first, *same in groups.values()}


def updates_per_epoch(
    images: int,
    batch_size: int = 1,
    accumulation_steps: int = 1,
    drop_last: bool = False,
    step_on_tail: bool = True,
) -> int:
    """Return the optimizer steps in an epoch: what an average counts, which is neither images nor batches.

    Args:
        images: samples in the training set (of this process, if several share it).
        batch_size: samples a batch.
        accumulation_steps: batches an optimizer step.
        drop_last: whether the loader drops a last, short batch.
        step_on_tail: whether a last, short group of batches steps too, as in fastema train and timm; False for loops
            with a bare `if (i + 1) % accumulation_steps == 0`.

    Examples:
        >>> updates_per_epoch(3040, batch_size=1, accumulation_steps=4)
        760
    """
    for name, value in (("images", images), ("batch_size", batch_size), ("accumulation_steps", accumulation_steps)):
        checked_count(name, value, at_least=1)
    batches = images // batch_size if drop_last else -(-images // batch_size)
    updates = -(-batches // accumulation_steps) if step_on_tail else batches // accumulation_steps
    if updates == 0:
        raise ValueError(
            f"{images} images in batches of {batch_size}, {accumulation_steps} batches a step, drop_last={drop_last}, "
            f"step_on_tail={step_on_tail}: an epoch has no optimizer step"
        )
    return updates


def checked_rate(updates_per_epoch: float) -> float:
    """Return `updates_per_epoch` as a finite number above 0."""
    if not isinstance(updates_per_epoch, Real) or not 0 < updates_per_epoch < math.inf:
        raise ValueError(f"updates_per_epoch must be a positive number, got {updates_per_epoch}")
    return float(updates_per_epoch)


def _of_each(decay: float | Sequence[float], what: Callable[[float], float]) -> Any:
    decays, several = checked_decays(decay)
    values = tuple(what(each) for each in decays)
    return values if several else values[0]

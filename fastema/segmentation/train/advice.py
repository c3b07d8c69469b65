"""What the advisor has to say during a training: at the start, and when a finding changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastema.advisor import Finding, diagnose, lag, settle_epochs, window

# Of fewer epochs with an average nothing can be said that chance would not say too.
_FIRST = 3


def outlook(decay: float, decay_type: str, updates_per_epoch: int, total_steps: int) -> str:
    """Window, lag and how long to wait before judging; a schedule's window is the one it ends with."""
    if decay == 1.0:
        return "decay 1 never moves from the weights it starts with"
    settle = settle_epochs(decay, updates_per_epoch, decay_type=decay_type, total_steps=total_steps)
    # A schedule forgets the start at once, and still has to fill its window.
    wait = math.ceil(max(settle, lag(decay, updates_per_epoch)))
    text = f"looks back over up to {window(decay):,.0f} updates, {lag(decay, updates_per_epoch):.3g} epochs"
    return f"{text}; judge it after {wait} {'epoch' if wait == 1 else 'epochs'}"


def latest_finding(
    base: Sequence[float],
    ema: Sequence[float | None],
    decay: float,
    decay_type: str,
    updates_per_epoch: int,
    total_steps: int,
) -> Finding | None:
    """The most urgent finding, or None while there are too few epochs.

    A run that was resumed without its average for a while has a gap in `ema`: what counts is after the last gap.
    """
    start = max((i + 1 for i, value in enumerate(ema) if value is None), default=0)
    if len(ema) - start < _FIRST:
        return None
    averaged = [None] * start + list(ema[start:])
    return diagnose(base, averaged, decay, updates_per_epoch, decay_type=decay_type, total_steps=total_steps)[0]

"""Causes of an average that is worse than its model or hardly better, each tested against the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from fastema.advisor.patterns import find_pattern
from fastema.advisor.statistics import Shape, noise_of, oriented, shape_of, slope_of
from fastema.advisor.windows import SETTLED, checked_rate, initial_share, settle_epochs, window
from fastema.core.checks import checked_count, checked_decay
from fastema.core.decay.decays import Decays

Kind = Literal["too early", "lags", "unstable", "marginal", "fine", "unexplained"]

# A cause explains a gap if it predicts at least half of it.
_EXPLAINS = 0.5
_SMALLEST_WINDOW = 10.0
_FEW = 3


@dataclass(frozen=True)
class Finding:
    """One thing that the histories show.

    Attributes:
        kind: "too early", "lags", "unstable", "marginal", "fine" or "unexplained".
        text: what it is, with numbers.
        next_step: what to do about it.
        evidence: the numbers; `gap` is positive where the average is better, in the metric's units.
    """

    kind: Kind
    text: str
    next_step: str
    evidence: dict[str, float]


def diagnose(
    base: Sequence[float],
    ema: Sequence[float | None],
    decay: float,
    updates_per_epoch: float,
    started_at: int | None = None,
    mode: str = "max",
    decay_type: str = "constant",
    total_steps: int | None = None,
    **decay_args: Any,
) -> list[Finding]:
    """Compare the metric of the model with that of its average, an epoch a value.

    Args:
        base: of the trained weights.
        ema: of the averaged weights, as long as `base`; may begin with None where there was no average yet.
        decay: the target decay.
        updates_per_epoch: optimizer steps an epoch.
        started_at: how many epochs were done when the average was built; None: the leading None of `ema`.
        mode: "max" if more is better, "min" if less is.
        decay_type, total_steps, decay_args: the schedule, as in FastEMA.

    Returns:
        The findings, the most urgent first; never none.

    Raises:
        ValueError: different lengths, no values, values that are not finite numbers, a decay outside [0, 1].

    Examples:
        >>> [finding.kind for finding in diagnose([0.60, 0.62, 0.64], [0.31, 0.33, 0.36], 0.9999, 400)]
        ['too early']
    """
    decay, rate = checked_decay(decay), checked_rate(updates_per_epoch)
    if len(base) != len(ema):
        raise ValueError(f"base has {len(base)} epochs and ema {len(ema)}: give both for the same epochs")
    values = oriented(base, mode, "base")
    without = next((i for i, value in enumerate(ema) if value is not None), len(ema))
    if without == len(ema):
        raise ValueError("ema has no value: there is nothing to compare")
    # Placeholders before the start keep the epochs in messages right; they are never compared.
    averaged = oriented([*base[:without], *ema[without:]], mode, "ema")  # type: ignore[list-item]
    if started_at is None:
        started_at = without
    if checked_count("started_at", started_at, at_least=0) >= len(base):
        raise ValueError(f"started_at must be an int from 0 to {len(base) - 1}, got {started_at}")
    updates = round((len(base) - started_at) * rate)
    share = initial_share(decay, updates, decay_type, total_steps, **decay_args)
    first = max(started_at, without)
    gaps = [a - b for a, b in zip(averaged[first:], values[first:], strict=True)]
    # A schedule looks back less far at first; and no average looks back beyond its own start.
    now = Decays(decay, decay_type, total_steps, 0, decay_args).at(max(1, updates))[0]
    reach = min(window(now), float(updates))
    run = _Run(values, averaged, gaps, reach, rate, updates, share, 1.0 if mode == "max" else -1.0)

    trouble = _unstable(run, base, mode)
    if trouble is not None:
        return [trouble]
    if run.gap < -run.tolerance:
        settled_at = started_at + settle_epochs(decay, rate, SETTLED, decay_type, total_steps, **decay_args)
        causes = [cause for cause in (_too_early(run, settled_at), _lags(run)) if cause is not None]
        if causes:
            return causes
    if len(gaps) < _FEW:
        return [_few(run)]
    if abs(run.gap) <= run.tolerance:
        return [_marginal(run)]
    return [_fine(run) if run.gap > 0 else _unexplained(run)]


@dataclass(frozen=True)
class _Run:
    """Oriented values, and what is known about the average now."""

    base: list[float]
    ema: list[float]
    gaps: list[float]
    reach: float
    rate: float
    updates: int
    share: float
    sign: float

    @property
    def gap(self) -> float:
        """The gap now: the median of the last three epochs of the average, so that one lucky epoch decides nothing."""
        return median(self.gaps[-3:])

    @property
    def shape(self) -> Shape | None:
        return shape_of(self.base) if len(self.base) >= 3 else None

    @property
    def tolerance(self) -> float:
        """A gap below this is none: the standard error of a median of three gaps, and half a percent of the way."""
        shape = self.shape
        if shape is None:
            return 0.0
        error = 1.25 * noise_of(self.gaps[-10:]) / math.sqrt(min(3, len(self.gaps)))
        return max(error, 0.005 * shape.scale if shape.climbed else 0.0)

    def evidence(self, **more: float) -> dict[str, float]:
        return {"gap": self.gap, "updates": self.updates, "initial_share": self.share, **more}

    def gap_text(self) -> str:
        side = "better" if self.gap > 0 else "worse"
        return f"the average is {side} by {abs(self.gap):.4g} (median of the last {len(self.gaps[-3:])})"


def _unstable(run: _Run, base: Sequence[float], mode: str) -> Finding | None:
    start = find_pattern(base, mode)
    if start.action != "fix first" or (start.pattern != "collapse" and run.gap > run.tolerance):
        return None
    last = run.gaps[-1] if start.pattern == "collapse" else run.gap
    text = f"The training itself is the trouble ({start.pattern}): {start.reason}"
    next_step = start.next_step
    if last > 0:
        text += f"; the average still holds, {last:.4g} better"
        next_step += " Keep a copy of the averaged weights: they are from before."
    elif "learning rate" not in next_step:
        next_step += " Lower the learning rate."
    return Finding("unstable", text + ".", next_step, {**start.evidence, **run.evidence(), "gap": last})


def _too_early(run: _Run, settled_at: float) -> Finding | None:
    if run.share <= SETTLED:
        return None
    judge_from = math.ceil(settled_at) if math.isfinite(settled_at) else math.inf
    wait = (
        f"Judge it from epoch {judge_from} on"
        if math.isfinite(judge_from)
        else "It never lets go of the starting weights"
    )
    return Finding(
        "too early",
        f"Too early: after {run.updates:,} updates {run.share:.0%} of the average are still the starting weights; "
        f"{run.gap_text()}.",
        f'{wait}; or use decay_type="threshold" or a smaller decay, which forget the start sooner.',
        run.evidence(judge_from_epoch=judge_from),
    )


def _lags(run: _Run) -> Finding | None:
    """Test whether the lag explains the gap: an average `lag` epochs back is about slope times lag behind."""
    shape = run.shape
    if shape is None or shape.significance < 2.0:
        return None
    # The slope over the span that the average looks back on, at most what "now" is.
    span = max(3, min(len(run.base), math.ceil(min(run.reach / run.rate, shape.epochs)) + 1))
    slope = slope_of(run.base[-span:])
    epochs = run.reach / run.rate
    expected = slope * epochs
    if slope <= 0 or expected < _EXPLAINS * -run.gap:
        return None
    # Behind by no more than the noise, a lag is not seen any more.
    allowed = max(shape.noise, run.tolerance, 0.1 * -run.gap) / slope * run.rate
    better = 1 - 1 / max(_SMALLEST_WINDOW, min(allowed, run.reach / 2))
    return Finding(
        "lags",
        f"The average looks back {epochs:.3g} epochs while the metric gains {run.sign * slope:.2g} an epoch: about "
        f"{expected:.2g} behind is to be expected; {run.gap_text()}.",
        f"Use a smaller decay (about {better:.4g}), or wait until the metric levels off: then the lag costs nothing.",
        run.evidence(lag_epochs=epochs, slope=run.sign * slope, expected_gap=expected, better_decay=better),
    )


def _unexplained(run: _Run) -> Finding:
    return Finding(
        "unexplained",
        f"Neither the start ({run.share:.1%} of it left) nor the lag explains it: {run.gap_text()}.",
        "Look at what is not a weight: are BatchNorm statistics averaged or recomputed, is update() called after every "
        "optimizer step and only then, was the average built after the checkpoint was loaded?",
        run.evidence(tolerance=run.tolerance),
    )


def _marginal(run: _Run) -> Finding:
    shape = run.shape
    evidence = run.evidence(tolerance=run.tolerance, noise=shape.noise if shape else math.nan)
    # Smooth means that neither the model's own noise nor what the average gains is worth having.
    if shape is None or not shape.quiet or abs(run.gap) > max(2 * shape.noise, 0.005 * shape.scale):
        return Finding(
            "marginal",
            f"No clear difference yet: {run.gap_text()}, which is within the noise ({run.tolerance:.2g}).",
            "Keep both, and judge over more epochs.",
            evidence,
        )
    return Finding(
        "marginal",
        f"The model is smooth already (noise {shape.noise:.2g}), so there is little to average out: {run.gap_text()}.",
        "Nothing is wrong: an average helps most while the learning rate is high. Keep it, or save the trouble.",
        evidence,
    )


def _few(run: _Run) -> Finding:
    return Finding(
        "marginal",
        f"{run.gap_text()}: too few epochs to tell that from chance.".capitalize(),
        f"Ask again after {_FEW} epochs with an average.",
        run.evidence(),
    )


def _fine(run: _Run) -> Finding:
    ahead = sum(gap > 0 for gap in run.gaps)
    return Finding(
        "fine",
        f"The average helps: {run.gap_text()}, ahead in {ahead} of {len(run.gaps)} epochs.",
        "Use the averaged weights.",
        run.evidence(ahead=ahead, tolerance=run.tolerance),
    )

"""Causes of an average that is worse than its model or hardly better, each tested against the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from fastema.advisor.clock import Clock
from fastema.advisor.patterns import find_pattern
from fastema.advisor.statistics import Shape, noise_of, oriented, shape_of, slope_of
from fastema.advisor.windows import SETTLED, checked_rate, initial_share, settle_epochs, window
from fastema.core.checks import checked_count, checked_decay
from fastema.core.decays import Decays

Kind = Literal["too early", "lags", "unstable", "marginal", "fine", "behind", "unexplained"]

# A cause explains a gap if it predicts at least half of it.
_EXPLAINS = 0.5
_SMALLEST_WINDOW = 10.0
_FEW = 3
_SMALLER = "a smaller decay (0.999 in place of 0.9999, 0.99 in place of 0.999)"


@dataclass(frozen=True)
class Finding:
    """One thing that the histories show.

    Attributes:
        kind: "too early", "lags", "unstable", "marginal", "fine", "behind" (in too few evaluations to say why) or
            "unexplained".
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
    decay: float | None = None,
    updates_per_epoch: float | None = None,
    started_at: int | None = None,
    mode: str = "max",
    decay_type: str = "constant",
    total_steps: int | None = None,
    clock: Clock | None = None,
    **decay_args: Any,
) -> list[Finding]:
    """Compare the metric of the model with that of its average.

    Args:
        base: of the trained weights, an evaluation a value.
        ema: of the averaged weights, as long as `base`; may begin with None where there was no average yet.
        decay: the target decay; None: unknown, and the cause of a gap is told from the two curves.
        updates_per_epoch: optimizer steps an epoch (from one evaluation to the next, if the clock has no epochs).
        started_at: how many epochs were done when the average was built; None: the leading None of `ema`.
        mode: "max" if more is better, "min" if less is.
        decay_type, total_steps, decay_args: the schedule, as in FastEMA.
        clock: when each value was measured; None: an epoch each, from 1 on.

    Returns:
        The findings, the most urgent first; never none.

    Raises:
        ValueError: different lengths, no values, values that are not finite numbers, a decay outside [0, 1].

    Examples:
        >>> [finding.kind for finding in diagnose([0.60, 0.62, 0.64], [0.31, 0.33, 0.36], 0.9999, 400)]
        ['too early']
    """
    if decay is not None:
        decay = checked_decay(decay)
    rate = None if updates_per_epoch is None else checked_rate(updates_per_epoch)
    if len(base) != len(ema):
        raise ValueError(f"base has {len(base)} epochs and ema {len(ema)}: give both for the same epochs")
    values = oriented(base, mode, "base")
    without = next((i for i, value in enumerate(ema) if value is not None), len(ema))
    if without == len(ema):
        raise ValueError("ema has no value: there is nothing to compare")
    # Placeholders before the start keep the epochs in messages right; they are never compared.
    averaged = oriented([*base[:without], *ema[without:]], mode, "ema")  # type: ignore[list-item]
    when = Clock.counting(len(base)) if clock is None else clock
    started = _started(when, without, started_at)
    first = max(without, sum(when.done(i) <= started for i in range(len(base)))) if started_at is not None else without
    gaps = [a - b for a, b in zip(averaged[first:], values[first:], strict=True)]
    age = None
    if decay is not None and rate is not None:
        age = _Age.of(decay, rate, when, started, decay_type, total_steps, decay_args)
    run = _Run(values, averaged, gaps, when, age, 1.0 if mode == "max" else -1.0)

    trouble = _unstable(run, base, mode)
    if trouble is not None:
        return [trouble]
    if run.gap < -run.tolerance:
        causes = (_too_early(run), _lags(run)) if age is not None else (_behind_by_the_curves(run),)
        found = [cause for cause in causes if cause is not None]
        if found:
            return found
    if len(gaps) < _FEW:
        return [_few(run)]
    if abs(run.gap) <= run.tolerance:
        return [_marginal(run)]
    return [_fine(run) if run.gap > 0 else _unexplained(run)]


def _started(when: Clock, without: int, started_at: int | None) -> float:
    """Return how many epochs (updates, if the clock counts those) were done when the average was built."""
    if started_at is not None:
        last = math.ceil(when.done()) - 1
        if checked_count("started_at", started_at, at_least=0) > last:
            raise ValueError(f"started_at must be an int from 0 to {last}, got {started_at}")
        return started_at
    if without:
        return when.done(without - 1)
    return 0.0  # the run's begin, whether the log has it or not


@dataclass(frozen=True)
class _Age:
    """State what the schedule says of the average now.

    Attributes:
        updates: since it was built.
        share: of the starting weights that is left.
        reach: how many updates it looks back.
        rate: updates from one evaluation to the next.
        settled_at: the epoch from which on it can be judged.
    """

    updates: int
    share: float
    reach: float
    rate: float
    settled_at: float

    @classmethod
    def of(
        cls,
        decay: float,
        per_epoch: float,
        when: Clock,
        started: float,
        decay_type: str,
        total_steps: int | None,
        decay_args: dict[str, Any],
    ) -> _Age:
        # Steps are updates; of evaluations and epochs the rate is known.
        updates = max(0, round((when.done() - started) * (1 if when.unit == "step" else per_epoch)))
        share = initial_share(decay, updates, decay_type, total_steps, **decay_args)
        # A schedule looks back less far at first; and no average looks back beyond its own start.
        now = Decays(decay, decay_type, total_steps, 0, decay_args).at(max(1, updates))[0]
        settle = settle_epochs(decay, per_epoch, SETTLED, decay_type, total_steps, **decay_args)
        rate = per_epoch * when.gap if when.unit == "epoch" else per_epoch
        if when.unit == "step":
            settle *= per_epoch
        return cls(updates, share, min(window(now), float(updates)), rate, started + settle)


@dataclass(frozen=True)
class _Run:
    """Oriented values, and what is known about the average now."""

    base: list[float]
    ema: list[float]
    gaps: list[float]
    when: Clock
    age: _Age | None
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
        known = {} if self.age is None else {"updates": self.age.updates, "initial_share": self.age.share}
        return {"gap": self.gap, **known, **more}

    def back(self, evaluations: float) -> str:
        """Return a distance in time, in epochs if the log has them."""
        if self.when.unit != "epoch":
            return f"{evaluations:.3g} evaluations"
        return f"{evaluations * self.when.gap:.3g} epochs"

    def gap_text(self) -> str:
        side = "better" if self.gap > 0 else "worse"
        count = len(self.gaps[-3:])
        of = f" (median of the last {count})" if count > 1 else ""
        return f"the average is {side} by {abs(self.gap):.4g}{of}"


def _unstable(run: _Run, base: Sequence[float], mode: str) -> Finding | None:
    start = find_pattern(base, mode, run.when)
    if start.pattern in ("overfitted", "not learning"):  # told of the run as a whole
        return None
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


def _too_early(run: _Run) -> Finding | None:
    assert run.age is not None
    if run.age.share <= SETTLED:
        return None
    judge_from = math.ceil(run.age.settled_at) if math.isfinite(run.age.settled_at) else math.inf
    wait = (
        f"Judge it from {run.when.unit} {judge_from:,} on"
        if math.isfinite(judge_from)
        else "It never lets go of the starting weights"
    )
    return Finding(
        "too early",
        f"Too early: after {run.age.updates:,} updates {run.age.share:.0%} of the average are still the starting "
        f"weights; {run.gap_text()}.",
        f'{wait}; or use decay_type="threshold" or a smaller decay, which forget the start sooner.',
        run.evidence(judge_from_epoch=judge_from),
    )


def _lags(run: _Run) -> Finding | None:
    """Test whether the lag explains the gap: an average `lag` epochs back is about slope times lag behind."""
    assert run.age is not None
    shape, back = run.shape, run.age.reach / run.age.rate
    if shape is None or shape.significance < 2.0:
        return None
    # The slope over the span that the average looks back on, at most what "now" is.
    span = max(3, min(len(run.base), math.ceil(min(back, shape.epochs)) + 1))
    slope = slope_of(run.base[-span:])
    expected = slope * back
    if slope <= 0 or expected < _EXPLAINS * -run.gap:
        return None
    # Behind by no more than the noise, a lag is not seen any more.
    allowed = max(shape.noise, run.tolerance, 0.1 * -run.gap) / slope * run.age.rate
    better = 1 - 1 / max(_SMALLEST_WINDOW, min(allowed, run.age.reach / 2))
    return Finding(
        "lags",
        f"The average looks back {run.back(back)} while the metric gains {run.sign * slope:.2g} {run.when.each}: about "
        f"{expected:.2g} behind is to be expected; {run.gap_text()}.",
        f"Use a smaller decay (about {better:.4g}), or wait until the metric levels off: then the lag costs nothing.",
        run.evidence(
            lag_epochs=back * run.when.gap, slope=run.sign * slope, expected_gap=expected, better_decay=better
        ),
    )


def _behind_by_the_curves(run: _Run) -> Finding | None:
    """Tell a lag from the curves alone: how long ago the model stood where its average stands now."""
    behind, shape = run.gaps[-3:], run.shape
    if len(run.base) < 2 or len(behind) < 2 or max(behind) >= 0 or (shape is not None and shape.significance < 2.0):
        return None
    slope = slope_of(run.base[-10:])
    rising = slope_of(run.ema[-len(run.gaps) :][-10:])
    if slope <= 0 or rising <= 0 or -run.gap < slope * (1 if shape is None else 0.3):
        return None
    back = -run.gap / slope
    young = back > run.when.done() / run.when.gap if run.when.unit == "epoch" else back > len(run.base)
    text = f"T{run.gap_text()[1:]}, and both still rise: it stands where the model stood about {run.back(back)} ago"
    if young:
        return Finding(
            "too early",
            f"{text}, before the log begins: its starting weights are still in it.",
            f'Wait, or use {_SMALLER}, or decay_type="threshold", which forgets the start.',
            run.evidence(lag_epochs=back * run.when.gap, slope=run.sign * slope),
        )
    return Finding(
        "lags",
        f"{text}: a lag, since its decay is too high for a model that learns this fast.",
        f"Use {_SMALLER}, or wait until the metric levels off: then the lag costs nothing.",
        run.evidence(lag_epochs=back * run.when.gap, slope=run.sign * slope),
    )


def _unexplained(run: _Run) -> Finding:
    look = (
        "Look at what is not a weight: are BatchNorm statistics averaged or recomputed, is update() called after every "
        "optimizer step and only then, was the average built after the checkpoint was loaded?"
    )
    if run.age is None:
        return Finding(
            "unexplained",
            f"{run.gap_text().capitalize()}, and the model does not rise fast enough for a lag to be the cause.",
            f"{look} With --decay and --updates-per-epoch a start that is too recent is told from these.",
            run.evidence(tolerance=run.tolerance),
        )
    return Finding(
        "unexplained",
        f"Neither the start ({run.age.share:.1%} of it left) nor the lag explains it: {run.gap_text()}.",
        look,
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
    # Without a noise to compare with, a hundredth of the level is seen.
    small = abs(run.gap) < 0.01 * abs(run.base[-1])
    text = f"{run.gap_text()}: too few epochs to tell that from chance.".capitalize()
    if run.gap >= 0 or small:
        return Finding("marginal", text, f"Ask again after {_FEW} epochs with an average.", run.evidence())
    return Finding(
        "behind",
        text,
        f"Ask again after {_FEW} epochs with an average. If it was started less than 10 epochs ago, wait; if it stays "
        f"behind, use {_SMALLER}; if the model itself is unstable, fix that first.",
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

"""One verdict on a run from all that its log shows: the pattern, the average, the learning rate and the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from fastema.advisor.diagnosis import Finding
from fastema.advisor.outlook import LITTLE
from fastema.advisor.patterns import StartAdvice
from fastema.advisor.series import Series
from fastema.advisor.statistics import noise_of

_LOWERED = 0.3  # below this share of its highest, the learning rate has been lowered already
_FIX = "Not yet: fix the training first."
_USE = {
    "improving": "Yes: start it now.",
    "oscillation": "Yes: start it now.",
    "too short": "Yes, from the start.",
    "plateau": "Not yet: it would have little to smooth.",
    "overfitted": "No: stop this run.",
}
_USE_OF_AN_AVERAGE = {
    "fine": "Yes: it helps.",
    "marginal": "As you like: it makes no clear difference so far.",
    "too early": "Not yet: the average is too young.",
    "lags": "Not with this decay: the average lags behind.",
    "behind": "Not yet: the average is behind.",
    "unexplained": "No: the average is behind.",
    "unstable": _FIX,
}


@dataclass(frozen=True)
class Verdict:
    """The answer to "use an average?".

    Attributes:
        use: the answer, a sentence.
        kind: what was seen: a pattern, the kind of a finding, or "over".
        why: the reasons, a sentence each.
        next_step: what to do.
    """

    use: str
    kind: str
    why: tuple[str, ...]
    next_step: str


def verdict_on(
    series: Series,
    start: StartAdvice,
    finding: Finding | None = None,
    loss: tuple[str, StartAdvice] | None = None,
    averaged: str = "",
) -> Verdict:
    """Return the verdict.

    Args:
        series: the run.
        start: what `should_start` says of the model's metric.
        finding: the most urgent one on the average, if the log has one.
        loss: another metric of the same data, a loss, and what `should_start` says of it.
        averaged: why the metric is an average's already; "" if it is not known to be.
    """
    best = _best(series)
    if series.diverged_at:
        return Verdict(
            _FIX,
            "collapse",
            (f"The metric is no number from {series.diverged_at} on: the training diverged.",),
            f"Go back to a checkpoint before {series.diverged_at}; lower the learning rate, clip gradients.",
        )
    if start.action == "fix first" and not (finding is not None and finding.kind == "fine"):
        kind, why, step = start.pattern, start.reason, start.next_step
        if finding is not None and finding.kind == "unstable":
            return Verdict(_FIX, kind, (finding.text,), finding.next_step)
        return Verdict(_FIX, kind, _sentences(why, best if kind == "declining" else ""), step)
    past = _past_best(start, finding, loss)
    if past is not None and not series.over:
        return Verdict(_USE["overfitted"], "overfitted", _sentences(*past[0]), past[1])
    if finding is not None:
        return Verdict(_USE_OF_AN_AVERAGE[finding.kind], finding.kind, (finding.text,), finding.next_step)
    if series.over:
        return Verdict(
            "Too late for this run: it is over.",
            "over",
            _sentences(series.over, *(past[0] if past else (start.reason, best))),
            f"{past[1] if past else _take(series, averaged)} For another run: {_another_run(series)}",
        )
    if averaged:
        return Verdict("It is in use.", start.pattern, _sentences(averaged, start.reason, best), _go_on(start, series))
    fallen = series.final_rate is not None and series.final_rate <= LITTLE
    lowered = series.final_rate is not None and series.final_rate <= _LOWERED
    if start.pattern == "plateau" and lowered:
        return Verdict(
            "Not for this run: it is done.",
            "plateau",
            _sentences(start.reason, f"the learning rate was lowered to {series.final_rate:.2g} of its highest", best),
            f"{_take(series, averaged)} An average would bring little now.",
        )
    if fallen:
        return Verdict(
            "As you like: the rate has fallen, so it brings little now.",
            start.pattern,
            _sentences(start.reason, f"the learning rate is at {series.final_rate:.2g} of its highest"),
            "Train on to the end of the schedule.",
        )
    return Verdict(_USE[start.pattern], start.pattern, _sentences(start.reason, best), start.next_step)


def _past_best(
    start: StartAdvice, finding: Finding | None, loss: tuple[str, StartAdvice] | None
) -> tuple[tuple[str, ...], str] | None:
    """Return the reasons and the next step for a run that has become worse since its best."""
    if finding is not None and finding.kind == "fine":
        return None
    if start.pattern == "overfitted":
        return (start.reason,), start.next_step
    if loss is not None and loss[1].pattern == "overfitted" and start.pattern in ("plateau", "oscillation"):
        return (f"by {loss[0]} {loss[1].reason}", start.reason), loss[1].next_step
    return None


def _best(series: Series) -> str:
    """Return when the metric was best, if that is not now."""
    at = _best_at(series)
    away = abs(series.base[at] - median(series.base[-3:]))
    if len(series.base) - at <= 3 or away <= 2 * noise_of(series.base[-20:]):
        return ""
    return f"it was best in {series.clock.at(at)}, at {series.base[at]:.4g}; now it is at {series.base[-1]:.4g}"


def _best_at(series: Series) -> int:
    values: Sequence[float] = series.base
    return (max if series.mode == "max" else min)(range(len(values)), key=values.__getitem__)


def _take(series: Series, averaged: str) -> str:
    if series.of_training:
        return "Take the last checkpoint, or the best one of a validation."
    what = "the averaged checkpoint" if averaged else "the checkpoint"
    return f"Take {what} of {series.clock.at(_best_at(series))}, the best one."


def _another_run(series: Series) -> str:
    if series.final_rate is not None and series.final_rate <= LITTLE:
        return "with a rate that falls to almost 0 an average helps in the middle, and hardly at the end."
    return "average from the first step (decay 0.999, threshold), and keep the better one."


def _go_on(start: StartAdvice, series: Series) -> str:
    if start.pattern == "plateau":
        return f"{_take(series, 'yes')} Nothing more is to be gained without another learning rate or more data."
    return "Train on; judge by these numbers, and use the averaged checkpoint."


def _sentences(*texts: str) -> tuple[str, ...]:
    return tuple(f"{text[0].upper()}{text[1:].rstrip('.')}." for text in texts if text)

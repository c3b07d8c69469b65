"""One metric and its average over the last run of a log, in the order of the file, with its clock and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from fastema.advisor.clock import Clock
from fastema.advisor.history_files import History, is_of_training
from fastema.advisor.metric_names import is_epoch, is_learning_rate, is_step, mode_of, words_of
from fastema.advisor.readers.rows import PART, Row, merged

# The share of the highest learning rate below which a run is at its end.
_AT_ZERO = 0.02


@dataclass(frozen=True)
class Series:
    """The values of a run, one for each evaluation.

    Attributes:
        mode: which is better, "max" or "min".
        of_training: whether it is a metric of the training data.
        base: of the model.
        ema: of its average; None where there was none.
        clock: when each value was measured.
        updates_per_epoch: optimizer steps an epoch (an evaluation, if the file has no epochs); None: unknown.
        rates: the learning rates of the run, in order.
        over: why the run is over; "" if that is not known.
        diverged_at: when the metric became NaN; "" if it is finite at the end.
        ema_decay: that of the average's last update, if the file says it.
        notes: what was left out, a sentence each.
    """

    mode: str
    of_training: bool
    base: list[float]
    ema: list[float | None]
    clock: Clock
    updates_per_epoch: float | None
    rates: list[float]
    over: str
    diverged_at: str
    ema_decay: float | None
    notes: list[str] = field(default_factory=list)

    @property
    def final_rate(self) -> float | None:
        """The last learning rate as a share of the highest; None: the file has none."""
        return self.rates[-1] / max(self.rates) if self.rates and max(self.rates) > 0 else None


@dataclass(frozen=True)
class _Evaluation:
    """A row with the metric, and the clocks as the rows before it left them."""

    row: Row
    value: float
    epoch: float | None
    step: float | None  # its own
    steps_before: float | None  # of rows without the metric: trainers count iterations there, even where they count
    # epochs in the rows of the validation
    index: int


def series_of(history: History, metric: str, average: str | None = None, mode: str | None = None) -> Series:
    """Return the last run of a metric, and of its average; `mode` is that of the metric's name unless it is given.

    Raises:
        ValueError: the metric is unknown, or has no finite number.
    """
    history.column(metric)
    notes: list[str] = []
    rows = merged(history.rows)
    found = _last_run(_evaluations(rows, metric), notes)
    rows = rows[_first_row(rows, found, metric) :]
    finite = [i for i, each in enumerate(found) if math.isfinite(each.value)]
    if not finite:
        raise ValueError(f"{history.source}: column {metric!r} has no finite number")
    # NaN from some moment on is a training that diverged; elsewhere it is a gap.
    diverged = finite[-1] < len(found) - 1 and finite == list(range(len(finite)))
    clock = _clock_of(found, rows)
    if len(finite) < len(found) and not diverged:
        notes.append(f"{len(found) - len(finite)} of {len(found)} values are no finite numbers, and left out.")
    kept = [found[i] for i in finite]
    labels = [clock.labels[i] for i in finite]
    rates = [rate for row in rows if (rate := _rate_of(row)) is not None]
    kept_clock = Clock(labels, clock.unit, clock.zero_based)
    decays = [value for row in rows for name, value in row.items() if words_of(name) in _DECAYS and 0 < value < 1]
    series = Series(
        mode=mode or mode_of(metric),
        of_training=is_of_training(history, metric),
        base=[each.value for each in kept],
        ema=_averages(rows, kept, average),
        clock=kept_clock,
        updates_per_epoch=_updates_per_epoch(kept, kept_clock),
        rates=rates,
        over="",
        diverged_at=clock.at(finite[-1] + 1) if diverged else "",
        ema_decay=decays[-1] if decays else None,
        notes=notes,
    )
    return Series(**{**vars(series), "over": _over(series, rows, history.totals)})


_DECAYS = (("ema", "decay"), ("decay", "ema"))


def _evaluations(rows: Sequence[Row], metric: str) -> list[_Evaluation]:
    found = []
    epoch = steps_before = None
    for index, row in enumerate(rows):
        epoch = next((value for name, value in row.items() if is_epoch(name)), epoch)
        step = _step_of(row)
        if metric in row:
            found.append(_Evaluation(row, row[metric], epoch, step, steps_before, index))
        elif step is not None:
            steps_before = step
    return found


def _step_of(row: Row) -> float | None:
    steps = [name for name in row if is_step(name)]
    # The whole run's count tells more than that within an epoch.
    steps.sort(key=lambda name: ("global" not in words_of(name), "iter" in words_of(name)))
    return row[steps[0]] if steps else None


def _rate_of(row: Row) -> float | None:
    rates = [value for name, value in row.items() if is_learning_rate(name) and math.isfinite(value) and value >= 0]
    return max(rates) if rates else None


def _own_steps_count_updates(found: Sequence[_Evaluation]) -> bool:
    """Return whether the steps of the evaluations go on with those of the rows between them."""
    return all(
        each.step is not None and (each.steps_before is None or each.step >= each.steps_before - 1) for each in found
    )


def _last_run(found: list[_Evaluation], notes: list[str]) -> list[_Evaluation]:
    """Leave out earlier runs: the file was appended to, by another run or by one that was resumed."""
    times = _times(found)
    run: list[int] = []
    runs = 1
    for i, now in enumerate(times):
        if run and now < times[run[-1]]:
            if now <= times[run[0]]:
                runs += 1
                run = []
            else:
                resumed = [k for k in run if times[k] < now]
                notes.append(f"It was resumed: {len(run) - len(resumed)} later values from before are left out.")
                run = resumed
        run.append(i)
    if runs > 1:
        notes.append(f"The file holds {runs} runs; this is the last one, of {len(run)} values.")
    return [found[i] for i in run]


def _times(found: Sequence[_Evaluation]) -> list[tuple[float, ...]]:
    """Return what never falls within a run."""
    if all(each.epoch is not None for each in found) and len({each.epoch for each in found}) > 1:
        return [(each.epoch or 0.0,) for each in found]
    if all(each.step is not None for each in found) and len({each.step for each in found}) > 1:
        return [(each.step or 0.0,) for each in found]
    if all(each.steps_before is not None for each in found):
        return [(each.steps_before or 0.0,) for each in found]
    return [(-each.row.get(PART, 0.0),) if PART in each.row else (0.0,) for each in found]


def _first_row(rows: Sequence[Row], found: Sequence[_Evaluation], metric: str) -> int:
    """Return where the rows of this run begin: after the last evaluation of the run before."""
    before = [i for i, row in enumerate(rows[: found[0].index]) if metric in row]
    return before[-1] + 1 if before else 0


def _clock_of(found: Sequence[_Evaluation], rows: Sequence[Row]) -> Clock:
    epochs = [each.epoch for each in found]
    if all(epoch is not None for epoch in epochs) and (len(found) == 1 or len(set(epochs)) > 1):
        counted = [value for row in rows for name, value in row.items() if is_epoch(name)]
        whole = all(value == round(value) for value in counted)
        # Hugging Face's evaluation before the training has the epoch 0 and the step 0.
        zero_based = whole and min(counted) == 0 and not any(each.step == 0 for each in found[:1])
        return Clock([epoch or 0.0 for epoch in epochs], "epoch", zero_based)
    steps = [each.step for each in found]
    if all(step is not None for step in steps) and all(a < b for a, b in pairwise(step or 0.0 for step in steps)):
        labels = [step or 0.0 for step in steps]
        each = median(b - a for a, b in pairwise(labels)) if len(labels) > 1 else 1
        if each == 1 or not _own_steps_count_updates(found):
            return Clock(labels, "epoch", labels[0] == 0)
        return Clock(labels, "step")
    return Clock(range(1, len(found) + 1), "evaluation")


def _updates_per_epoch(found: Sequence[_Evaluation], clock: Clock) -> float | None:
    """Return the updates of an epoch, or those from one evaluation to the next where the file has no epochs."""
    if len(found) < 2:
        return None
    own = _own_steps_count_updates(found)
    counts = [each.step if own else each.steps_before for each in found]
    if any(count is None for count in counts):
        return None
    steps = [count or 0.0 for count in counts]
    between = median(b - a for a, b in pairwise(steps))
    if between > 1:
        if any("_step" in each.row for each in found) and not any("global" in words_of(name) for name in found[0].row):
            return None  # W&B counts calls of log()
        return between / clock.gap if clock.unit == "epoch" else between
    # Iterations within an epoch begin anew in each.
    inside = between <= 0 and clock.unit == "epoch" and max(steps) > 1
    return max(steps) if inside else None


def _averages(rows: Sequence[Row], kept: Sequence[_Evaluation], average: str | None) -> list[float | None]:
    if average is None:
        return []
    here = [each.row.get(average) for each in kept]
    if any(value is not None for value in here):
        return [value if value is not None and math.isfinite(value) else None for value in here]
    # Logged apart, in the order of the evaluations: by its own clock, else by its number.
    apart = _evaluations(rows, average)
    by_time = {(each.epoch, each.step): each.value for each in apart}
    by_epoch = {each.epoch: each.value for each in apart if each.epoch is not None}
    found = [by_time.get((each.epoch, each.step), by_epoch.get(each.epoch or 0.0)) for each in kept]
    if not any(value is not None for value in found) and len(apart) == len(kept):
        found = [each.value for each in apart]
    return [value if value is not None and math.isfinite(value) else None for value in found]


def _over(series: Series, rows: Sequence[Row], totals: dict[str, float]) -> str:
    last_step = max((step for row in rows if (step := _step_of(row)) is not None), default=0.0)
    if (steps := totals.get("steps")) and last_step >= steps:
        return f"step {last_step:,.0f} of {steps:,.0f} is done"
    clock, epochs = series.clock, totals.get("epochs")
    if epochs and clock.unit == "epoch" and clock.done() >= epochs:
        return f"epoch {clock.done():,.0f} of {epochs:,.0f} is done"
    final = series.final_rate
    if final is not None and final <= _AT_ZERO and len(series.base) >= 3 and series.rates[-1] < series.rates[0]:
        return "the learning rate is at 0" if final < 1e-4 else f"the learning rate is at {final:.1%} of its highest"
    return ""

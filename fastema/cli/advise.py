"""`fastema advise`: which decay, when to start, and why an average is worse."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastema.errors import UserError
from fastema.extras import missing_packages

if TYPE_CHECKING:
    from fastema.advisor import Recommendation
    from fastema.advisor.clock import Clock
    from fastema.advisor.history_files import History
    from fastema.advisor.page import Advice, Window
    from fastema.advisor.series import Series

LR_SCHEDULES = ("constant", "cosine", "linear", "wsd", "restarts")  # those of fastema.advisor, whose import takes torch

HELP = "which decay, when to start, and why an average is worse"
DESCRIPTION = "Advises on the EMA of a run: from its length, from its history, or from both."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    length = parser.add_argument_group("the run: which decay, how long to wait")
    length.add_argument("--epochs", type=int, metavar="N", help="epochs of the whole run")
    length.add_argument("--images", type=int, metavar="N", help="training images")
    length.add_argument("--batch-size", type=int, default=1, metavar="N", help="images a batch (default: 1)")
    length.add_argument(
        "--accumulation-steps", type=int, default=1, metavar="N", help="batches an optimizer step (default: 1)"
    )
    length.add_argument("--drop-last", action="store_true", help="the loader drops a last, short batch")
    length.add_argument(
        "--updates-per-epoch", type=float, metavar="N", help="optimizer steps an epoch, if you know them"
    )
    length.add_argument(
        "--lr-schedule",
        choices=LR_SCHEDULES,
        help="the learning rate: constant, cosine, linear, wsd (linear in the last fifth), or cosine with restarts "
        "(default: the history's own, else constant)",
    )
    length.add_argument(
        "--final-lr", type=float, default=0.0, metavar="F", help="where it ends, as a share of the highest (default: 0)"
    )
    length.add_argument("--recipe-decay", type=float, metavar="D", help="the decay of the recipe that you follow")
    length.add_argument(
        "--recipe-batch-size", type=int, metavar="N", help="images an optimizer step in that recipe, if yours differ"
    )

    history = parser.add_argument_group("the history: start now, and why is the average worse")
    history.add_argument(
        "--history", type=Path, metavar="FILE", help="the log of any trainer: CSV, JSON, text, or TensorBoard's"
    )
    history.add_argument("--metric", metavar="NAME", help="the metric to judge (default: the validation's main one)")
    history.add_argument("--ema-metric", metavar="NAME", help="the average's column (default: by the metric's name)")
    history.add_argument("--mode", choices=("max", "min"), help="which is better (default: by the metric's name)")
    history.add_argument("--decay", type=float, metavar="D", help="the average's decay (default: what is recommended)")
    history.add_argument(
        "--decay-type", default="threshold", metavar="TYPE", help="the average's schedule (default: threshold)"
    )
    history.add_argument("--started-at", type=int, metavar="N", help="epochs done when the average was built")

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON instead of a page")
    output.add_argument("--plot", type=Path, metavar="PNG", help="draw the history, the window and the findings")


def run(arguments: argparse.Namespace) -> None:
    """Print the advice as a page or JSON, and draw the picture."""
    if arguments.history is None and arguments.epochs is None:
        raise UserError("give --history FILE, or --epochs with --images (or --updates-per-epoch), or both")
    if arguments.plot is not None and arguments.history is None:
        raise UserError("--plot draws a history: give --history FILE")
    if arguments.plot is not None and not arguments.plot.parent.is_dir():
        raise UserError(f"--plot: there is no folder {arguments.plot.parent}")
    if arguments.plot is not None and missing_packages({"matplotlib": "matplotlib"}):
        raise UserError("--plot draws with matplotlib, which is not installed: pip install matplotlib")
    from fastema.advisor.page import plain, plot, print_page

    try:
        advice = _advice(arguments)
    except ValueError as error:
        raise UserError(str(error)) from error
    if arguments.json:
        print(json.dumps(_finite(plain(advice)), indent=1))
    else:
        print_page(advice)
    if arguments.plot is not None:
        try:
            plot(advice, arguments.plot)
        except (OSError, ValueError) as error:
            raise UserError(f"--plot {arguments.plot}: {error}") from error
        if not arguments.json:
            print(f"Plot: {arguments.plot}")


def _advice(arguments: argparse.Namespace) -> Advice:
    from fastema.advisor.history_files import average_of, metric_of, read_history
    from fastema.advisor.page import Advice
    from fastema.advisor.series import series_of

    rate = _rate(arguments)
    if arguments.history is None:
        return Advice(rate, _recommendation(arguments, rate), _window(arguments, arguments.decay, rate, None))
    seen = read_history(arguments.history)
    metric = metric_of(seen, arguments.metric)
    average = arguments.ema_metric or average_of(seen, metric)
    if average is not None:
        seen.column(average)
    series = series_of(seen, metric, average, arguments.mode)
    if rate is None:
        rate = series.updates_per_epoch
    advice = Advice(rate, _recommendation(arguments, rate, series))
    _judge(arguments, advice, seen, metric, average, series)
    return advice


def _judge(
    arguments: argparse.Namespace, advice: Advice, seen: History, metric: str, average: str | None, series: Series
) -> None:
    """Add the history, the average's, and the verdict."""
    from fastema.advisor import diagnose
    from fastema.advisor.history_files import averaged_by, loss_beside, other_metrics
    from fastema.advisor.patterns import find_pattern
    from fastema.advisor.series import series_of
    from fastema.advisor.verdict import verdict_on

    mode = series.mode
    advice.source, advice.metric, advice.mode, advice.base = seen.source, metric, mode, series.base
    advice.clock, advice.length, advice.notes = series.clock, series.clock.span(), list(series.notes)
    advice.others = other_metrics(seen, metric) if arguments.metric is None else []
    if series.clock.unit == "epoch" and arguments.epochs is not None and series.clock.done() >= arguments.epochs:
        series = replace(series, over=f"epoch {series.clock.done():,.0f} of {arguments.epochs:,} is done")
    advice.start = find_pattern(series.base, mode, series.clock)
    if series.of_training:
        advice.notes.append(
            f"{metric} is of the training data: it shows neither overfitting nor what an average gains."
        )
    averaged = averaged_by(seen, metric)
    decay = arguments.decay
    compared = average is not None and any(value is not None for value in series.ema)
    if compared and series.ema == series.base:
        compared, averaged = False, f"{metric} and {average} are equal everywhere: both are the average's"
    if compared:
        advice.ema, advice.ema_metric = series.ema, average
        rate = advice.updates_per_epoch
        total = None if rate is None else _total_steps(arguments, rate)
        advice.findings = diagnose(
            series.base,
            _without_gaps(series.ema),
            decay,
            rate if decay is not None else None,
            arguments.started_at,
            mode,
            arguments.decay_type,
            total,
            series.clock,
        )
        if decay is None or rate is None:
            missing = [*(["--decay"] if decay is None else []), *(["--updates-per-epoch"] if rate is None else [])]
            advice.notes.append(f"With {' and '.join(missing)} the reach of the average is known, and its age.")
    advice.window = _window(arguments, decay, advice.updates_per_epoch, series.clock)
    loss = loss_beside(seen, metric)
    beside = None
    if loss is not None:
        values = series_of(seen, loss)
        beside = (loss, find_pattern(values.base, "min", values.clock))
    advice.verdict = verdict_on(series, advice.start, advice.findings[0] if advice.findings else None, beside, averaged)


def _without_gaps(values: list[float | None]) -> list[float | None]:
    """Return the average's values; before the last gap it counts as not yet started."""
    last = max((i for i, value in enumerate(values) if value is None), default=-1)
    if last == len(values) - 1:  # the last evaluations are without one: those before count
        first = next(i for i, value in enumerate(values) if value is not None)
        return [None] * first + [values[first]]
    return [None] * (last + 1) + values[last + 1 :]


def _recommendation(
    arguments: argparse.Namespace, rate: float | None, series: Series | None = None
) -> Recommendation | None:
    from fastema.advisor import recommend_decay
    from fastema.advisor.outlook import schedule_of

    if arguments.epochs is None:
        return None
    if rate is None:
        raise ValueError("--epochs needs --images (with --batch-size and --accumulation-steps) or --updates-per-epoch")
    schedule, final = arguments.lr_schedule, arguments.final_lr
    if schedule is None and series is not None and len(series.rates) > 2 and series.clock.unit == "epoch":
        schedule, final = schedule_of(series.rates, min(1.0, series.clock.done() / arguments.epochs))
    return recommend_decay(
        arguments.epochs, rate, schedule or "constant", final, arguments.recipe_decay, _batch_ratio(arguments)
    )


def _window(
    arguments: argparse.Namespace, decay: float | None, rate: float | None, clock: Clock | None
) -> Window | None:
    """Return how far the average looks back: at the last epoch of the history, or at most."""
    from fastema.advisor import lag, settle_epochs, window
    from fastema.advisor.page import Window
    from fastema.core.decays import Decays

    if decay is None:
        return None
    decay_type = arguments.decay_type
    Decays(decay, decay_type, 1, 0, {})  # refuses an unknown schedule
    if rate is None or (clock is not None and clock.unit != "epoch"):
        return Window(decay, decay_type, window(decay))
    total = _total_steps(arguments, rate)
    settle = settle_epochs(decay, rate, decay_type=decay_type, total_steps=total)
    if clock is None:
        return Window(decay, decay_type, window(decay), lag(decay, rate), settle)
    updates = max(1, round((clock.done() - (arguments.started_at or 0)) * rate))
    now = Decays(decay, decay_type, total, 0, {}).at(updates)[0]
    reach = min(window(now), float(updates))
    return Window(decay, decay_type, reach, reach / rate, settle, clock.labels[-1])


def _rate(arguments: argparse.Namespace) -> float | None:
    from fastema.advisor import updates_per_epoch
    from fastema.advisor.windows import checked_rate

    if arguments.updates_per_epoch is not None:
        return checked_rate(arguments.updates_per_epoch)
    if arguments.images is None:
        return None
    return updates_per_epoch(
        arguments.images, arguments.batch_size, arguments.accumulation_steps, drop_last=arguments.drop_last
    )


def _batch_ratio(arguments: argparse.Namespace) -> float:
    from fastema.core.checks import checked_count

    recipe = arguments.recipe_batch_size
    if recipe is None:
        return 1.0
    checked_count("--recipe-batch-size", recipe, at_least=1)
    if arguments.recipe_decay is None:
        raise ValueError("--recipe-batch-size says for which batch --recipe-decay was chosen: give both")
    return float(arguments.batch_size * arguments.accumulation_steps / recipe)


def _total_steps(arguments: argparse.Namespace, rate: float) -> int | None:
    return None if arguments.epochs is None else max(1, round(arguments.epochs * rate))


def _finite(value: Any) -> Any:
    # JSON has no infinity and no NaN.
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""`fastema advise`: which decay, when to start, and why an average is worse."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastema.segmentation.errors import UserError
from fastema.segmentation.train_extra import require_train_extra

if TYPE_CHECKING:
    from fastema.advisor.page import Advice
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
        default="constant",
        choices=LR_SCHEDULES,
        help="the learning rate: constant, cosine, linear, wsd (linear in the last fifth), or cosine with restarts "
        "(default: constant)",
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
    if not arguments.json or arguments.plot is not None:
        require_train_extra()
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
    from fastema.advisor import lag, recommend_decay, settle_epochs, should_start, window
    from fastema.advisor.history_files import average_of, metric_of, mode_of, other_metrics, read_history
    from fastema.advisor.page import Advice, Window
    from fastema.advisor.series import series_of

    rate = _rate(arguments)
    recommendation = None
    if arguments.epochs is not None:
        if rate is None:
            raise ValueError(
                "--epochs needs --images (with --batch-size and --accumulation-steps) or --updates-per-epoch"
            )
        recommendation = recommend_decay(
            arguments.epochs,
            rate,
            arguments.lr_schedule,
            arguments.final_lr,
            arguments.recipe_decay,
            _batch_ratio(arguments),
        )
    decay, decay_type = arguments.decay, arguments.decay_type
    reach = None
    if decay is not None:
        reach = Window(decay, decay_type, window(decay))
        if rate is not None:
            settle = settle_epochs(decay, rate, decay_type=decay_type, total_steps=_total_steps(arguments, rate))
            reach = Window(decay, decay_type, window(decay), lag(decay, rate), settle)
    advice = Advice(rate, recommendation, reach)
    if arguments.history is None:
        return advice
    seen = read_history(arguments.history)
    metric = metric_of(seen, arguments.metric)
    mode = arguments.mode or mode_of(metric)
    average = arguments.ema_metric or average_of(seen, metric)
    if average is not None:
        seen.column(average)
    series = series_of(seen, metric, average)
    advice.source, advice.metric, advice.mode, advice.base = seen.source, metric, mode, series.base
    advice.length = series.clock.span()
    advice.notes += series.notes
    if arguments.metric is None and (others := other_metrics(seen, metric)):
        advice.others = others
    advice.start = should_start(series.base, mode)
    _diagnose(arguments, advice, series, average, rate)
    return advice


def _diagnose(
    arguments: argparse.Namespace, advice: Advice, series: Series, average: str | None, rate: float | None
) -> None:
    """Add the average's history and the findings, if the history has an average."""
    from fastema.advisor import diagnose

    values = series.ema
    if all(value is None for value in values):
        return
    advice.ema = values
    per_evaluation = series.updates_per_epoch if rate is None else rate
    if per_evaluation is not None and series.clock.unit == "epoch":
        per_evaluation *= series.clock.gap
    missing = [
        flag
        for flag, value in (("--decay", arguments.decay), ("--images or --updates-per-epoch", per_evaluation))
        if value is None
    ]
    if missing:
        advice.notes.append(f"To say why the average ({average}) is better or worse, give {' and '.join(missing)}.")
        return
    assert per_evaluation is not None
    advice.findings = diagnose(
        advice.base,
        values,
        arguments.decay,
        per_evaluation,
        arguments.started_at,
        advice.mode,
        arguments.decay_type,
        _total_steps(arguments, per_evaluation),
    )


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

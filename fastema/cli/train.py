"""`fastema train`: the flags, and their checked options."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from fastema.cli.training_params import read_training_params, refuse_conflicts
from fastema.schedules import EMA_DECAY_FUNCTIONS, make_schedule
from fastema.segmentation.distributed.process_group import process_group
from fastema.segmentation.errors import UserError
from fastema.segmentation.options import EMA_STARTS, PRECISIONS, SCHEDULERS, SYNTHETIC, TrainOptions, option_flag
from fastema.segmentation.train_extra import require_train_extra

Options = TypeVar("Options", bound=TrainOptions)

HELP = "train a segmentation model and validate its EMA at no copy"
DESCRIPTION = "Trains a segmentation model; with --use-ema, base and EMA are validated after every epoch."

_REQUIRED = ("dataset_path", "checkpoint_dir")
_DEFAULTS = {field.name: field.default for field in fields(TrainOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, with the defaults of `TrainOptions`."""
    for add in (_add_data, _add_model, _add_stages, _add_optimisation, _add_ema, _add_checkpoints):
        add(parser)
    parser.set_defaults(**{name: value for name, value in _DEFAULTS.items() if name not in _REQUIRED})
    for action in parser._actions:
        shown = _DEFAULTS.get(action.dest)
        if action.help and isinstance(shown, str | int | float) and not isinstance(shown, bool):
            action.help += f" (default: {shown})"


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset-path",
        required=True,
        metavar="DIR",
        help=f"folder with Train/Image and Train/GT_Object (COD10K-v3), Imgs and GT, or Image and Mask; "
        f"or '{SYNTHETIC}': a camouflage data set, generated on the spot",
    )
    data.add_argument(
        "--cam-only",
        action=argparse.BooleanOptionalAction,
        help="of COD10K, only the images with a camouflaged object, as the papers do; this is the default",
    )
    data.add_argument("--val-fraction", type=float, metavar="F", help="share of Train held out to validate on")
    data.add_argument("--num-workers", type=int, metavar="N", help="processes that read images beside the training")


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--backbone", metavar="NAME", help="any timm model with a feature pyramid")
    model.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="start from random weights")
    model.add_argument("--num-experts", type=int, metavar="N", help="experts at every level of the decoder; 0: none")
    model.add_argument("--top-k", type=int, metavar="K", help="experts that each image is given to")
    model.add_argument("--img-size", type=int, metavar="PX", help="images are trained on as squares of this size")
    model.add_argument("--device", metavar="DEV", help="auto, cpu, cuda, cuda:1, …")
    model.add_argument(
        "--amp",
        choices=PRECISIONS,
        help="16-bit forward and backward; fp16 (with loss scaling) on CUDA only, bf16 on a CPU too",
    )
    model.add_argument(
        "--fsdp",
        action="store_true",
        help="under torchrun: each process keeps a part of weights, moments and averages (fully_shard), not all of it",
    )


def _add_stages(parser: argparse.ArgumentParser) -> None:
    stages = parser.add_argument_group(
        "stages", "1: the decoder alone, the backbone frozen. 2: everything, the backbone at a tenth of the rate."
    )
    stages.add_argument(
        "--epochs", type=int, metavar="N", help="in all, both stages and those before a resume included"
    )
    stages.add_argument("--stage1-epochs", type=int, metavar="N", help="how many of them are stage 1")
    stages.add_argument("--skip-stage1", action="store_true", help="all epochs are stage 2, whatever --stage1-epochs")
    stages.add_argument(
        "--progressive-unfreeze",
        action="store_true",
        help="in stage 2, open the backbone level by level, the deepest first, until half of the stage",
    )
    stages.add_argument("--batch-size", type=int, metavar="N", help="images a batch, in all processes together")
    stages.add_argument("--stage2-batch-size", type=int, metavar="N", help="in stage 2 (default: --batch-size)")
    stages.add_argument("--accumulation-steps", type=int, metavar="N", help="batches an optimizer step, in both stages")


def _add_optimisation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation", "AdamW. The backbone is at a tenth of each rate, --min-lr too.")
    group.add_argument("--lr", type=float, metavar="LR", help="highest learning rate")
    group.add_argument("--stage2-lr", type=float, metavar="LR", help="highest learning rate of stage 2 (default: --lr)")
    group.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        help="over each stage anew: half a cosine; a cosine with warm restarts (3 cycles, each twice as long); "
        "one-cycle; or constant",
    )
    group.add_argument("--min-lr", type=float, metavar="LR", help="learning rate at the end of a stage (not: none)")
    group.add_argument("--warmup-epochs", type=int, metavar="N", help="linear warm-up at the start (not: onecycle)")
    group.add_argument("--weight-decay", type=float, metavar="W", help="AdamW's, on weights only")
    group.add_argument("--clip-grad", type=float, metavar="NORM", help="gradient norm limit; 0: none")
    group.add_argument("--seed", type=int, metavar="N", help="of weights, order, augmentation and synthetic data")


def _add_ema(parser: argparse.ArgumentParser) -> None:
    ema = parser.add_argument_group("exponential moving average")
    ema.add_argument("--use-ema", action=Given, nargs=0, const=True, help="validate the averaged weights every epoch")
    ema.add_argument("--ema-decay", action=Given, type=float, metavar="D", help="it looks back over 1 / (1 - D) steps")
    ema.add_argument(
        "--ema-decays",
        action=Given,
        type=_decays,
        metavar="D,D,…",
        help="several averages at once, in place of --ema-decay; the first is the main one, ema_net of last.pth",
    )
    ema.add_argument("--ema-decay-type", action=Given, metavar="TYPE", help="constant, threshold, exp, warmup, linear")
    ema.add_argument(
        "--ema-decay-args",
        action=Given,
        type=_decay_args,
        metavar="NAME=X,…",
        help="what the type takes: beta=15 (exp), inv_gamma=1,power=0.67 (warmup)",
    )
    ema.add_argument("--ema-start-epoch", action=Given, type=int, metavar="N", help="start it before epoch N")
    ema.add_argument(
        "--ema-start", action=Given, choices=EMA_STARTS, help="now, or auto: when the IoU so far says that it pays"
    )
    ema.add_argument(
        "--training-params",
        type=Path,
        metavar="FILE",
        help='these flags as JSON: {"ema": true, "ema_params": {"decay": 0.9999, "decay_type": "exp", "beta": 15}}',
    )


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("checkpoints")
    files.add_argument("--checkpoint-dir", required=True, type=Path, metavar="DIR", help="where everything is written")
    files.add_argument("--resume-from", type=Path, metavar="FILE", help="go on from a checkpoint of fastema train")
    files.add_argument(
        "--save-every", type=int, metavar="N", help="keep checkpoint_epoch{N}.pth of every Nth epoch; 0: of none"
    )


class Given(argparse.Action):
    """Store a value, and that its flag was given: --training-params may set another."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        namespace.given = {*getattr(namespace, "given", ()), self.dest}


def _decays(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 0.99,0.999, got {text!r}") from None


def _decay_args(text: str) -> dict[str, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected something like beta=15, got {text!r}") from None


def options_of(arguments: argparse.Namespace, kind: type[Options] = TrainOptions) -> Options:  # type: ignore[assignment]
    """Return the checked options of a command line, with those of --training-params.

    Args:
        arguments: of the command.
        kind: a dataclass with a field for each flag.

    Raises:
        UserError: a value is not allowed, or values do not go together.
    """
    values = {field.name: getattr(arguments, field.name) for field in fields(kind)}
    given: set[str] = getattr(arguments, "given", set())
    if {"ema_decay", "ema_decays"} <= given:
        raise UserError("--ema-decay and --ema-decays both say which averages there are: give one of them")
    if arguments.training_params is not None:
        from_file = read_training_params(arguments.training_params)
        refuse_conflicts(arguments.training_params, from_file, given, values)
        values.update(from_file)
    options = kind(**values)
    options.check()
    return options


def runnable_options(arguments: argparse.Namespace, kind: type[Options]) -> Options:
    """Return the options of a command line that can be run here.

    Raises:
        UserError: an option is not allowed, or a package is missing.
    """
    options = options_of(arguments, kind)
    require_train_extra()
    check_schedule(options)
    idle = sorted(getattr(arguments, "given", set()) - {"use_ema"})
    if idle and not options.use_ema:
        raise UserError(f"{', '.join(map(option_flag, idle))} without an EMA would do nothing: add --use-ema")
    return options


def check_schedule(options: TrainOptions) -> None:
    """Raise `UserError` if the decay schedule cannot be made, before an EMA that may start hours later."""
    if options.ema_decay_type not in EMA_DECAY_FUNCTIONS:
        known = ", ".join(sorted(EMA_DECAY_FUNCTIONS))
        raise UserError(f"--ema-decay-type must be one of {known}, got {options.ema_decay_type}")
    try:
        make_schedule(options.ema_decay_type, 1, dict(options.ema_decay_args or {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"--ema-decay-type {options.ema_decay_type} cannot be set up: {error}") from error


def run(arguments: argparse.Namespace) -> None:
    """Run a training.

    Raises:
        UserError: a flag, the data or the device cannot be used, or the training cannot go on.
    """
    with process_group() as processes:
        options = runnable_options(arguments, TrainOptions)
        from fastema.segmentation.train.run import run_training

        try:
            run_training(options, processes)
        except OSError as error:
            raise UserError(str(error)) from error

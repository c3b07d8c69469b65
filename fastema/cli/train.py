"""`fastema train`: the flags, and their checked options."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

from fastema.cli.training_params import read_training_params, refuse_conflicts
from fastema.errors import UserError
from fastema.schedules import EMA_DECAY_FUNCTIONS, make_schedule
from fastema.segmentation.distributed.process_group import process_group
from fastema.segmentation.options import GROUPS, NOT_FOR_ARGPARSE, TrainOptions, option_flag
from fastema.segmentation.train_extra import require_train_extra

Options = TypeVar("Options", bound=TrainOptions)

HELP = "train a segmentation model and validate its EMA at no copy"
DESCRIPTION = "Trains a segmentation model; with --use-ema, base and EMA are validated after every epoch."

# The types of plain values, by annotation.
_TYPES = {"int": int, "float": float, "str": str, "Path": Path}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `fastema train`."""
    add_flags(parser, TrainOptions)


def add_flags(parser: argparse.ArgumentParser, kind: type[TrainOptions]) -> None:
    """Add a flag for each field of a dataclass of options, and `--training-params`."""
    for name, description in GROUPS.items():
        own = [field for field in fields(kind) if field.metadata["group"] == name]
        if not own:
            continue
        group = parser.add_argument_group(name, description)
        for field in own:
            _add_flag(group, field)
        if name == "teacher":
            group.add_argument(
                "--no-use-ema",
                dest="use_ema",
                action=Given,
                nargs=0,
                const=False,
                default=argparse.SUPPRESS,
                help="train the student without an average; with one (--use-ema) is the default here",
            )
        if name == "exponential moving average":
            group.add_argument(
                "--training-params",
                type=Path,
                metavar="FILE",
                help="these flags as JSON: "
                '{"ema": true, "ema_params": {"decay": 0.9999, "decay_type": "exp", "beta": 15}}',
            )


def _add_flag(group: Any, field: Field[Any]) -> None:
    metadata = field.metadata.items()
    options = {name: value for name, value in metadata if name not in NOT_FOR_ARGPARSE and value is not None}
    options["dest"], flag = field.name, option_flag(field.name)
    if field.name.startswith(("ema_", "use_ema")):
        options["action"] = Given
    if field.default is MISSING:
        options.setdefault("required", True)
    else:
        options["default"] = field.default
    if isinstance(field.default, bool):
        if "action" not in options:
            options["action"] = "store_false" if field.default else "store_true"
            flag = flag.replace("--", "--no-") if field.default else flag
        elif options["action"] is Given:
            options |= {"nargs": 0, "const": True}
    elif "choices" not in options:
        options.setdefault("type", _TYPES.get(str(field.type).partition(" ")[0]))
    if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
        options["help"] += f" (default: {field.default})"
    group.add_argument(flag, **options)


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


def options_of(arguments: argparse.Namespace, kind: type[Options] = TrainOptions) -> Options:  # type: ignore[assignment]
    """Return the checked options of a command line, with those of --training-params.

    Args:
        arguments: of the command.
        kind: a dataclass with a field for each flag.
    """
    values = {field.name: getattr(arguments, field.name) for field in fields(kind)}
    given: set[str] = getattr(arguments, "given", set())
    if {"ema_decay", "ema_decays"} <= given:
        raise UserError("--ema-decay and --ema-decays both say which averages there are: give one of them")
    others = sorted({"ema_decay", "ema_decays", "ema_decay_type", "ema_decay_args"} & given)
    if "ema_profiles" in given and others:
        raise UserError(
            f"--ema-profiles and {option_flag(others[0])} both say how the averages decay: give one of them"
        )
    if arguments.training_params is not None:
        from_file = read_training_params(arguments.training_params)
        refuse_conflicts(arguments.training_params, from_file, given, values)
        values.update(from_file)
    options = kind(**values)
    options.check()
    return options


def runnable_options(arguments: argparse.Namespace, kind: type[Options]) -> Options:
    """Return the options of a command line that can be run here."""
    options = options_of(arguments, kind)
    require_train_extra()
    if options.snapshots:
        _require_safetensors()
    check_schedule(options)
    idle = sorted(getattr(arguments, "given", set()) - {"use_ema"})
    if idle and not options.use_ema:
        raise UserError(f"{', '.join(map(option_flag, idle))} without an EMA would do nothing: add --use-ema")
    return options


def _require_safetensors() -> None:
    from fastema.posthoc import SnapshotError
    from fastema.posthoc.snapshot_files import require_safetensors

    try:
        require_safetensors()
    except SnapshotError as error:
        raise UserError(f"--snapshots: {error}") from error


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
    """Run a training."""
    with process_group() as processes:
        options = runnable_options(arguments, TrainOptions)
        from fastema.segmentation.train.run import run_training

        run_training(options, processes)

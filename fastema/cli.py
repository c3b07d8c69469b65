"""The `fastema` command: `train`, `distill`, `evaluate`, `predict`, `advise`, `posthoc` and `info`.

Errors that the user can put right are one line on stderr and exit status 2; a traceback is for our own mistakes.
Only argparse and the flags are imported here: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

from fastema.advise_command import add_advise_arguments, run_advise
from fastema.posthoc_command import add_posthoc_arguments, run_posthoc
from fastema.segmentation.distill_command import add_distill_arguments, run_distill
from fastema.segmentation.errors import Terminated, UserError
from fastema.segmentation.evaluate_command import add_evaluate_arguments, run_evaluate
from fastema.segmentation.predict_command import add_predict_arguments, run_predict
from fastema.segmentation.train_command import add_train_arguments, run_train

Run: TypeAlias = Callable[[argparse.Namespace], None]
AddArguments: TypeAlias = Callable[[argparse.ArgumentParser], None]

# What a shell reports: 128 + SIGINT, and 128 + SIGTERM.
_INTERRUPTED, _TERMINATED = 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"fastema: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        what = "fastema: terminated" if terminated else "fastema: interrupted"
        print(": ".join([what, *map(str, interrupt.args)]), file=sys.stderr)
        return _TERMINATED if terminated else _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastema", description="Exponential moving averages of model weights, at the speed of memory."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Run, add_arguments: AddArguments | None, help: str, description: str) -> None:
        added = commands.add_parser(name, help=help, description=description)
        if add_arguments is not None:
            add_arguments(added)
        added.set_defaults(run=run)

    command(
        "train",
        run_train,
        add_train_arguments,
        help="train a segmentation model and validate its EMA at no copy",
        description="Trains a segmentation model; with --use-ema, base and EMA are validated after every epoch.",
    )
    command(
        "distill",
        run_distill,
        add_distill_arguments,
        help="train a small student from a trained teacher, the student averaged",
        description="Trains as fastema train does, with an EMA, towards the masks and towards what a teacher says of "
        "the same images. The teacher is frozen, is never averaged, and is in no checkpoint.",
    )
    command(
        "evaluate",
        run_evaluate,
        add_evaluate_arguments,
        help="every metric of a checkpoint, trained and averaged weights side by side",
        description="Evaluates a checkpoint of fastema train: IoU, Dice, S-measure, weighted F, mean E and MAE.",
    )
    command(
        "predict",
        run_predict,
        add_predict_arguments,
        help="write the masks of images",
        description="Writes a PNG for every image, at its size: grey levels are the probability of foreground.",
    )
    command(
        "advise",
        run_advise,
        add_advise_arguments,
        help="which decay, when to start, and why an average is worse",
        description="Advises on the EMA of a run: from its length, from its history, or from both.",
    )
    command(
        "posthoc",
        run_posthoc,
        add_posthoc_arguments,
        help="choose the average after the training, from snapshots",
        description="Makes an average of any width from snapshots of a few (fastema.posthoc.Snapshots), sweeps over "
        "widths with a command of yours, or says before the training which snapshots give which error.",
    )
    command(
        "info",
        _print_info,
        None,
        help="versions, and which backends are usable here",
        description="Prints versions, which backends are built and usable, and why one is not.",
    )
    return parser


def _print_info(_: argparse.Namespace) -> None:
    import torch

    import fastema
    from fastema import backends

    versions = {"fastema": fastema.__version__, "torch": torch.__version__, "python": platform.python_version()}
    versions["triton"] = _triton_version()
    versions["cuda"] = _cuda()
    for name, version in versions.items():
        print(f"{name:<8} {version}")
    lines = backends.report()
    width = max(len(backend.name) for backend in lines)
    print("backends")
    for backend in lines:
        print(f"  {backend.name:<{width}}  {'usable' if backend.usable else 'not usable'}: {backend.detail}")


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "torch was built without it"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but no usable device"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"


if __name__ == "__main__":
    sys.exit(main())

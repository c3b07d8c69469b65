"""`fastema distill`: `fastema train` for a student that also learns from a teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastema.cli import train
from fastema.segmentation.distributed.process_group import process_group
from fastema.segmentation.errors import UserError
from fastema.segmentation.options import DistillOptions

HELP = "train a small student from a trained teacher, the student averaged"
DESCRIPTION = (
    "Trains as fastema train does, with an EMA, towards the masks and towards what a teacher says of the same images. "
    "The teacher is frozen, is never averaged, and is in no checkpoint."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the teacher's flags and those of `fastema train`."""
    teacher = parser.add_argument_group(
        "teacher",
        "A checkpoint of fastema train: its averaged weights where it has any. It may be of another backbone, other "
        "experts, and another image size.",
    )
    teacher.add_argument("--teacher-checkpoint", required=True, type=Path, metavar="FILE", help="whom to learn from")
    teacher.add_argument(
        "--teacher-backbone",
        metavar="NAME",
        help="the backbone that FILE must have; a check, since FILE itself says how it is built",
    )
    teacher.add_argument(
        "--distill-weight",
        type=float,
        metavar="A",
        help="loss = (1 - A) x loss against the masks + A x distance to the teacher "
        f"(default: {DistillOptions.distill_weight})",
    )
    teacher.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"what both their logits are divided by before they are compared (default: {DistillOptions.temperature})",
    )
    teacher.add_argument(
        "--no-use-ema",
        dest="use_ema",
        action=train.Given,
        nargs=0,
        const=False,
        help="train the student without an average; with one (--use-ema) is the default here",
    )
    train.add_arguments(parser)
    parser.set_defaults(
        use_ema=DistillOptions.use_ema,
        distill_weight=DistillOptions.distill_weight,
        temperature=DistillOptions.temperature,
    )


def run(arguments: argparse.Namespace) -> None:
    """Run a distillation.

    Raises:
        UserError: a flag, the teacher, the data or the device cannot be used, or the training cannot go on.
    """
    with process_group() as processes:
        options = train.runnable_options(arguments, DistillOptions)
        from fastema.segmentation.train.run import run_distillation

        try:
            run_distillation(options, processes)
        except OSError as error:
            raise UserError(str(error)) from error

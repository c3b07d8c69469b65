"""`fastema distill`: `fastema train` for a student that also learns from a teacher."""

from __future__ import annotations

import argparse

from fastema.cli import train
from fastema.segmentation.distributed.process_group import process_group
from fastema.segmentation.options import DistillOptions

HELP = "train a small student from a trained teacher, the student averaged"
DESCRIPTION = (
    "Trains as fastema train does, with an EMA, towards the masks and a teacher's output for the same images. "
    "The teacher is frozen, is never averaged, and is in no checkpoint."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the teacher's flags and those of `fastema train`."""
    train.add_flags(parser, DistillOptions)


def run(arguments: argparse.Namespace) -> None:
    """Run a distillation."""
    with process_group() as processes:
        options = train.runnable_options(arguments, DistillOptions)
        from fastema.segmentation.train.run import run_distillation

        run_distillation(options, processes)

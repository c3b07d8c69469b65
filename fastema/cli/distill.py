"""`fastema distill`: `fastema train` for a student that also learns from a teacher; the student is averaged."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastema.cli.train import Given, add_train_arguments, run_training, runnable_options
from fastema.segmentation.distributed.process_group import Processes, joined
from fastema.segmentation.errors import UserError
from fastema.segmentation.options import TrainOptions

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from fastema.segmentation.data.listing import Pair
    from fastema.segmentation.train.distillation import Distillation
    from fastema.segmentation.train.objective import MakeObjective, Objective
    from fastema.segmentation.train.precision import Precision


@dataclass(frozen=True)
class DistillOptions(TrainOptions):
    """The options of `fastema distill`: those of a training of the student, and the teacher."""

    use_ema: bool = True
    teacher_checkpoint: Path = field(kw_only=True)
    teacher_backbone: str | None = None
    distill_weight: float = 0.5
    temperature: float = 2.0

    def check(self) -> None:
        """Raises `UserError` for a value that cannot be meant, or two that do not go together."""
        super().check()
        if not 0 <= self.distill_weight <= 1:
            raise UserError(f"--distill-weight must be in [0, 1], got {self.distill_weight}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"--temperature must be a number above 0, got {self.temperature}")
        own = self.checkpoint_dir.resolve()
        if self.teacher_checkpoint.resolve().parent in (own, own / "previous"):
            raise UserError(
                f"--teacher-checkpoint {self.teacher_checkpoint} is in --checkpoint-dir {self.checkpoint_dir}, where "
                "this run puts the student's files in place of the teacher's: give another --checkpoint-dir"
            )


def add_distill_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags: the teacher's, and those of `fastema train`."""
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
        action=Given,
        nargs=0,
        const=False,
        help="train the student without an average; with one (--use-ema) is the default here",
    )
    add_train_arguments(parser)
    parser.set_defaults(
        use_ema=DistillOptions.use_ema,
        distill_weight=DistillOptions.distill_weight,
        temperature=DistillOptions.temperature,
    )


def run_distill(arguments: argparse.Namespace) -> None:
    """Runs a distillation.

    Raises:
        UserError: whatever the user can put right.
    """
    with joined() as processes:
        _run(runnable_options(arguments, DistillOptions), processes)


def _run(options: DistillOptions, processes: Processes) -> None:
    # Here, not above: `fastema --help` should not wait for torch and timm.
    from fastema.checkpoint import CheckpointError
    from fastema.segmentation.train.distillation import Distillation, load_teacher

    try:
        # Before the images are read, which may take minutes.
        teacher = load_teacher(options.teacher_checkpoint, options.teacher_backbone)
    except CheckpointError as error:
        raise UserError(f"--teacher-checkpoint: {error}") from error
    distillation = Distillation(teacher, options.distill_weight, options.temperature)
    trainer = run_training(
        options, processes, lambda validation, console: _objective(distillation, options, validation, console)
    )
    _say(trainer.console, f"Teacher: {distillation.cost(trainer.costs.step)}")


def _objective(
    distillation: Distillation, options: DistillOptions, validation: Sequence[Pair], console: Console
) -> MakeObjective:
    """The distillation's, which begins by saying how good the teacher is: what the student is after."""
    from fastema.segmentation.train.distillation import mean_iou

    teacher = distillation.teacher

    def make_objective(net: nn.Module, precision: Precision) -> Objective:
        objective = distillation.make_objective(net, precision)
        score = mean_iou(teacher, validation, options.img_size, options.num_workers, precision.device)
        _say(console, f"Teacher: IoU {score:.4f} ({teacher.origin})")
        if teacher.img_size != options.img_size:
            _say(console, f"Teacher: shown the images of {options.img_size} pixels resized to its {teacher.img_size}")
        if teacher.val_fraction is not None and teacher.val_fraction < options.val_fraction:
            _say(
                console,
                f"Teacher: it held out {teacher.val_fraction:.0%} of its images, this run {options.val_fraction:.0%}: "
                "if they are the same images, it was trained on some that are validated on here, and so is better on "
                "them than on new ones",
            )
        return objective

    return make_objective


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)

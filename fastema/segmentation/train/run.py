"""Run a training from its options: read the data, train to the last epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fastema.checkpoint import CheckpointError
from fastema.core.checks import counted
from fastema.errors import UserError
from fastema.segmentation.asked import parse_asked
from fastema.segmentation.console import progress, say
from fastema.segmentation.data import synthetic
from fastema.segmentation.data.images import verify_pairs
from fastema.segmentation.data.listing import Pair, hold_out, list_pairs
from fastema.segmentation.devices import explain_out_of_memory
from fastema.segmentation.distributed.process_group import Processes
from fastema.segmentation.options import SYNTHETIC, DistillOptions, TrainOptions
from fastema.segmentation.report.summary import FEW_IMAGES
from fastema.segmentation.train.checkpoints import LAST, ensure_writable, move_previous_run, read_resumable
from fastema.segmentation.train.distillation import Distillation, load_teacher
from fastema.segmentation.train.losses import supervised
from fastema.segmentation.train.signals import sigterm_raises
from fastema.segmentation.train.trainer import Trainer


def run_training(options: TrainOptions, processes: Processes, distillation: Distillation | None = None) -> Trainer:
    """Read the data and train to the last epoch, from a teacher or without one."""
    console = Console(quiet=not processes.is_first)
    with sigterm_raises():
        processes.check(options)
        if processes.is_first:
            ensure_writable(options.checkpoint_dir)
        training, validation = processes.from_first(lambda: _read_data(options, console))
        stage = 1 if options.first_stage_epochs else 2
        with explain_out_of_memory(options, stage, processes.device(options.device), "before the first step"):
            make_objective = supervised if distillation is None else distillation.make_objective
            trainer = Trainer(options, training, validation, console, make_objective, processes)
            if distillation is not None:
                distillation.announce(options, validation, trainer.device, console)
        if processes.is_first and (previous := move_previous_run(options.checkpoint_dir, keep=options.resume_from)):
            say(console, f"The files of the run that was here before are in {previous} now")
        try:
            trainer.fit()
        except KeyboardInterrupt as interrupt:
            last = options.checkpoint_dir / LAST
            if last.exists():
                raise type(interrupt)(f"go on with --resume-from {last}") from None
            if options.resume_from is not None:
                raise type(interrupt)(f"no epoch was finished; start again from {options.resume_from}") from None
            say(console, "No epoch was finished, so there is nothing to go on from")
            raise type(interrupt) from None
        return trainer


def run_distillation(options: DistillOptions, processes: Processes) -> Trainer:
    """Train a student from a teacher."""
    try:
        # Before the images are read, which may take minutes.
        teacher = load_teacher(options.teacher_checkpoint, options.teacher_backbone)
    except CheckpointError as error:
        raise UserError(f"--teacher-checkpoint: {error}") from error
    distillation = Distillation(teacher, options.distill_weight, options.temperature)
    trainer = run_training(options, processes, distillation)
    say(trainer.console, f"Teacher: {distillation.cost(trainer.timers.step)}")
    return trainer


def _held_out_before(options: TrainOptions) -> Sequence[str] | None:
    """Return the names of what the run to go on with has held out, so that nothing moves when images are added."""
    if options.resume_from is None:
        return None
    checkpoint = read_resumable(options.resume_from, options)
    same = checkpoint["options"].get("val_fraction") == options.val_fraction
    return checkpoint.get("held_out") if same else None


def _read_data(options: TrainOptions, console: Console) -> tuple[Sequence[Pair], Sequence[Pair]]:
    root = None if options.dataset_path is None else Path(options.dataset_path)
    if options.dataset_path == SYNTHETIC:
        say(console, f"Data: camouflage, generated once and kept in {options.checkpoint_dir}")
        root = synthetic.ensure_dataset(options.checkpoint_dir, options.seed)
    listing = list_pairs(root, "Train", options.cam_only, options.images, options.masks)
    with progress(console, "Reading every file", len(listing.pairs)) as advance:
        pairs = verify_pairs(listing, advance, asked=parse_asked(options.foreground, options.ignore_index))
    training, validation = hold_out(pairs, options.val_fraction, _held_out_before(options))
    counts = f"{counted(len(training), 'image')} to train on, {len(validation)} held out to validate on"
    if len(validation) < FEW_IMAGES:
        counts += " (too few to tell weights apart: a larger --val-fraction, or more images, would)"
    say(
        console,
        "\n      ".join(
            [f"Data: {root or options.images}, every file read; {counts}", *listing.notes(), *listing.warnings()]
        ),
    )
    return training, validation

"""`fastema train`: the flags, and the way from them to a run."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from fastema.segmentation.errors import UserError
from fastema.segmentation.extras import require_train_extra
from fastema.segmentation.options import TrainOptions

SYNTHETIC = "synthetic"

_DEFAULTS = {field.name: field.default for field in fields(TrainOptions)}


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags; their defaults are `TrainOptions`'."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset-path",
        required=True,
        metavar="DIR",
        help=f"folder with Train/Image and Train/GT_Object (COD10K-v3), Imgs and GT, or Image and Mask; "
        f"or '{SYNTHETIC}': a camouflage data set, generated on the spot",
    )
    data.add_argument("--checkpoint-dir", required=True, type=Path, metavar="DIR", help="where everything is written")
    data.add_argument("--resume-from", type=Path, metavar="FILE", help="go on from a checkpoint of fastema train")
    data.add_argument("--val-fraction", type=float, metavar="F", help="share of Train held out to validate on")
    data.add_argument("--num-workers", type=int, metavar="N", help="processes that read images beside the training")

    model = parser.add_argument_group("model")
    model.add_argument("--backbone", metavar="NAME", help="any timm model with a feature pyramid")
    model.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="start from random weights")
    model.add_argument("--img-size", type=int, metavar="PX", help="images are trained on as squares of this size")
    model.add_argument("--device", metavar="DEV", help="auto, cpu, cuda, cuda:1, …")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, metavar="N", help="in all, those before a resume included")
    training.add_argument("--batch-size", type=int, metavar="N", help="images a batch")
    training.add_argument("--accumulation-steps", type=int, metavar="N", help="batches an optimizer step")
    training.add_argument("--lr", type=float, metavar="LR", help="highest learning rate")
    training.add_argument("--min-lr", type=float, metavar="LR", help="learning rate of the last step (cosine)")
    training.add_argument("--warmup-epochs", type=int, metavar="N", help="epochs of linear warm-up")
    training.add_argument("--weight-decay", type=float, metavar="W", help="AdamW's, on weights only")
    training.add_argument("--clip-grad", type=float, metavar="NORM", help="gradient norm limit; 0: none")
    training.add_argument("--seed", type=int, metavar="N", help="of weights, order, augmentation and synthetic data")

    ema = parser.add_argument_group("exponential moving average")
    ema.add_argument("--use-ema", action="store_true", help="average the weights; validate base and EMA every epoch")
    ema.add_argument("--ema-decay", type=float, metavar="D", help="the EMA looks back over 1 / (1 - D) steps")
    ema.add_argument("--ema-decay-type", metavar="TYPE", help="constant, threshold, exp, warmup, linear")
    ema.add_argument("--ema-start", metavar="WHEN", help="now, or auto: when the IoU so far says that it pays")

    parser.set_defaults(**{name: value for name, value in _DEFAULTS.items() if name not in _REQUIRED})
    for group in parser._action_groups:
        for action in group._group_actions:
            shown = _DEFAULTS.get(action.dest)
            if action.help and not isinstance(shown, bool | None) and action.dest not in _REQUIRED:
                action.help += f" (default: {shown})"


_REQUIRED = ("dataset_path", "checkpoint_dir")


def run_train(arguments: argparse.Namespace) -> None:
    """Runs a training.

    Raises:
        UserError: whatever the user can put right.
    """
    options = TrainOptions(**{name: getattr(arguments, name) for name in _DEFAULTS})
    options.check()
    require_train_extra()

    # Here, not above: `fastema --help` should not wait for torch and timm.
    from rich.console import Console

    from fastema.checkpoint import CheckpointError
    from fastema.schedules import EMA_DECAY_FUNCTIONS
    from fastema.segmentation.layout import list_pairs
    from fastema.segmentation.run_folder import set_aside
    from fastema.segmentation.split import hold_out
    from fastema.segmentation.synthetic import ensure_dataset
    from fastema.segmentation.trainer import Trainer
    from fastema.segmentation.verification import verified_pairs

    if options.ema_decay_type not in EMA_DECAY_FUNCTIONS:
        known = ", ".join(sorted(EMA_DECAY_FUNCTIONS))
        raise UserError(f"--ema-decay-type must be one of {known}, got {options.ema_decay_type}")
    console = Console()
    try:
        options.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        if options.dataset_path == SYNTHETIC:
            console.print(f"Data: camouflage, generated once and kept in {options.checkpoint_dir}", highlight=False)
            root = ensure_dataset(options.checkpoint_dir, options.seed)
        else:
            root = Path(options.dataset_path)
        training, validation = hold_out(verified_pairs(list_pairs(root)), options.val_fraction)
        console.print(
            f"Data: {root}, every file read; {len(training)} images to train on, {len(validation)} held out to "
            "validate on",
            highlight=False,
            soft_wrap=True,
        )
        trainer = Trainer(options, training, validation, console)
        previous = set_aside(options.checkpoint_dir, keep=options.resume_from)
        if previous is not None:
            console.print(f"The files of the run that was here before are in {previous} now", soft_wrap=True)
        try:
            trainer.fit()
        except KeyboardInterrupt:
            last = options.checkpoint_dir / "last.pth"
            raise KeyboardInterrupt(*([f"go on with --resume-from {last}"] if last.exists() else [])) from None
    except (CheckpointError, OSError) as error:
        raise UserError(str(error)) from error

"""`fastema evaluate`: every metric of a checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from fastema.segmentation.options import HELD_OUT, SYNTHETIC, EvaluateOptions
from fastema.segmentation.train_extra import require_train_extra

HELP = "every metric of a checkpoint, trained and averaged weights side by side"
DESCRIPTION = "Evaluates a checkpoint of fastema train: IoU, Dice, S-measure, weighted F, mean E and MAE."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of fastema train")
    parser.add_argument("--dataset-path", metavar="DIR", help=f"as for fastema train, '{SYNTHETIC}' included")
    parser.add_argument("--images", type=Path, metavar="DIR", help="in place of --dataset-path: folder of the images")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="and folder of their masks")
    parser.add_argument(
        "--split",
        default="Test",
        choices=("Test", "Train", HELD_OUT),
        help=f"which folder; {HELD_OUT}: the part of Train that the run held out (default: Test)",
    )
    parser.add_argument(
        "--no-cam-only", dest="cam_only", action="store_false", help="also COD10K's images without a camouflaged object"
    )
    parser.add_argument(
        "--foreground", metavar="V,V,…", help="as for fastema train (default: as trained, if the masks are alike)"
    )
    parser.add_argument(
        "--ignore-index", metavar="V,V,…", help="as for fastema train (default: as trained, if the masks are alike)"
    )
    parser.add_argument(
        "--img-size", type=int, metavar="PX", help="images are resized to squares of this size (default: as trained)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images a batch (default: 8)")
    parser.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)"
    )
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write means and every image's values there")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print a table and write JSON."""
    options = EvaluateOptions(**{field.name: getattr(arguments, field.name) for field in fields(EvaluateOptions)})
    options.check()
    require_train_extra()
    from fastema.segmentation.eval.compare import evaluate_checkpoint

    evaluate_checkpoint(options)

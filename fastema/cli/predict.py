"""`fastema predict`: write the masks of images."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastema.errors import UserError
from fastema.segmentation.train_extra import require_train_extra

HELP = "write the masks of images"
DESCRIPTION = "Writes a PNG for every image, at its size: grey levels are the probability of foreground."

_WEIGHTS = {"ema": "ema_net", "net": "net"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of fastema train")
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them (not what is below)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the masks go, as NAME.png")
    parser.add_argument(
        "--weights", choices=tuple(_WEIGHTS), help="averaged or trained ones (default: averaged, if there are any)"
    )
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="write 255 from this probability up and 0 below, in place of grey"
    )
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda, cuda:1, … (default: auto)")


def run(arguments: argparse.Namespace) -> None:
    """Write a mask for every image that can be read."""
    threshold = arguments.threshold
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"--threshold must be a probability between 0 and 1, got {threshold:g}")
    require_train_extra()
    from fastema.segmentation.eval.write_masks import write_masks

    weights = None if arguments.weights is None else _WEIGHTS[arguments.weights]
    write_masks(arguments.checkpoint, arguments.images, arguments.out, weights, threshold, arguments.device)

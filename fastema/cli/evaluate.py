"""`fastema evaluate`: a checkpoint on data that it has not seen, trained and averaged weights side by side."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastema.cli.train import SYNTHETIC
from fastema.segmentation.errors import UserError
from fastema.segmentation.train_extra import require_train_extra

if TYPE_CHECKING:
    from rich.console import Console

    from fastema.segmentation.data.listing import Listing, Pair
    from fastema.segmentation.eval.scores import Scores
    from fastema.segmentation.model.load import Checkpoint

T = TypeVar("T")

HELD_OUT = "validation"
_SPLITS = ("Test", "Train", HELD_OUT)
_HEADINGS = {
    "iou": "IoU ↑",
    "dice": "Dice ↑",
    "s_measure": "S ↑",
    "weighted_f": "wF ↑",
    "mean_e": "mean E ↑",
    "mae": "MAE ↓",
}
_LABELS = {"net": "base", "ema_net": "EMA"}
_CONVENTIONS = (
    "Means over images, at the masks' own sizes. IoU and Dice: probability above 0.5. S-measure, weighted F (wF), mean "
    "E and MAE: 8-bit maps, stretched to 0…1 image by image, as the toolkits behind published numbers do."
)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of fastema train")
    parser.add_argument(
        "--dataset-path", required=True, metavar="DIR", help=f"as for fastema train, '{SYNTHETIC}' included"
    )
    parser.add_argument(
        "--split",
        default="Test",
        choices=_SPLITS,
        help=f"which folder; {HELD_OUT}: the part of Train that the run held out (default: Test)",
    )
    parser.add_argument(
        "--no-cam-only", dest="cam_only", action="store_false", help="also COD10K's images without a camouflaged object"
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


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Evaluates, prints a table and writes JSON.

    Raises:
        UserError: whatever the user can put right.
    """
    for flag, value, least in (("--batch-size", arguments.batch_size, 1), ("--num-workers", arguments.num_workers, 0)):
        if value < least:
            raise UserError(f"{flag} must be at least {least}, got {value}")
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
        fault = "is a folder" if arguments.json.is_dir() else "cannot be written: its folder does not exist"
        raise UserError(f"--json: {arguments.json} {fault}")
    require_train_extra()
    # Here, not above: `fastema --help` should not wait for torch and timm.
    from rich.console import Console

    from fastema.checkpoint import CheckpointError
    from fastema.segmentation.model.load import read_checkpoint

    console = Console()
    try:
        checkpoint = read_checkpoint(arguments.checkpoint, arguments.img_size)
        listing = _images(arguments, checkpoint, console)
        scores = _evaluate(arguments, checkpoint, listing.pairs, console)
        _print(console, scores)
        if arguments.json is not None:
            text = json.dumps(_record(arguments, checkpoint, listing, scores), indent=1)
            arguments.json.write_text(text + "\n")
            _say(console, f"JSON:  {arguments.json}")
    except (CheckpointError, OSError) as error:
        raise UserError(str(error)) from error


def _images(arguments: argparse.Namespace, checkpoint: Checkpoint, console: Console) -> Listing:
    """What to evaluate on, every file read; says so, and what may be wrong with it."""
    from fastema.segmentation.data.listing import list_pairs
    from fastema.segmentation.data.split import hold_out
    from fastema.segmentation.data.synthetic import ensure_dataset
    from fastema.segmentation.data.verify import verified_pairs

    root = Path(arguments.dataset_path)
    if arguments.dataset_path == SYNTHETIC:
        root = ensure_dataset(checkpoint.path.parent, _trained_with(checkpoint, "seed", int))
    held_out = arguments.split == HELD_OUT
    listing = list_pairs(root, "Train" if held_out else arguments.split, arguments.cam_only)
    if held_out:
        listing.pairs = hold_out(listing.pairs, _trained_with(checkpoint, "val_fraction", float))[1]
    verified_pairs(listing)
    notes = [f"{len(listing.pairs)} images", *listing.notes()]
    _say(console, f"Data:  {listing.folder}{', held out' if held_out else ''}; {', '.join(notes)}")
    if arguments.split == "Test" and listing.folder.resolve() == root.resolve() and root.name.lower() != "test":
        _say(
            console,
            f"Note:  {root} has no Test folder: these are all its images. If the run was trained on them, "
            f"--split {HELD_OUT} takes only those that it held out.",
        )
    return listing


def _trained_with(checkpoint: Checkpoint, name: str, kind: type[T]) -> T:
    value = checkpoint.options.get(name)
    if not isinstance(value, kind):
        raise UserError(f"{checkpoint.path} does not say which images it was trained on: its options have no {name}")
    return value


def _evaluate(
    arguments: argparse.Namespace, checkpoint: Checkpoint, pairs: list[Pair], console: Console
) -> dict[str, list[Scores]]:
    from fastema.segmentation.console import progress
    from fastema.segmentation.data.loaders import ValidationSet, validation_loader
    from fastema.segmentation.eval.scores import score_weights
    from fastema.segmentation.model.load import AVERAGED, BASE, chosen_device, load_both

    device = chosen_device(arguments.device)
    net, ema = load_both(checkpoint, device)
    weights: dict[str, Callable[[], AbstractContextManager[object]]] = {BASE: nullcontext}
    if ema is not None:
        weights[AVERAGED] = ema.swapped
    epoch = "" if checkpoint.epoch is None else f", epoch {checkpoint.epoch}"
    architecture = checkpoint.architecture
    _say(
        console,
        f"Model: {checkpoint.path}{epoch}; {architecture.backbone}, {architecture.num_experts} experts, images of "
        f"{checkpoint.img_size} pixels, on {device}" + ("; no EMA in it" if ema is None else ""),
    )
    loader = validation_loader(ValidationSet(pairs, checkpoint.img_size), arguments.batch_size, arguments.num_workers)
    with progress(console, "Evaluation", len(loader)) as bar:
        try:
            return score_weights(net, weights, loader, device, bar.advance)
        except ValueError as error:
            raise UserError(f"{checkpoint.path} cannot be evaluated: {error}") from error


def _print(console: Console, scores: Mapping[str, list[Scores]]) -> None:
    from rich.table import Table

    from fastema.segmentation.eval.scores import difference, mean_scores

    table = Table("weights")
    for heading in _HEADINGS.values():
        table.add_column(heading, justify="right")
    for name, of_images in scores.items():
        means = mean_scores(of_images)
        table.add_row(_LABELS[name], *(f"{getattr(means, metric):.4f}" for metric in _HEADINGS))
    if len(scores) == 2:
        leads = difference(*scores.values())
        table.add_section()
        table.add_row("EMA - base", *(f"{leads[metric].mean:+.4f}" for metric in _HEADINGS))
        table.add_row("± std. error", *(f"{leads[metric].error:.4f}" for metric in _HEADINGS))
    console.print(table)
    _say(console, _CONVENTIONS)


def _record(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    listing: Listing,
    scores: Mapping[str, list[Scores]],
) -> dict[str, Any]:
    import torch

    import fastema
    from fastema.segmentation.eval.scores import mean_scores

    return {
        "checkpoint": str(checkpoint.path),
        "epoch": checkpoint.epoch,
        "architecture": asdict(checkpoint.architecture),
        "img_size": checkpoint.img_size,
        "dataset": str(listing.folder),
        "split": arguments.split,
        "cam_only": arguments.cam_only,
        "images": len(listing.pairs),
        "all_black_masks": listing.all_black,
        "conventions": _CONVENTIONS,
        "versions": {"fastema": fastema.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "weights": [
            {
                "name": name,
                "means": asdict(mean_scores(of_images)),
                "per_image": [
                    {"image": pair.image.name, **asdict(one)}
                    for pair, one in zip(listing.pairs, of_images, strict=True)
                ],
            }
            for name, of_images in scores.items()
        ],
    }


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)

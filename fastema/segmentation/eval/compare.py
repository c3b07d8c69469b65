"""Evaluate a checkpoint, trained and averaged weights side by side: a table, and JSON with every image's values."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

import fastema
from fastema.core.checks import counted
from fastema.errors import UserError
from fastema.segmentation.asked import parse_asked
from fastema.segmentation.console import progress, say
from fastema.segmentation.data import synthetic
from fastema.segmentation.data.image_files import Whites
from fastema.segmentation.data.images import verify_pairs
from fastema.segmentation.data.listing import Listing, hold_out, list_pairs
from fastema.segmentation.data.loaders import ValidationSet, validation_loader
from fastema.segmentation.devices import select_device
from fastema.segmentation.eval.scores import Scores, difference, mean_scores, score_weights
from fastema.segmentation.model.load import AVERAGED, BASE, Checkpoint, load_both, read_checkpoint
from fastema.segmentation.options import HELD_OUT, SYNTHETIC, EvaluateOptions

_HEADINGS = ("IoU ↑", "Dice ↑", "S ↑", "wF ↑", "mean E ↑", "MAE ↓")  # of the fields of Scores
_LABELS = {BASE: "base", AVERAGED: "EMA"}
_CONVENTIONS = (
    "Means over images, at the masks' own sizes. IoU and Dice: probability above 0.5. S-measure, weighted F (wF), mean "
    "E and MAE: 8-bit maps, stretched to 0…1 image by image, as the toolkits behind published numbers do."
)


def evaluate_checkpoint(options: EvaluateOptions) -> None:
    """Measure the checkpoint on the data, print a table and write the JSON."""
    console = Console()
    checkpoint = read_checkpoint(options.checkpoint, options.img_size)
    listing = _list_images(options, checkpoint, console)
    scores = _score(options, checkpoint, listing, console)
    _print_table(console, scores)
    if options.json is not None:
        options.json.write_text(json.dumps(_record(options, checkpoint, listing, scores), indent=1) + "\n")
        say(console, f"JSON:  {options.json}")


def _list_images(options: EvaluateOptions, checkpoint: Checkpoint, console: Console) -> Listing:
    root = None if options.dataset_path is None else Path(options.dataset_path)
    if options.dataset_path == SYNTHETIC:
        root = synthetic.ensure_dataset(checkpoint.path.parent, _trained_with(checkpoint, "seed"))
    held_out = options.split == HELD_OUT
    listing = list_pairs(root, "Train" if held_out else options.split, options.cam_only, options.images, options.masks)
    if held_out:
        names = checkpoint.content.get("held_out")
        if names and not {pair.stem for pair in listing.pairs}.intersection(names):
            raise UserError(
                f"none of the {counted(len(names), 'image')} that {checkpoint.path} was validated on is in "
                f"{listing.folder}"
            )
        listing.pairs = hold_out(listing.pairs, _trained_with(checkpoint, "val_fraction"), names)[1]
    said = {
        name: getattr(options, name) if getattr(options, name) is not None else checkpoint.options.get(name)
        for name in ("foreground", "ignore_index")
    }
    asked, whites = parse_asked(said["foreground"], said["ignore_index"]), checkpoint.content.get("whites", ())
    verify_pairs(listing, whites=Whites(*whites), asked=asked, ignored=checkpoint.content.get("ignored"))
    notes = [counted(len(listing.pairs), "image"), *listing.notes()]
    say(
        console,
        f"Data:  {listing.folder}{', held out' if held_out else ''}; {', '.join([*notes, *listing.warnings()])}",
    )
    if options.split == "Test" and root is not None and not listing.has_split and root.name.lower() != "test":
        say(
            console,
            f"Note:  {root} has no Test folder: these are all its images. If the run was trained on them, "
            f"--split {HELD_OUT} takes only those that it held out.",
        )
    return listing


def _trained_with(checkpoint: Checkpoint, name: str) -> Any:
    value = checkpoint.options.get(name)
    if value is None:
        raise UserError(f"{checkpoint.path} does not say which images it was trained on: its options have no {name}")
    return value


def _score(
    options: EvaluateOptions, checkpoint: Checkpoint, listing: Listing, console: Console
) -> dict[str, list[Scores]]:
    device = select_device(options.device)
    net, ema = load_both(checkpoint, device)
    weights: dict[str, Callable[[], AbstractContextManager[object]]] = {BASE: nullcontext}
    if ema is not None:
        weights[AVERAGED] = ema.swapped
    epoch = "" if checkpoint.epoch is None else f", epoch {checkpoint.epoch}"
    architecture = checkpoint.architecture
    say(
        console,
        f"Model: {checkpoint.path}{epoch}; {architecture.backbone}, {architecture.num_experts} experts, images of "
        f"{checkpoint.img_size} pixels, on {device}" + ("; no EMA in it" if ema is None else ""),
    )
    if (name := checkpoint.content.get("ema_name")) and len(names := checkpoint.options.get("ema_decays") or ()) > 1:
        say(console, f"       its EMA here is {name}, of decays {', '.join(f'{each:g}' for each in names)}")
    dataset = ValidationSet(listing.pairs, checkpoint.img_size)
    loader = validation_loader(dataset, options.batch_size, options.num_workers)
    with progress(console, "Evaluation", len(loader)) as advance:
        try:
            return score_weights(net, weights, loader, device, advance)
        except ValueError as error:
            raise UserError(f"{checkpoint.path} cannot be evaluated: {error}") from error


def _print_table(console: Console, scores: Mapping[str, list[Scores]]) -> None:
    table = Table("weights", *(Column(heading, justify="right") for heading in _HEADINGS))
    for name, each in scores.items():
        table.add_row(_LABELS[name], *(f"{mean:.4f}" for mean in mean_scores(each)))
    if len(scores) == 2:
        leads = difference(*scores.values()).values()
        table.add_section()
        table.add_row("EMA - base", *(f"{lead.mean:+.4f}" for lead in leads))
        table.add_row("± std. error", *(f"{lead.error:.4f}" for lead in leads))
    console.print(table)
    say(console, _CONVENTIONS)


def _record(
    options: EvaluateOptions, checkpoint: Checkpoint, listing: Listing, scores: Mapping[str, list[Scores]]
) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint.path),
        "epoch": checkpoint.epoch,
        "architecture": asdict(checkpoint.architecture),
        "img_size": checkpoint.img_size,
        "dataset": str(listing.folder),
        "split": options.split,
        "cam_only": options.cam_only,
        "images": len(listing.pairs),
        "all_black_masks": listing.all_black,
        "conventions": _CONVENTIONS,
        "versions": {"fastema": fastema.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "weights": [
            {
                "name": name,
                "means": mean_scores(each)._asdict(),
                "per_image": [
                    {"image": pair.image.name, **one._asdict()} for pair, one in zip(listing.pairs, each, strict=True)
                ],
            }
            for name, each in scores.items()
        ],
    }

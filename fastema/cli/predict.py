"""`fastema predict`: images to masks, a PNG each, at the size of the image.

A mask is written as the field's evaluation toolkits read it: 8 bits, the probability in 255ths, not stretched, so that
128 and above is foreground. No file is replaced but an earlier mask of this command.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastema.segmentation.errors import UserError, first_few
from fastema.segmentation.train_extra import require_train_extra

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from fastema.segmentation.model.load import Checkpoint
    from fastema.segmentation.model.network import SegmentationNet

_WEIGHTS = {"ema": "ema_net", "net": "net"}
_SIGNATURE = "fastema predict"  # in a mask's "Software" field


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
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


def run_predict(arguments: argparse.Namespace) -> None:
    """Writes a mask for every image that can be read.

    Raises:
        UserError: whatever the user can put right; also at the end, if there were images without a mask.
    """
    threshold = arguments.threshold
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"--threshold must be a probability between 0 and 1, got {threshold:g}")
    require_train_extra()
    # Here, not above: `fastema --help` should not wait for torch and timm.
    from rich.console import Console

    from fastema.checkpoint import CheckpointError
    from fastema.segmentation.model.load import read_checkpoint

    console = Console()
    try:
        targets = _targets(_files(arguments.images), arguments.out)
        checkpoint = read_checkpoint(arguments.checkpoint)
        if arguments.out.exists() and not arguments.out.is_dir():
            raise UserError(f"--out {arguments.out} is a file, not a folder")
        arguments.out.mkdir(parents=True, exist_ok=True)
        problems = _predict(arguments, checkpoint, targets, console)
    except (CheckpointError, OSError) as error:
        raise UserError(str(error)) from error
    _say(console, f"{len(targets) - len(problems)} of {len(targets)} masks written to {arguments.out}")
    if problems:
        raise UserError(f"no mask for {len(problems)} of {len(targets)} images: {first_few(problems, 10)}")


def _files(given: Sequence[Path]) -> list[Path]:
    """Files as they were given, folders as the images in them; each once. What does not exist is found when read."""
    from fastema.segmentation.data.listing import IMAGE_SUFFIXES

    files: dict[Path, None] = {}
    for path in given:
        if not path.is_dir():
            files[path] = None
            continue
        inside = sorted(
            file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        )
        if not inside:
            raise UserError(f"no images in {path}: expected files like a.jpg")
        files.update(dict.fromkeys(inside))
    return list(files)


def _targets(files: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Image → where its mask goes: `a.jpg` → `a.png`, a second image of that stem → `a-2.png`."""
    own = {file.stem.lower() for file in files}  # lower: some file systems do not tell A from a
    taken: set[str] = set()
    targets = {}
    for file in files:
        name, number = file.stem, 1
        while name.lower() in taken or (number > 1 and name.lower() in own):
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(name.lower())
        targets[file] = out / f"{name}.png"
    return targets


def _predict(
    arguments: argparse.Namespace, checkpoint: Checkpoint, targets: Mapping[Path, Path], console: Console
) -> list[str]:
    """Writes the masks; returns which images have none, and why."""
    from fastema.segmentation.console import progress
    from fastema.segmentation.model.load import chosen_device, load_net

    weights = _WEIGHTS[arguments.weights] if arguments.weights else checkpoint.weights[-1]
    device = chosen_device(arguments.device)
    net = load_net(checkpoint, device, weights)
    _say(console, f"Model: {checkpoint.path}, {weights}; {checkpoint.architecture.backbone}, on {device}")
    inputs = {file.resolve() for file in targets}
    problems = []
    with progress(console, "Masks", len(targets)) as bar:
        for image, target in targets.items():
            problem = _why_kept(target, inputs) or _write_mask(arguments, checkpoint, net, device, image, target)
            if problem:
                problems.append(f"{image} ({problem})")
            elif target.stem != image.stem:
                _say(console, f"Note:  {image} is not the only {image.stem}: its mask is {target.name}")
            bar.advance()
    return problems


def _why_kept(target: Path, inputs: set[Path]) -> str | None:
    """Why a file that is where a mask should go must not be replaced; None if there is none, or it may be."""
    from PIL import Image

    if not os.path.lexists(target):
        return None
    if target.resolve() in inputs:
        return f"its mask would replace the input {target}"
    try:
        with Image.open(target) as there:
            if there.info.get("Software") == _SIGNATURE:
                return None
    except Exception:  # whatever it is, it is no mask of ours
        pass
    return f"{target} is there already, and no mask of fastema predict"


def _write_mask(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    net: SegmentationNet,
    device: torch.device,
    image: Path,
    target: Path,
) -> str | None:
    """Returns why there is no mask, or None if there is one."""
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from fastema.segmentation.data.images import read_image, reason
    from fastema.segmentation.eval.evaluation import resized_logits
    from fastema.segmentation.eval.metrics import to_levels
    from fastema.segmentation.model.load import network_input

    try:
        pixels = read_image(image)
    except Exception as error:  # Pillow raises whatever the damage leads to
        return reason(error)
    images = network_input(pixels, checkpoint.img_size).to(device)
    probability = resized_logits(net, images, [pixels.shape[:2]])[0].sigmoid().numpy()
    if np.isnan(probability).any():
        return "the network's output has NaN in it"
    if arguments.threshold is None:
        levels = to_levels(probability)
    else:
        levels = np.where(probability >= arguments.threshold, np.uint8(255), np.uint8(0))
    signature = PngInfo()
    signature.add_text("Software", _SIGNATURE)
    # Under another name first: an interrupt leaves no half a mask, and a link is replaced, not written through.
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        Image.fromarray(levels).save(partial, format="PNG", pnginfo=signature)
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return None


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)

"""Write the masks of images as PNG files, at the size that viewers show the image in.

8 bits, the probability in 255ths, not stretched: 128 and above is foreground, as the field's evaluation toolkits read
it. Only masks that this command wrote are replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from fastema.core.checks import first_few
from fastema.errors import UserError
from fastema.segmentation.console import progress, say
from fastema.segmentation.data.image_files import Whites, reason
from fastema.segmentation.data.images import read_image
from fastema.segmentation.data.listing import image_files
from fastema.segmentation.data.loaders import network_input
from fastema.segmentation.devices import select_device
from fastema.segmentation.eval.metrics import to_levels
from fastema.segmentation.eval.scores import resized_logits
from fastema.segmentation.model.load import load_net, read_checkpoint

_SIGNATURE = "fastema predict"  # in a mask's "Software" field


def write_masks(
    path: Path, images: Sequence[Path], out: Path, weights: str | None, threshold: float | None, device_name: str
) -> None:
    """Write a mask for every image that can be read.

    Args:
        path: the checkpoint.
        images: files, and folders of them.
        out: folder for `NAME.png`; made if it does not exist.
        weights: `net` or `ema_net`; None: the averaged ones if there are any.
        threshold: write 255 from this probability up and 0 below; None: grey levels.
        device_name: of `--device`.
    """
    console = Console()
    targets = _targets(_files(images), out)
    checkpoint = read_checkpoint(path)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder")
    out.mkdir(parents=True, exist_ok=True)
    whites = Whites(*checkpoint.content.get("whites", ()))
    weights = weights or checkpoint.weights[-1]
    device = select_device(device_name)
    net = load_net(checkpoint, device, weights)
    say(console, f"Model: {path}, {weights}; {checkpoint.architecture.backbone}, on {device}")

    def mask_of(pixels: np.ndarray) -> np.ndarray:
        images = network_input(pixels, checkpoint.img_size)[None].to(device)
        probability = resized_logits(net, images, [pixels.shape[:2]])[0].sigmoid().numpy()
        if np.isnan(probability).any():
            raise UserError("the network's output has NaN in it")
        return to_levels(probability if threshold is None else probability >= threshold)

    inputs = {file.resolve() for file in targets}
    problems = []
    with progress(console, "Masks", len(targets)) as advance:
        for image, target in targets.items():
            problem = _why_not_replaced(target, inputs) or _write_mask(mask_of, whites, image, target)
            if problem:
                problems.append(f"{image} ({problem})")
            elif target.stem != image.stem:
                say(console, f"Note:  {image} is not the only {image.stem}: its mask is {target.name}")
            advance()
    say(console, f"{len(targets) - len(problems)} of {len(targets)} masks written to {out}")
    if problems:
        raise UserError(f"no mask for {len(problems)} of {len(targets)} images: {first_few(problems, 10)}")


def _files(given: Sequence[Path]) -> list[Path]:
    """Replace folders by the images in them, and drop repeated files."""
    files: dict[Path, None] = {}
    for path in given:
        inside = image_files(path) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"no images in {path}: expected files like a.jpg")
        files.update(dict.fromkeys(inside))
    return list(files)


def _targets(files: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Map each image to its mask's path: `a.jpg` to `a.png`, a second image of that stem to `a-2.png`."""
    stems = {file.stem.lower() for file in files}  # lower: some file systems ignore case
    taken: set[str] = set()
    targets = {}
    for file in files:
        name, number = file.stem, 1
        while name.lower() in taken or (number > 1 and name.lower() in stems):
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(name.lower())
        targets[file] = out / f"{name}.png"
    return targets


def _why_not_replaced(target: Path, inputs: set[Path]) -> str | None:
    if not os.path.lexists(target):
        return None
    if target.resolve() in inputs:
        return f"its mask would replace the input {target}"
    try:
        with Image.open(target) as existing:
            if existing.info.get("Software") == _SIGNATURE:
                return None
    except Exception:  # not an image, so not a mask of ours
        pass
    return f"{target} is there already, and no mask of fastema predict"


def _write_mask(mask_of: Callable[[np.ndarray], np.ndarray], whites: Whites, image: Path, target: Path) -> str | None:
    """Return why there is no mask, or None."""
    try:
        pixels = read_image(image, whites)
    except Exception as error:  # Pillow raises anything on a damaged file
        return reason(error)
    try:
        mask = mask_of(pixels)
    except UserError as error:
        return str(error)
    signature = PngInfo()
    signature.add_text("Software", _SIGNATURE)
    # Renamed when complete: an interrupt leaves no half a mask, and a link is replaced, not written through.
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        Image.fromarray(mask).save(partial, format="PNG", pnginfo=signature)
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return None

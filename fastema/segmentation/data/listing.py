"""Find the image and mask files of a data set, pair them, and hold some out for validation.

COD10K-v3 is the model, `{Train,Test}/{Image,GT_Object}` with `a.jpg` and `a.png`; the other common names, and folders
without the Train and Test level, are read too. Nothing in a Test folder is ever trained on.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastema.core.text import counted, first_few
from fastema.segmentation.data.files import OWN_WHITES, Whites
from fastema.segmentation.data.masks import MaskRule
from fastema.segmentation.errors import UserError

# (images, masks), in the order in which they are looked for.
LAYOUTS = (("Image", "GT_Object"), ("Imgs", "GT"), ("Image", "Mask"))

# COD10K's images without a camouflaged animal: 2,960 of its 6,000 training images, with all-black masks.
NON_CAM = "cod10k-noncam-"

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Pair:
    """One image and its mask."""

    image: Path
    mask: Path
    whites: Whites = OWN_WHITES  # of its set; `verify_pairs` sets this
    rule: MaskRule | None = None  # and this

    @property
    def stem(self) -> str:
        return self.image.stem


@dataclass
class Listing:
    """The files of one split of a data set; `verify_pairs` sets what comes after `left_out`."""

    folder: Path  # the parent of the images' and the masks' folder
    pairs: list[Pair] = field(default_factory=list)  # sorted by stem
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # descriptions by kind
    left_out: int = 0  # COD10K-NonCAM images
    all_black: int = 0  # empty masks; those images stay in
    all_white: int = 0  # masks without background; those images stay in
    all_ignored: list[str] = field(default_factory=list)  # masks with nothing to learn from; these are left out
    masks: list[str] = field(default_factory=list)  # how they are read, if not as black and white
    repeated: list[str] = field(default_factory=list)  # images of the same bytes, as `a.jpg = b.jpg`

    def notes(self) -> list[str]:
        """Return remarks on what is unusual but no problem."""
        notes = []
        if self.left_out:
            notes.append(f"{counted(self.left_out, 'COD10K-NonCAM image')} left out")
        if self.all_black:
            notes.append(f"{counted(self.all_black, 'all-black mask')} (IoU 1 for an empty prediction, else 0)")
        if self.all_white:
            notes.append(counted(self.all_white, "all-white mask"))
        if self.all_ignored:
            masks = counted(len(self.all_ignored), "mask")
            notes.append(f"{masks} of nothing but ignored pixels left out: {first_few(self.all_ignored)}")
        if self.repeated:
            verb = "is" if len(self.repeated) == 1 else "are"
            images = counted(len(self.repeated), "image")
            notes.append(f"{images} {verb} there under several names: {first_few(self.repeated)}")
        return [*self.masks, *notes]

    def warnings(self) -> list[str]:
        """Return what makes a training or a measurement pointless, after `verify_pairs`."""
        for count, colour, missing in (
            (self.all_black, "black", "foreground"),
            (self.all_white, "white", "background"),
        ):
            if count == len(self.pairs) > 0:
                return [f"WARNING: every mask is all {colour}: there is no {missing} to learn. Are these the masks?"]
        return []


def list_pairs(root: Path, split: str = "Train", cam_only: bool = True) -> Listing:
    """Pair the images and masks of one split by stem.

    A root without folders Train and Test is one set, which is read for either split. `cam_only` leaves out
    `COD10K-NonCAM-*`, as the papers on COD10K do.
    """
    images, masks = _find_folders(root, split)
    (own_images, left_out), (own_masks, _) = _by_stem(images, cam_only), _by_stem(masks, cam_only)
    if left_out and not own_images:
        raise UserError(f"all {left_out} images in {images} are COD10K-NonCAM, which --cam-only leaves out")
    if not own_images:
        raise UserError(f"no images in {images}: expected files like a.jpg there and a.png in {masks}")
    listing = Listing(images.parent, left_out=left_out)
    for stem in sorted(own_images.keys() | own_masks.keys()):
        image, mask = own_images.get(stem, []), own_masks.get(stem, [])
        if not image:
            listing.problems["mask without an image"].append(f"{mask[0].name} (no {images.name}/{stem}.jpg)")
        elif len(image) > 1 or len(mask) > 1:
            names = [file.name for file in image + mask]
            listing.problems["stem with several images or masks"].append(first_few(names))
        elif not mask:
            listing.problems["image without a mask"].append(f"{image[0].name} (no {masks.name}/{stem}.png)")
        else:
            listing.pairs.append(Pair(image[0], mask[0]))
    return listing


def hold_out(pairs: Sequence[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into (training, validation), with about `fraction` and at least one in the second.

    By a hash of the stem, so the split is the same on every machine and does not change when images are added.
    """
    if len(pairs) < 2:
        raise UserError(f"{len(pairs)} image(s) are not enough: one to train on and one to validate on are the least")
    ordered = sorted(pairs, key=_hash)
    count = min(max(sum(_hash(pair) < fraction for pair in pairs), 1), len(pairs) - 1)
    validation = set(ordered[:count])
    return [pair for pair in pairs if pair not in validation], [pair for pair in pairs if pair in validation]


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder, sorted; no hidden ones, nothing from folders in it."""
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in _SUFFIXES and file.name[0] != "."]


def _hash(pair: Pair) -> float:
    """Map a stem to [0, 1)."""
    return int.from_bytes(hashlib.sha256(pair.stem.encode()).digest()[:8], "big") / 2**64


def _find_folders(root: Path, split: str) -> tuple[Path, Path]:
    if not root.is_dir():
        raise UserError(f"there is no data set at {root}: it is {'a file' if root.exists() else 'missing'}")
    name, children = split.lower(), _subfolders(root)
    if name == "train" and name not in children:
        parent = root.resolve().parent
        if root.resolve().name.lower() == "test" and "train" in _subfolders(parent):
            raise UserError(f"{root} is a test set, for fastema evaluate only; to train, give {parent}")
    where = children.get(name, root)
    inside = _subfolders(where)
    for images, masks in LAYOUTS:
        if images.lower() in inside and masks.lower() in inside:
            return inside[images.lower()], inside[masks.lower()]
    if name == "test" and "train" in children and where is root:
        raise UserError(
            f"{root} has no Test folder, and what is in Train was trained on; to evaluate on that all the same, give "
            f"{children['train']}"
        )
    expected = " or ".join(f"{split}/{images} + {split}/{masks}" for images, masks in LAYOUTS)
    found = first_few(sorted(f"{folder.name}/" for folder in inside.values()), 6) or "no folders"
    raise UserError(f"{root} is not a data set that is understood: expected {expected}; {where} has {found}")


def _subfolders(folder: Path) -> dict[str, Path]:
    # By lower-case name: both `image` and `Image` are common.
    return {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}


def _by_stem(folder: Path, cam_only: bool) -> tuple[dict[str, list[Path]], int]:
    """Return a folder's image files by stem, and how many of COD10K-NonCAM were left out."""
    files: dict[str, list[Path]] = defaultdict(list)
    left_out = 0
    for file in image_files(folder):
        if cam_only and file.name.lower().startswith(NON_CAM):
            left_out += 1
        else:
            files[file.stem].append(file)
    return files, left_out

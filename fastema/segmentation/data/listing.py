"""Where a data set keeps its images and masks, and which belong together.

COD10K-v3 is the model, `{Train,Test}/{Image,GT_Object}` with `a.jpg` and `a.png` of the same stem; the other common
names, and folders without the Train and Test level, are understood too. Nothing in a Test folder is ever trained on.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from fastema.segmentation.errors import UserError, first_few

# (images, masks), in the order in which they are looked for.
LAYOUTS = (("Image", "GT_Object"), ("Imgs", "GT"), ("Image", "Mask"))

# COD10K's images without a camouflaged animal: 2,960 of its 6,000 training images, with all-black masks.
NON_CAM = "cod10k-noncam-"

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Pair:
    """One image and its mask."""

    image: Path
    mask: Path

    @property
    def stem(self) -> str:
        return self.image.stem


@dataclass
class Listing:
    """What was found in the two folders.

    Attributes:
        folder: what the two folders are in.
        pairs: sorted by stem.
        problems: in words, by kind.
        left_out: how many COD10K-NonCAM images are not among the pairs.
        all_black: how many of the masks are empty. Those images are kept: the network learns, and is asked, to find
            nothing there; their IoU is 1 for an empty prediction and 0 for any other. Known after `verified_pairs`.
        repeated: images of the same bytes under several names, as `a.jpg = b.jpg`. Known after `verified_pairs`.
    """

    folder: Path
    pairs: list[Pair] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    left_out: int = 0
    all_black: int = 0
    repeated: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What is no problem and still worth knowing, a sentence each without its full stop."""
        notes = []
        if self.left_out:
            notes.append(f"{self.left_out} COD10K-NonCAM images left out")
        if self.all_black:
            notes.append(f"{self.all_black} all-black masks (IoU 1 for an empty prediction, else 0)")
        if self.repeated:
            notes.append(f"{len(self.repeated)} images are there under several names: {first_few(self.repeated)}")
        return notes


def list_pairs(root: Path, split: str = "Train", cam_only: bool = True) -> Listing:
    """Pairs the images and masks of one split of a data set by stem, sorted by stem.

    A root with folders Train and Test is read in the one that `split` names, never in the other. A root that holds
    images and masks itself, without that level, is one set: all of it is trained on, or all of it evaluated.

    Args:
        root: the data set's folder.
        split: `Train` or `Test`.
        cam_only: leaves out `COD10K-NonCAM-*`, images and masks, as the papers on COD10K do. Other names are untouched.

    Raises:
        UserError: `root` is not a folder, has no such split or none of the known layouts, is a Test folder where
            `split` is Train, or has no image.
    """
    images, masks = _find_folders(root, split)
    image_files, mask_files = _by_stem(images), _by_stem(masks)
    if not image_files:
        raise UserError(f"no images in {images}: expected files like a.jpg there and a.png in {masks}")
    listing = Listing(images.parent)
    if cam_only:
        listing.left_out = _leave_out_non_cam(image_files)
        _leave_out_non_cam(mask_files)
        if not image_files:
            raise UserError(f"all {listing.left_out} images in {images} are COD10K-NonCAM, which --cam-only leaves out")
    for stem, files in sorted(image_files.items()):
        if len(files) > 1 or len(mask_files.get(stem, ())) > 1:
            several = files + mask_files.get(stem, [])
            listing.problems["stems with several images or masks"].append(first_few([f.name for f in several]))
        elif stem not in mask_files:
            listing.problems["images without a mask"].append(f"{files[0].name} (no {masks.name}/{stem}.png)")
        else:
            listing.pairs.append(Pair(files[0], mask_files[stem][0]))
    for stem, files in sorted(mask_files.items()):
        if stem not in image_files:
            listing.problems["masks without an image"].append(f"{files[0].name} (no {images.name}/{stem}.jpg)")
    return listing


def _find_folders(root: Path, split: str) -> tuple[Path, Path]:
    if not root.is_dir():
        raise UserError(f"there is no data set at {root}: it is {'a file' if root.exists() else 'missing'}")
    name, children = split.lower(), _children(root)
    if name == "train" and name not in children:
        parent = root.resolve().parent
        if root.resolve().name.lower() == "test" and "train" in _children(parent):
            raise UserError(f"{root} is a test set, for fastema evaluate only; to train, give {parent}")
    where = children.get(name, root)
    for images, masks in LAYOUTS:
        inside = _children(where)
        if images.lower() in inside and masks.lower() in inside:
            return inside[images.lower()], inside[masks.lower()]
    if name == "test" and "train" in children and where is root:
        raise UserError(
            f"{root} has no Test folder, and what is in Train was trained on; to evaluate on that all the same, give "
            f"{children['train']}"
        )
    expected = " or ".join(f"{split}/{images} + {split}/{masks}" for images, masks in LAYOUTS)
    found = first_few(sorted(f"{child.name}/" for child in _children(where).values()), 6) or "no folders"
    raise UserError(f"{root} is not a data set that is understood: expected {expected}; {where} has {found}")


def _leave_out_non_cam(files: dict[str, list[Path]]) -> int:
    """Removes COD10K's stems without a camouflaged object; returns how many."""
    stems = [stem for stem in files if stem.lower().startswith(NON_CAM)]
    for stem in stems:
        del files[stem]
    return len(stems)


def _children(folder: Path) -> dict[str, Path]:
    """The subfolders by lower-case name: `image` and `Image` are both around."""
    return {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
            files[file.stem].append(file)
    return files

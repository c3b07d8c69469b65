"""Where a data set keeps its images and masks, and which belong together.

COD10K-v3 is the model, `{Train,Test}/{Image,GT_Object}` with `a.jpg` and `a.png` of the same stem; the other common
names, and folders without the Train level, are understood too.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from fastema.segmentation.errors import UserError, first_few

# (images, masks), in the order in which they are looked for.
LAYOUTS = (("Image", "GT_Object"), ("Imgs", "GT"), ("Image", "Mask"))

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
    """What was found in the two folders; the problems are by kind, in words."""

    folder: Path
    pairs: list[Pair] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def list_pairs(root: Path, split: str = "Train") -> Listing:
    """Pairs the images and masks of one split of a data set by stem, sorted by stem.

    Raises:
        UserError: `root` is not a folder, has none of the known layouts, or no image.
    """
    images, masks = _find_folders(root, split)
    image_files, mask_files = _by_stem(images), _by_stem(masks)
    if not image_files:
        raise UserError(f"no images in {images}: expected files like a.jpg there and a.png in {masks}")
    listing = Listing(images.parent)
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
    split_folder = _children(root).get(split.lower())
    for parent in [split_folder, root] if split_folder else [root]:
        children = _children(parent)
        for images, masks in LAYOUTS:
            if images.lower() in children and masks.lower() in children:
                return children[images.lower()], children[masks.lower()]
    expected = " or ".join(f"{split}/{images} + {split}/{masks}" for images, masks in LAYOUTS)
    where = split_folder or root
    found = first_few(sorted(f"{child.name}/" for child in _children(where).values()), 6) or "no folders"
    raise UserError(f"{root} is not a data set that is understood: expected {expected}; {where} has {found}")


def _children(folder: Path) -> dict[str, Path]:
    """The subfolders by lower-case name: `image` and `Image` are both around."""
    return {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
            files[file.stem].append(file)
    return files

"""Find the image and mask files of a data set, pair them, and hold some out for validation.

COD10K-v3 is the model, `{Train,Test}/{Image,GT_Object}` with `a.jpg` and `a.png`; `layouts` reads others. Nothing in a
Test folder is ever trained on.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastema.core.checks import counted, first_few
from fastema.errors import UserError
from fastema.segmentation.data.image_files import OWN_WHITES, Whites
from fastema.segmentation.data.layouts import File, Found, is_image, pair_files, read_tree, read_two
from fastema.segmentation.data.masks import MaskRule

# COD10K's images without a camouflaged animal: 2,960 of its 6,000 training images, with all-black masks.
NON_CAM = "cod10k-noncam-"


@dataclass(frozen=True)
class Pair:
    """One image and its mask."""

    image: Path
    mask: Path
    whites: Whites = OWN_WHITES  # of its set; `verify_pairs` sets this
    rule: MaskRule | None = None  # and this
    name: str = ""  # the path in its set, without suffix; `a` for images that lie side by side

    @property
    def stem(self) -> str:
        return self.name or self.image.stem


@dataclass
class Listing:
    """The files of one split of a data set; `verify_pairs` sets what comes after `left_out`."""

    folder: Path  # of the split, with images and masks in it
    has_split: bool = False  # whether there is a folder for the split
    pairs: list[Pair] = field(default_factory=list)  # sorted by stem
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # descriptions by kind
    left_out: int = 0  # COD10K-NonCAM images
    unused: dict[str, list[str]] = field(default_factory=dict)  # other files, by the reason why they are not used
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
        for reason, files in self.unused.items():
            notes.append(f"{counted(len(files), 'file')} not used ({reason}): {first_few(files)}")
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


def list_pairs(
    root: Path | None,
    split: str = "Train",
    cam_only: bool = True,
    images: Path | None = None,
    masks: Path | None = None,
) -> Listing:
    """Pair the images and masks of one split by name.

    A root without folders Train and Test is one set, which is read for either split. `cam_only` leaves out
    `COD10K-NonCAM-*`, as the papers on COD10K do.

    Args:
        root: of the data set; None where `images` and `masks` are given.
        split: "Train" or "Test".
        cam_only: whether to leave out COD10K's images without a camouflaged object.
        images, masks: folders, of whatever name.

    Raises:
        UserError: nothing is found.
    """
    others: list[Path] = []
    if root is None:
        assert images is not None and masks is not None
        for folder in (images, masks):
            _require_folder(folder)
        files, listing = read_two(images, masks), Listing(images)
    else:
        files, listing, others = _files_of(root, split)
    if cam_only:
        noncam = [file for file in files if file.path.name.lower().startswith(NON_CAM)]
        files = [file for file in files if file not in set(noncam)]
        listing.left_out = sum(file.role != "mask" for file in noncam)
        if noncam and not files:
            folder = next(file for file in noncam if file.role != "mask").path.parent
            raise UserError(f"all {listing.left_out} images in {folder} are COD10K-NonCAM, which --cam-only leaves out")
    files, unlisted = _listed(files, split)
    found = pair_files(files)
    if not found.pairs and not (found.without_image and found.without_mask):
        raise UserError(_not_understood(root or listing.folder, listing, split, found))
    shown = _names_below(listing.folder)
    for name, some, theirs in found.pairs:
        if len(some) > 1 or len(theirs) > 1:
            both = first_few([shown(file.path) for file in some + theirs])
            listing.problems["stem with several images or masks"].append(both)
        else:
            listing.pairs.append(Pair(some[0].path, theirs[0].path, name=name))
    for kind, alone in (("mask without an image", found.without_image), ("image without a mask", found.without_mask)):
        for file in alone:
            listing.problems[kind].append(shown(file.path))
    reasons = {**unlisted, **found.unused, "no images": others}
    listing.unused |= {reason: [shown(path) for path in paths] for reason, paths in reasons.items() if paths}
    return listing


def hold_out(
    pairs: Sequence[Pair], fraction: float, before: Sequence[str] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into (training, validation), with at least `fraction` in the second, and at least two if there are 4.

    By a hash of the name, so the split is the same on every machine, and hardly changes when images are added.

    Args:
        pairs: all of a set.
        fraction: in (0, 1).
        before: names that a run has held out so far; if any are there, they and no others are held out again.
    """
    if len(pairs) < 2:
        raise UserError(
            f"{counted(len(pairs), 'image')}: not enough, one to train on and one to validate on are the least"
        )
    known = set(before or ())
    validation = {pair for pair in pairs if pair.stem in known}
    if not 0 < len(validation) < len(pairs):
        ordered = sorted(pairs, key=_hash)
        wanted = max(math.ceil(fraction * len(pairs) - 1e-9), min(2, len(pairs) // 2))
        count = min(max(sum(_hash(pair) < fraction for pair in pairs), wanted), len(pairs) - 1)
        validation = set(ordered[:count])
    return [pair for pair in pairs if pair not in validation], [pair for pair in pairs if pair in validation]


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder, sorted; no hidden ones, nothing from folders in it."""
    return [file for file in sorted(folder.iterdir()) if is_image(file.name) and file.name[0] != "."]


def _hash(pair: Pair) -> float:
    """Map a name to [0, 1)."""
    name = unicodedata.normalize("NFC", pair.stem)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"there is no data set at {folder}: it is {'a file' if folder.exists() else 'missing'}")


def _files_of(root: Path, split: str) -> tuple[list[File], Listing, list[Path]]:
    """Return the image files of a split, an empty listing of its folder, and other files."""
    _require_folder(root)
    name, children = split.lower(), _subfolders(root)
    if name == "train" and name not in children:
        parent = root.resolve().parent
        if root.resolve().name.lower() == "test" and "train" in _subfolders(parent):
            raise UserError(f"{root} is a test set, for fastema evaluate only; to train, give {parent}")
    files, splits, others = read_tree(root)
    listing = Listing(children.get(name, root), has_split=name in splits)
    if name == "test" and not listing.has_split and "train" in splits:
        raise UserError(
            f"{root} has no Test folder, and what is in Train was trained on; to evaluate on that all the same, give "
            f"{children.get('train', root)}"
        )
    used = {name} if listing.has_split else {"", "val"}
    chosen = [file for file in files if file.split in used]
    shown = _names_below(root)
    for file in files:
        # What is of the other split is expected to be there.
        if file.split not in used and (file.split not in ("train", "test") or not listing.has_split):
            reason = f"for {file.split}" if file.split else f"not for {name}"
            listing.unused.setdefault(f"in a folder that is {reason}", []).append(shown(file.path))
    return chosen, listing, [path for path in others if listing.folder in path.parents]


def _listed(files: Sequence[File], split: str) -> tuple[list[File], dict[str, list[Path]]]:
    """Leave out what PASCAL VOC's lists of a split do not have, and its images that nobody has drawn masks for."""
    chosen = list(files)
    unused: dict[str, list[Path]] = defaultdict(list)
    for folder in {file.folder for file in files if file.folder.name == "JPEGImages"}:
        lists = folder.parent / "ImageSets" / "Segmentation"
        own = [file for file in files if file.folder.parent == folder.parent]
        names, reason = {Path(file.key).name for file in own if file.role == "mask"}, "no mask is drawn for them"
        for each in ("train", "trainval") if split == "Train" else ("val",):
            if (path := lists / f"{each}.txt").is_file():
                names, reason = set(path.read_text().split()), f"not in {lists.name}/{path.name}"
                break
        out = {file for file in own if Path(file.key).name not in names}
        unused[reason] += [file.path for file in own if file in out]
        chosen = [file for file in chosen if file not in out]
    return chosen, unused


def _not_understood(root: Path, listing: Listing, split: str, found: Found) -> str:
    where = listing.folder
    if found.without_image:
        folder = found.without_image[0].folder
        own = (child for name, child in _subfolders(where).items() if name in ("image", "imgs", "images"))
        return f"no images in {next(own, where)}: expected files like a.jpg there and a.png in {folder}"
    folders = [f"{folder.name}/" for folder in _subfolders(where).values()]
    images = [counted(len(found.without_mask), "image")] * bool(found.without_mask)
    has = first_few([*sorted(folders), *images], 6) or "no folders"
    return (
        f"{root} is not a data set that is understood: expected {split}/Image + {split}/GT_Object or the like (Imgs + "
        "GT, images + masks, or files like a.jpg and a_mask.png, with or without the folder "
        f"{split}), or --images DIR --masks DIR; {where} has {has}"
    )


def _names_below(folder: Path) -> Callable[[Path], str]:
    """Return a function that shortens a path to what is below a folder, or to its name where folders say nothing."""

    def shown(path: Path) -> str:
        parts = path.relative_to(folder).parts if folder in path.parents else path.parts[-2:]
        return parts[-1] if len(parts) <= 2 else "/".join(parts)

    return shown


def _subfolders(folder: Path) -> dict[str, Path]:
    # By lower-case name: both `image` and `Image` are common.
    return {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}

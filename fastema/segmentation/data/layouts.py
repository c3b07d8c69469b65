"""Find the image and mask files under a folder, and pair them by name.

A folder's name says what is in it (`Imgs`, `GT_Object`, `train_masks`) and of which split it is; what remains of a
path is the name by which an image finds its mask. Without such folders, the files' own names say it (`a_mask.png`).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Role = Literal["image", "mask", ""]

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tga",
        ".jp2",
        ".avif",
    ]
)

_IMAGE_WORDS = frozenset(["image", "images", "img", "imgs", "photo", "photos", "picture", "pictures"])
_MASK_WORDS = frozenset(
    [
        "gt",
        "gts",
        "groundtruth",
        "mask",
        "masks",
        "label",
        "labels",
        "annotation",
        "annotations",
        "segmentation",
        "segmentations",
        "seg",
        "segs",
        "matte",
        "mattes",
    ]
)
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
# Of `imagesTr` and `DUTS-TR`: only after another word, since a folder `tr` may be anything.
_SHORT_SPLITS = {"tr": "train", "te": "test", "ts": "test"}
_FILLERS = frozenset(["jpeg", "jpg", "png", "object", "class", "binary"])
# Where several folders have a mask for an image, the first of these is taken.
_PREFERRED = ("gt_object", "gt", "segmentationclass", "segmentationobject")
# Of a file's name: what says that it is a mask, or an image.
_OF_MASK = "mask|masks|gt|groundtruth|label|labels|segmentation|seg|annotation|matte"
_OF_IMAGE = "image|img|sat|photo"
_CAMEL = "Mask|GT|Label|Segmentation|Seg"
_MASK_NAME = re.compile(rf"(?:(?i:{_OF_MASK})[ _.-]+(.+)|(.+?)(?:[ _.-]+(?i:{_OF_MASK})|(?<=[a-z0-9])(?:{_CAMEL})))")
# nnU-Net numbers an image's channels: the only one is 0000.
_IMAGE_NAME = re.compile(rf"(?:(?i:{_OF_IMAGE})[ _.-]+(.+)|(.+?)(?:[ _.-]+(?i:{_OF_IMAGE})|_0000))")
_TOKENS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+")
_NO_FOLDERS = ("__MACOSX",)
_NO_FILES = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class File:
    """An image file, of an image or a mask."""

    path: Path
    folder: Path  # the outermost one that is of one kind
    key: str  # by which it finds its counterpart, without suffix
    role: Role = ""
    split: str = ""

    def named(self, bare: bool) -> str:
        """Return the key in lower case; if `bare`, without what says mask or image."""
        folder, _, stem = self.key.rpartition("/")
        match = (_MASK_NAME if self.role == "mask" else _IMAGE_NAME).fullmatch(stem) if bare else None
        return f"{folder}/{(match[1] or match[2]) if match else stem}".casefold()


@dataclass
class Found:
    """What `pair_files` found."""

    pairs: list[tuple[str, list[File], list[File]]]  # name, image and mask: more than one of either is a problem
    without_mask: list[File]
    without_image: list[File]
    unused: dict[str, list[Path]]  # by reason


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder under a root, sorted, with its files; hidden ones are left out, links are followed once."""
    seen: set[str] = set()
    for folder, inside, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if name[0] != "." and name not in _NO_FOLDERS)
        yield Path(folder), sorted(name for name in files if name[0] != "." and name.lower() not in _NO_FILES)


def is_image(name: str) -> bool:
    """Return whether a file is an image, by its suffix."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def read_tree(root: Path) -> tuple[list[File], set[str], list[Path]]:
    """Return the image files under a root, the splits that its folders are named for, and its other files."""
    files: list[File] = []
    splits: set[str] = set()
    others: list[Path] = []
    for folder, names in walk(root):
        parts = folder.relative_to(root).parts
        role, split, outermost, key = _meaning(parts)
        if split:
            splits.add(split)
        kind = root.joinpath(*parts[: outermost + 1]) if outermost >= 0 else folder
        for name in names:
            if is_image(name):
                whole = _normal("/".join((*key, os.path.splitext(name)[0])))
                files.append(File(folder / name, kind, whole, role, split))
            else:
                others.append(folder / name)
    return files, splits, others


def read_two(images: Path, masks: Path) -> list[File]:
    """Return the image files under a folder of images and one of masks, which may be one and the same."""
    files = []
    for root, role in ((images, "image"), (masks, "mask")):
        if images == masks:
            role = ""
        for folder, names in walk(root):
            if root == images != masks and (folder == masks or masks in folder.parents):
                continue
            for name in filter(is_image, names):
                key = _normal((folder.relative_to(root) / os.path.splitext(name)[0]).as_posix())
                files.append(File(folder / name, root, key, role))  # type: ignore[arg-type]
        if images == masks:
            break
    return files


def pair_files(files: Sequence[File]) -> Found:
    """Pair image files by their keys: the same, else without `_mask` and the like, else by a file's name alone."""
    images, masks, unused = _by_role(files)
    pairs: dict[str, tuple[list[File], list[File]]] = {}
    left_images, left_masks = list(images), list(masks)
    # By the same key; by a mask's without `_mask`, and the image's with and without `image_`; then by the file alone.
    ways: list[tuple[Callable[[File], str], bool]] = [
        (lambda file: file.key, False),
        (lambda file: file.named(file.role == "mask"), False),
        (lambda file: file.named(True), False),
        (lambda file: file.named(file.role == "mask").rpartition("/")[2], True),
        (lambda file: file.named(True).rpartition("/")[2], True),
    ]
    for key_of, alone in ways:
        # A name alone must be the only one of its kind in the whole set.
        once = [Counter(map(key_of, kind)) for kind in (images, masks)] if alone else []
        by_key: dict[str, tuple[list[File], list[File]]] = defaultdict(lambda: ([], []))
        for side, left in enumerate((left_images, left_masks)):
            for file in left:
                by_key[key_of(file)][side].append(file)
        for key, (some, theirs) in by_key.items():
            if some and theirs and not any(count[key] > 1 for count in once):
                best = min(map(_rank, theirs))
                pairs[some[0].key] = (some, [file for file in theirs if _rank(file) == best])
        paired = {file for both in pairs.values() for kind in both for file in kind}
        left_images = [file for file in left_images if file not in paired]
        left_masks = [file for file in left_masks if file not in paired]
    folders = {file.folder for file in paired}
    without_mask, without_image = [], []
    for file in left_images:
        if file.folder in folders or file.role or not pairs:
            without_mask.append(file)
        else:
            unused["no masks for their folder"].append(file.path)
    for file in left_masks:
        if file.folder in folders or not pairs:
            without_image.append(file)
        else:
            unused["other masks are used"].append(file.path)
    return Found([(key, *both) for key, both in sorted(pairs.items())], without_mask, without_image, unused)


def _by_role(files: Sequence[File]) -> tuple[list[File], list[File], dict[str, list[Path]]]:
    """Return images and masks, and what is neither."""
    unused: dict[str, list[Path]] = defaultdict(list)
    masks = [file for file in files if file.role == "mask"]
    rest = [file for file in files if file.role != "mask"]
    if not rest and len({bool(_MASK_NAME.fullmatch(file.path.stem)) for file in masks}) > 1:
        # A folder such as `BUSI_with_GT` around everything says nothing; the files' names do.
        masks, rest = [], [replace(file, role="") for file in files]
    if not masks:
        masks, rest = _split(rest, lambda file: bool(_MASK_NAME.fullmatch(file.path.stem)))
    if not masks:  # a.jpg and a.png
        photos = {file.key for file in rest if file.path.suffix.lower() in (".jpg", ".jpeg")}
        drawn = (".png", ".bmp", ".gif")
        masks, rest = _split(rest, lambda file: file.path.suffix.lower() in drawn and file.key in photos)
    masks = [File(file.path, file.folder, file.key, "mask", file.split) for file in masks]
    images = [file for file in rest if file.role == "image"]
    if images:
        unused["neither in a folder of images nor in one of masks"] = [file.path for file in rest if not file.role]
    return images or rest, masks, unused


def _split(files: Iterable[File], condition: Callable[[File], bool]) -> tuple[list[File], list[File]]:
    both: tuple[list[File], list[File]] = ([], [])
    for file in files:
        both[not condition(file)].append(file)
    return both


def _rank(file: File) -> int:
    name = file.folder.name.lower()
    return _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED)


def _meaning(parts: Sequence[str]) -> tuple[Role, str, int, list[str]]:
    """Return what a path of folders says: role, split, the place of the folder with the role, what else is in it."""
    words = [[token.lower() for token in _TOKENS.findall(part)] for part in parts]
    roles = [_role(each) for each in words]
    known = _IMAGE_WORDS | _MASK_WORDS | _FILLERS | _SPLITS.keys() | _SHORT_SPLITS.keys() | {"ground", "truth"}
    exact = [place for place, each in enumerate(words) if roles[place] and known.issuperset(each)]
    partial = [place for place, role in enumerate(roles) if role]
    place = exact[0] if exact else partial[-1] if partial else -1
    split, key = "", []
    for index, (part, each) in enumerate(zip(parts, words, strict=True)):
        own = next((_SPLITS[word] for word in each if word in _SPLITS), "")
        own = own or next((_SHORT_SPLITS[word] for word in each[1:] if word in _SHORT_SPLITS), "")
        split = split or own
        if index == place:
            left = [word for word in each if word not in known]
            if left:
                key.append("_".join(left))
        elif not (each and all(word in _SPLITS for word in each)):
            key.append(part)
    return (roles[place] if place >= 0 else ""), split, place, key


def _role(words: Sequence[str]) -> Role:
    if _MASK_WORDS.intersection(words) or {"ground", "truth"}.issubset(words):
        return "mask"
    return "image" if _IMAGE_WORDS.intersection(words) else ""


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)

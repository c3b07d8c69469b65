"""Read image and mask files, one pair at a time in a training, and all of them before it.

A bad file must not stop a run hours later.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastema.core.checks import counted, first_few
from fastema.errors import UserError
from fastema.segmentation.asked import NOTHING_ASKED, Asked
from fastema.segmentation.data.image_files import (
    OWN_WHITES,
    Range,
    Whites,
    deep_range,
    is_deep,
    open_image,
    orientation,
    reason,
    to_rgb,
    upright,
    whites_of,
)
from fastema.segmentation.data.listing import Listing, Pair
from fastema.segmentation.data.masks import (
    IGNORED,
    Content,
    MaskRule,
    MaskValuesError,
    decide,
    decode,
    describe,
    extract,
    kinds,
)

# EXIF orientations from this one on exchange width and height.
_FIRST_QUARTER_TURN = 5


def read_image(path: Path, whites: Whites = OWN_WHITES) -> np.ndarray:
    """Read an image as uint8 [H, W, 3], turned as its EXIF orientation says.

    Args:
        path: any file of one image that Pillow reads.
        whites: what is white in its set's images of more than 8 bits; unless given, in this one.

    Raises:
        ValueError: several pages, or values of unclear range.
    """
    with open_image(path) as image:
        pixels = to_rgb(image, whites)
        return upright(pixels, orientation(image))


def read_mask(path: Path, rule: MaskRule | None = None) -> np.ndarray:
    """Read a mask as int8 [H, W] of 1, 0 and `masks.IGNORED`, turned as its EXIF orientation says.

    Args:
        path: any file of one image that Pillow reads.
        rule: of its set; unless given, one is made from this file alone.

    Raises:
        MaskValuesError: its values may mean several things.
    """
    with open_image(path) as image:
        if rule is None:
            (rule,) = decide([decode(image)])
        values = extract(image, rule.form)
        return upright(rule.apply(values), orientation(image))


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Read an image, uint8 [H, W, 3], and its mask, int8 [H, W] of 1, 0 and `masks.IGNORED`."""
    path = pair.image
    try:
        image = read_image(path, pair.whites)
        path = pair.mask
        mask = read_mask(path, pair.rule)
    except Exception as error:  # Pillow raises anything on a damaged file
        raise UserError(f"{path} cannot be read ({reason(error)}): was it moved or changed during the run?") from error
    if mask.shape != image.shape[:2]:
        sizes = f"{mask.shape[1]}x{mask.shape[0]}, its image is {image.shape[1]}x{image.shape[0]}"
        raise UserError(f"{pair.mask} is {sizes}: was one of them changed during the run?")
    return image, mask


def verify_pairs(
    listing: Listing,
    advance: Callable[[], object] = lambda: None,
    whites: Whites = OWN_WHITES,
    asked: Asked = NOTHING_ASKED,
    ignored: Mapping[str, Sequence[int]] | None = None,
) -> list[Pair]:
    """Read all pairs of a listing, set what it says of them, and return them, ready for `read_pair`.

    Args:
        listing: changed in place.
        advance: called after each pair.
        whites: of the images that a network was trained on; unless given, these images' own.
        asked: what the user says about the masks.
        ignored: what was ignored in the masks that a network was trained on, as `ignored_of`.

    Raises:
        UserError: files that cannot be read, or not as an image and its mask.
    """
    problems = defaultdict(list, {kind: list(texts) for kind, texts in listing.problems.items()})
    names = defaultdict(list)
    contents: list[Content] = []
    ranges: dict[str, Range] = {}  # by name
    # Threads are enough: Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        try:
            for pair, read in zip(listing.pairs, threads.map(_verify, listing.pairs), strict=True):
                if read.problem:
                    problems[read.problem].append(read.detail)
                else:
                    names[read.digest].append(pair.image.name)
                    contents.append(read.mask)
                    if read.values is not None:
                        ranges[pair.image.name] = read.values
                advance()
        except BaseException:
            threads.shutdown(cancel_futures=True)  # Ctrl-C should not wait for the rest of a large set
            raise
    if problems:
        total = sum(map(len, problems.values()))
        lines = [f"{counted(total, 'problem')} in {listing.folder}; nothing was started. Mend or remove these files:"]
        for kind, texts in problems.items():
            noun, rest = kind.split(" ", 1)
            lines.append(f"  {counted(len(texts), noun)} {rest}: {first_few(texts)}")
        raise UserError("\n".join(lines))
    own = _whites(listing.folder, ranges, whites)
    try:
        rules = decide(contents, asked, ignored)
    except MaskValuesError as error:
        raise UserError(f"the masks in {listing.folder} have {error}") from error
    listing.masks = list(dict.fromkeys(filter(None, (describe(rule, contents) for rule in dict.fromkeys(rules)))))
    found = [kinds(content, rule) for content, rule in zip(contents, rules, strict=True)]
    listing.all_black = sum(1 not in each and 0 in each for each in found)
    listing.all_white = sum(0 not in each and 1 in each for each in found)
    listing.all_ignored = [pair.mask.name for pair, each in zip(listing.pairs, found, strict=True) if each == {IGNORED}]
    if len(listing.all_ignored) == len(found) > 0:
        raise UserError(f"the masks in {listing.folder} have nothing but pixels to ignore: see --ignore-index")
    listing.pairs = [
        replace(pair, whites=own, rule=rule)
        for pair, rule, each in zip(listing.pairs, rules, found, strict=True)
        if each != {IGNORED}
    ]
    listing.repeated = [" = ".join(same[:2]) + " = …" * (len(same) > 2) for same in names.values() if len(same) > 1]
    return listing.pairs


def _whites(folder: Path, ranges: dict[str, Range], trained: Whites) -> Whites:
    if not ranges:
        return OWN_WHITES
    lowest = min(ranges, key=lambda name: ranges[name].low)
    highest = max(ranges, key=lambda name: ranges[name].high)
    try:
        own = whites_of(list(ranges.values()))
    except ValueError as error:
        raise UserError(
            f"images of more than 8 bits in {folder} have {error} (the lowest in {lowest}, the highest in {highest}): "
            "convert them, all alike"
        ) from error
    if any(white and mine > white for mine, white in zip(own, trained, strict=True)):
        raise UserError(
            f"{folder / highest} has values up to {ranges[highest].high:g}, but those of the images trained on end at "
            f"{max(trained):g}: convert the images of this set alike"
        )
    return Whites(trained.integer or own.integer, trained.real or own.real)


def ignored_of(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Return by form what is ignored in masks, as plain values for a checkpoint."""
    return {pair.rule.form: list(pair.rule.ignored) for pair in pairs if pair.rule is not None and pair.rule.ignored}


class _Read(NamedTuple):
    mask: Content
    problem: str = ""  # its kind; empty for a sound pair
    detail: str = ""
    digest: bytes = b""  # of the image file
    values: Range | None = None  # of an image of more than 8 bits


_NO_MASK = Content("numbers", {})


def _verify(pair: Pair) -> _Read:
    file, problem = pair.image, "image that cannot be read"
    try:
        data = file.read_bytes()
        with open_image(io.BytesIO(data)) as image:
            stored = image.size
            if not is_deep(image):
                # JPEG decodes faster when small.
                image.draft("RGB", (max(1, stored[0] // 8), max(1, stored[1] // 8)))
            image.load()
            size = stored if image.format in ("JPEG", "MPO") else image.size  # TIFF is turned already
            turned = orientation(image) >= _FIRST_QUARTER_TURN
            width, height = size[::-1] if turned else size
            values = deep_range(image)
        file, problem = pair.mask, "mask that cannot be read"
        with open_image(file) as image:
            mask = decode(image)
            # A TIFF has its size as shown only once it is decoded.
            shape = image.size if orientation(image) >= _FIRST_QUARTER_TURN else image.size[::-1]
    except MaskValuesError as error:
        return _Read(_NO_MASK, "mask of unclear values", f"{file.name} ({error})")
    except Exception as error:  # Pillow raises anything on a damaged file
        empty = file.is_file() and not file.stat().st_size
        return _Read(_NO_MASK, problem, f"{file.name} ({'0 bytes' if empty else reason(error)})")
    if shape != (height, width):
        sizes = f"image {width}x{height}{' as EXIF turns it' * turned}, mask {shape[1]}x{shape[0]}"
        return _Read(_NO_MASK, "mask of another size than the image", f"{file.name} ({sizes})")
    return _Read(mask, "", "", hashlib.sha256(data).digest(), values)

"""Read image and mask files, one pair at a time in a training, and all of them before it.

A bad file must not stop a run hours later.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastema.core.text import first_few
from fastema.segmentation.data.files import (
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
from fastema.segmentation.errors import UserError

# A mask has 0 and 255, or 0 and 1. From the middle up is foreground, which allows for JPEG noise.
_FOREGROUND_FROM = 128
# EXIF orientations from this one on exchange width and height.
_FIRST_QUARTER_TURN = 5


class MaskValuesError(ValueError):
    """The mask is an image, but not of foreground and background."""


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


def read_mask(path: Path) -> np.ndarray:
    """Read a mask as uint8 [H, W] of 0 and 1, turned as its EXIF orientation says.

    Raises:
        MaskValuesError: the values are neither 0/255 nor 0/1, for example class numbers.
    """
    with open_image(path) as image:
        values = upright(np.array(image.convert("L")), orientation(image))
    highest = int(values.max(initial=0))
    if highest <= 1:
        return values
    if highest < _FOREGROUND_FROM:
        raise MaskValuesError(f"values up to {highest}, expected 0/255 or 0/1")
    return (values >= _FOREGROUND_FROM).astype(np.uint8)


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Read an image, uint8 [H, W, 3], and its mask, uint8 [H, W] of 0 and 1."""
    path = pair.image
    try:
        image = read_image(path, pair.whites)
        path = pair.mask
        mask = read_mask(path)
    except Exception as error:  # Pillow raises anything on a damaged file
        raise UserError(f"{path} cannot be read ({reason(error)}): was it moved or changed during the run?") from error
    if mask.shape != image.shape[:2]:
        sizes = f"{mask.shape[1]}x{mask.shape[0]}, its image is {image.shape[1]}x{image.shape[0]}"
        raise UserError(f"{pair.mask} is {sizes}: was one of them changed during the run?")
    return image, mask


def verify_pairs(
    listing: Listing, advance: Callable[[], object] = lambda: None, whites: Whites = OWN_WHITES
) -> list[Pair]:
    """Read all pairs of a listing, set its `all_black` and `repeated`, and return the pairs, ready for `read_pair`.

    Args:
        listing: changed in place.
        advance: called after each pair.
        whites: of the images that a network was trained on; unless given, these images' own.

    Raises:
        UserError: files that cannot be read, or not as an image and its mask.
    """
    problems = defaultdict(list, {kind: list(texts) for kind, texts in listing.problems.items()})
    names, all_black = defaultdict(list), 0
    ranges: dict[str, Range] = {}  # by name
    # Threads are enough: Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        try:
            for pair, read in zip(listing.pairs, threads.map(_verify, listing.pairs), strict=True):
                if read.problem:
                    problems[read.problem].append(read.detail)
                else:
                    names[read.digest].append(pair.image.name)
                    all_black += read.all_black
                    if read.values is not None:
                        ranges[pair.image.name] = read.values
                advance()
        except BaseException:
            threads.shutdown(cancel_futures=True)  # Ctrl-C should not wait for the rest of a large set
            raise
    if problems:
        total = sum(map(len, problems.values()))
        lines = [f"{total} problems in {listing.folder}; nothing was started. Mend or remove these files:"]
        lines += [f"  {len(texts)} {kind}: {first_few(texts)}" for kind, texts in problems.items()]
        raise UserError("\n".join(lines))
    own = _whites(listing.folder, ranges, whites)
    listing.pairs = [replace(pair, whites=own) for pair in listing.pairs] if any(own) else listing.pairs
    listing.all_black = all_black
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


class _Read(NamedTuple):
    problem: str = ""  # its kind; empty for a sound pair
    detail: str = ""
    digest: bytes = b""  # of the image file
    all_black: bool = False
    values: Range | None = None  # of an image of more than 8 bits


def _verify(pair: Pair) -> _Read:
    file, problem = pair.image, "images that cannot be read"
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
        file, problem = pair.mask, "masks that are not an image"
        mask = read_mask(file)
    except MaskValuesError as error:
        return _Read("masks that are not black and white", f"{file.name} ({error})")
    except Exception as error:  # Pillow raises anything on a damaged file
        empty = file.is_file() and not file.stat().st_size
        return _Read(problem, f"{file.name} ({'0 bytes' if empty else reason(error)})")
    if mask.shape != (height, width):
        sizes = f"image {width}x{height}{' as EXIF turns it' * turned}, mask {mask.shape[1]}x{mask.shape[0]}"
        return _Read("masks of another size than their image", f"{file.name} ({sizes})")
    return _Read("", "", hashlib.sha256(data).digest(), not mask.any(), values)

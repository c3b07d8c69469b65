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
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastema.core.text import first_few
from fastema.segmentation.data.listing import Listing, Pair
from fastema.segmentation.errors import UserError

# A mask has 0 and 255, or 0 and 1. From the middle up is foreground, which allows for JPEG noise.
_FOREGROUND_FROM = 128


class MaskValuesError(ValueError):
    """The mask is an image, but not of foreground and background."""


def read_image(path: Path) -> np.ndarray:
    """Read an image as uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """Read a mask as uint8 [H, W] of 0 and 1.

    Raises:
        MaskValuesError: the values are neither 0/255 nor 0/1, for example class numbers.
    """
    with Image.open(path) as image:
        values = np.array(image.convert("L"))
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
        image = read_image(path)
        path = pair.mask
        mask = read_mask(path)
    except Exception as error:  # Pillow raises anything on a damaged file
        raise UserError(f"{path} cannot be read ({reason(error)}): was it moved or changed during the run?") from error
    if mask.shape != image.shape[:2]:
        sizes = f"{mask.shape[1]}x{mask.shape[0]}, its image is {image.shape[1]}x{image.shape[0]}"
        raise UserError(f"{pair.mask} is {sizes}: was one of them changed during the run?")
    return image, mask


def reason(error: Exception) -> str:
    """Return why a file could not be read, without its path."""
    if "cannot identify image file" in str(error):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def verify_pairs(listing: Listing, advance: Callable[[], object] = lambda: None) -> list[Pair]:
    """Read all pairs of a listing, set its `all_black` and `repeated`, and return the pairs."""
    problems = defaultdict(list, {kind: list(texts) for kind, texts in listing.problems.items()})
    names, all_black = defaultdict(list), 0
    # Threads are enough: Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        try:
            for pair, read in zip(listing.pairs, threads.map(_verify, listing.pairs), strict=True):
                if read.problem:
                    problems[read.problem].append(read.detail)
                else:
                    names[read.digest].append(pair.image.name)
                    all_black += read.all_black
                advance()
        except BaseException:
            threads.shutdown(cancel_futures=True)  # Ctrl-C should not wait for the rest of a large set
            raise
    if problems:
        total = sum(map(len, problems.values()))
        lines = [f"{total} problems in {listing.folder}; nothing was started. Mend or remove these files:"]
        lines += [f"  {len(texts)} {kind}: {first_few(texts)}" for kind, texts in problems.items()]
        raise UserError("\n".join(lines))
    listing.all_black = all_black
    listing.repeated = [" = ".join(same[:2]) + " = …" * (len(same) > 2) for same in names.values() if len(same) > 1]
    return listing.pairs


class _Read(NamedTuple):
    problem: str = ""  # its kind; empty for a sound pair
    detail: str = ""
    digest: bytes = b""  # of the image file
    all_black: bool = False


def _verify(pair: Pair) -> _Read:
    file, problem = pair.image, "images that cannot be read"
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            image.draft("RGB", (max(1, width // 8), max(1, height // 8)))  # JPEG decodes faster when small
            image.load()
        file, problem = pair.mask, "masks that are not an image"
        mask = read_mask(file)
    except MaskValuesError as error:
        return _Read("masks that are not black and white", f"{file.name} ({error})")
    except Exception as error:  # Pillow raises anything on a damaged file
        empty = file.is_file() and not file.stat().st_size
        return _Read(problem, f"{file.name} ({'0 bytes' if empty else reason(error)})")
    if mask.shape != (height, width):
        sizes = f"image {width}x{height}, mask {mask.shape[1]}x{mask.shape[0]}"
        return _Read("masks of another size than their image", f"{file.name} ({sizes})")
    return _Read(digest=hashlib.sha256(data).digest(), all_black=not mask.any())

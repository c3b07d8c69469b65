"""Image and mask files to arrays: the one place that knows how pixels are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# A mask is 0/255 (foreground from the middle up, which forgives JPEG-like noise) or 0/1.
_FOREGROUND_FROM = 128


class MaskValuesError(ValueError):
    """The mask is an image, but not of foreground and background."""


def read_image(path: Path) -> np.ndarray:
    """Reads an image as uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """Reads a mask as uint8 [H, W] of 0 and 1.

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


def image_size(path: Path) -> tuple[int, int]:
    """Width and height; decodes the file to its end, at an eighth of the size where the format can, to find damage."""
    with Image.open(path) as image:
        size = image.size
        image.draft("RGB", (max(1, size[0] // 8), max(1, size[1] // 8)))
        image.load()
    return size

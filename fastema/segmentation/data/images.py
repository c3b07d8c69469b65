"""Read image and mask files into arrays."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from fastema.segmentation.data.listing import Pair
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


def decoded_size(data: bytes) -> tuple[int, int]:
    """Decode an encoded image to its end, so that damage raises; return its width and height."""
    with Image.open(io.BytesIO(data)) as image:
        size = image.size
        image.draft("RGB", (max(1, size[0] // 8), max(1, size[1] // 8)))  # JPEG decodes faster when small
        image.load()
    return size


def reason(error: Exception) -> str:
    """Return why a file could not be read, without its path."""
    if "cannot identify image file" in str(error):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__

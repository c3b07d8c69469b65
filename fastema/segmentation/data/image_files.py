"""Open image files as viewers show them, and convert the pixels of any depth to 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# What white may be in more than 8 bits: that of a depth, or of float.
_INTEGER_WHITES = (255, 1023, 4095, 16383, 65535)
_FLOAT_WHITES = (1, *_INTEGER_WHITES)
# A resampled float image overshoots its range by this share at most; above 1 of it and below the other, the range is
# unclear.
_OVERSHOOT = 0.1
_FLOAT_UNCLEAR_BELOW = 16

# By EXIF orientation, what turns the stored pixels into those that are shown.
_TURNS = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
_MULTI_PAGE = ("TIFF", "GIF", "WEBP", "PNG", "AVIF")  # not MPO: a photo, with a preview after it
_REDUCED_PAGE = 1  # bit of a TIFF page's NewSubfileType


class Whites(NamedTuple):
    """The value that is white in a set's images of more than 8 bits; 0 where it has none of the kind."""

    integer: int = 0
    real: float = 0.0


#: Of a set that is not known: each image has its own.
OWN_WHITES = Whites()


class Range(NamedTuple):
    """The values of an image of more than 8 bits."""

    low: float
    high: float
    real: bool


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Open an image file; its pixels are not decoded yet, and not turned.

    Raises:
        ValueError: it has several pages.
    """
    image = Image.open(file)
    if image.format in _MULTI_PAGE and (pages := getattr(image, "n_frames", 1)) > 1:
        full = pages if image.format != "TIFF" else sum(not _is_reduced(image, page) for page in range(pages))
        image.seek(0)
        if full > 1:
            raise ValueError(f"it has {full} pages: save the one that is meant as a file of its own")
    return image


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that is still to be applied, 1 for none. Call it once the pixels are decoded."""
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF is no reason to refuse a photo
        return 1
    return turn if turn in _TURNS else 1


def upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Turn pixels [H, W, ...] as their EXIF orientation says."""
    return np.ascontiguousarray(_TURNS[turn](pixels)) if turn in _TURNS else pixels


def deep_range(image: Image.Image) -> Range | None:
    """Return the range of an image of more than 8 bits, None for others.

    Raises:
        ValueError: it has NaN or infinities.
    """
    if not is_deep(image):
        return None
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite((low, high)).all():  # min and max of NaN are NaN
        raise ValueError("it has NaN or infinite values")
    return Range(low, high, image.mode == "F")


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has more than 8 bits a channel."""
    return image.mode.startswith("I") or image.mode == "F"


def white_of(values: Range) -> float:
    """Return what is white in images with these values: that of the smallest depth which holds them.

    Raises:
        ValueError: negative values, values beyond 16 bits, float values neither of 0 to 1 nor of an integer's range.
    """
    candidates = _FLOAT_WHITES if values.real else _INTEGER_WHITES
    slack = 1 + _OVERSHOOT if values.real else 1
    white = next((each for each in candidates if values.high <= each * slack), None)
    unclear = white == 255 and values.real and values.high < _FLOAT_UNCLEAR_BELOW
    if white is None or unclear or values.low < (1 - slack) * white:
        expected = "0 to 1, or 0 to 255 or 65535" if values.real else "0 to 65535"
        raise ValueError(f"values from {values.low:g} to {values.high:g}, expected {expected}")
    return white


def whites_of(ranges: list[Range]) -> Whites:
    """Return what is white in a set's images of more than 8 bits."""
    integer, real = ([each for each in ranges if each.real == kind] for kind in (False, True))
    return Whites(*(white_of(_joint(each)) if each else 0 for each in (integer, real)))  # type: ignore[arg-type]


def to_rgb(image: Image.Image, whites: Whites = OWN_WHITES) -> np.ndarray:
    """Return an image's pixels as uint8 [H, W, 3], as they are stored.

    Args:
        image: of any mode of Pillow's.
        whites: of its set; unless given, those of the image alone.

    Raises:
        ValueError: its values are brighter than white, or as `white_of`.
    """
    values = deep_range(image)
    if values is None:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    own, white = white_of(values), whites.real if values.real else whites.integer
    if white and own > white:
        raise ValueError(f"values up to {values.high:g}, but those of the images trained on end at {white:g}")
    levels = np.asarray(image).astype(np.float32) * np.float32(255 / (white or own))
    return np.repeat(np.rint(levels).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def reason(error: Exception) -> str:
    """Return why a file could not be read, without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "more than 178 million pixels, which is Pillow's limit"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _joint(ranges: list[Range]) -> Range:
    return Range(min(each.low for each in ranges), max(each.high for each in ranges), ranges[0].real)


def _is_reduced(image: Image.Image, page: int) -> bool:
    image.seek(page)
    return bool(image.tag_v2.get(254, 0) & _REDUCED_PAGE)  # type: ignore[attr-defined]

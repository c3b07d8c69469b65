"""Every file of a data set is opened before the first step: a list of what is wrong now, not a crash in epoch 7."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from fastema.segmentation.errors import UserError, first_few
from fastema.segmentation.layout import Listing, Pair
from fastema.segmentation.reading import MaskValuesError, image_size, read_mask


def verified_pairs(listing: Listing) -> list[Pair]:
    """Returns the pairs of a listing after reading every one of them.

    Raises:
        UserError: something is unpaired, unreadable or does not fit; lists how many of each and the first few.
    """
    problems = {kind: list(items) for kind, items in listing.problems.items()}
    # Threads are enough: Pillow lets go of the interpreter while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for found in threads.map(_problem_of, listing.pairs):
            if found is not None:
                problems.setdefault(found[0], []).append(found[1])
    if problems:
        raise UserError(_described(listing, problems))
    return listing.pairs


def _problem_of(pair: Pair) -> tuple[str, str] | None:
    # Pillow raises whatever the damage leads to: OSError, SyntaxError, ValueError, DecompressionBombError, ...
    try:
        width, height = image_size(pair.image)
    except Exception as error:
        return "images that cannot be read", f"{pair.image.name} ({_reason(error)})"
    try:
        mask = read_mask(pair.mask)
    except MaskValuesError as error:
        return "masks that are not black and white", f"{pair.mask.name} ({error})"
    except Exception as error:
        return "masks that are not an image", f"{pair.mask.name} ({_reason(error)})"
    if mask.shape != (height, width):
        sizes = f"image {width}x{height}, mask {mask.shape[1]}x{mask.shape[0]}"
        return "masks of another size than their image", f"{pair.mask.name} ({sizes})"
    return None


def _reason(error: Exception) -> str:
    if "cannot identify image file" in str(error):
        return "not an image"
    return str(error) or type(error).__name__


def _described(listing: Listing, problems: Mapping[str, Sequence[str]]) -> str:
    total = sum(len(items) for items in problems.values())
    lines = [f"{total} problems in {listing.folder}; nothing was trained. Mend or remove these files:"]
    lines += [f"  {len(items)} {kind}: {first_few(items)}" for kind, items in problems.items()]
    return "\n".join(lines)

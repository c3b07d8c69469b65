"""Every file of a data set is opened before the first step: a list of what is wrong now, not a crash in epoch 7."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from fastema.segmentation.data.images import MaskValuesError, read_mask, reason, size_of_whole
from fastema.segmentation.data.listing import Listing, Pair
from fastema.segmentation.errors import UserError, first_few


class _Problem(NamedTuple):
    kind: str
    what: str


class _Sound(NamedTuple):
    digest: bytes  # of the image file
    all_black: bool


def verified_pairs(listing: Listing, advance: Callable[[], object] | None = None) -> list[Pair]:
    """Returns the pairs of a listing after reading every one of them; also counts what `listing.notes()` tells.

    Args:
        listing: from `list_pairs`.
        advance: called after each pair, for a progress bar of `len(listing.pairs)` steps.

    Raises:
        UserError: something is unpaired, unreadable or does not fit; lists how many of each and the first few.
    """
    problems = {kind: list(items) for kind, items in listing.problems.items()}
    names = defaultdict(list)
    all_black = 0
    # Threads are enough: Pillow lets go of the interpreter while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        try:
            for pair, found in zip(listing.pairs, threads.map(_verified, listing.pairs), strict=True):
                if isinstance(found, _Problem):
                    problems.setdefault(found.kind, []).append(found.what)
                else:
                    names[found.digest].append(pair.image.name)
                    all_black += found.all_black
                if advance is not None:
                    advance()
        except BaseException:
            threads.shutdown(cancel_futures=True)  # Ctrl-C should not wait for the rest of a big set
            raise
    if problems:
        raise UserError(_described(listing, problems))
    listing.all_black = all_black
    listing.repeated = [" = ".join(same[:2]) + " = …" * (len(same) > 2) for same in names.values() if len(same) > 1]
    return listing.pairs


def _verified(pair: Pair) -> _Problem | _Sound:
    # Pillow raises whatever the damage leads to: OSError, SyntaxError, ValueError, DecompressionBombError, ...
    try:
        data = pair.image.read_bytes()
        if not data:
            return _Problem("images that cannot be read", f"{pair.image.name} (0 bytes)")
        width, height = size_of_whole(data)
    except Exception as error:
        return _Problem("images that cannot be read", f"{pair.image.name} ({reason(error)})")
    try:
        if not pair.mask.stat().st_size:
            return _Problem("masks that are not an image", f"{pair.mask.name} (0 bytes)")
        mask = read_mask(pair.mask)
    except MaskValuesError as error:
        return _Problem("masks that are not black and white", f"{pair.mask.name} ({error})")
    except Exception as error:
        return _Problem("masks that are not an image", f"{pair.mask.name} ({reason(error)})")
    if mask.shape != (height, width):
        sizes = f"image {width}x{height}, mask {mask.shape[1]}x{mask.shape[0]}"
        return _Problem("masks of another size than their image", f"{pair.mask.name} ({sizes})")
    return _Sound(hashlib.sha256(data).digest(), not mask.any())


def _described(listing: Listing, problems: Mapping[str, Sequence[str]]) -> str:
    total = sum(len(items) for items in problems.values())
    lines = [f"{total} problems in {listing.folder}; nothing was started. Mend or remove these files:"]
    lines += [f"  {len(items)} {kind}: {first_few(items)}" for kind, items in problems.items()]
    return "\n".join(lines)

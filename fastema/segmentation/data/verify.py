"""Read every file of a data set before the first step, so that a bad one does not stop the run hours later."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from fastema.core.text import first_few
from fastema.segmentation.data.images import MaskValuesError, decoded_size, read_mask, reason
from fastema.segmentation.data.listing import Listing, Pair
from fastema.segmentation.errors import UserError


class _Problem(NamedTuple):
    kind: str
    text: str


class _Sound(NamedTuple):
    digest: bytes  # of the image file
    all_black: bool


def verify_pairs(listing: Listing, advance: Callable[[], object] | None = None) -> list[Pair]:
    """Read all pairs of a listing, set its `all_black` and `repeated`, and return the pairs.

    Args:
        listing: from `list_pairs`.
        advance: called after each pair.
    """
    problems = {kind: list(texts) for kind, texts in listing.problems.items()}
    names = defaultdict(list)
    all_black = 0
    # Threads are enough: Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        try:
            for pair, found in zip(listing.pairs, threads.map(_verify, listing.pairs), strict=True):
                if isinstance(found, _Problem):
                    problems.setdefault(found.kind, []).append(found.text)
                else:
                    names[found.digest].append(pair.image.name)
                    all_black += found.all_black
                if advance is not None:
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


def _verify(pair: Pair) -> _Problem | _Sound:
    # Pillow raises anything on a damaged file: OSError, SyntaxError, ValueError, DecompressionBombError, ...
    try:
        data = pair.image.read_bytes()
        if not data:
            return _Problem("images that cannot be read", f"{pair.image.name} (0 bytes)")
        width, height = decoded_size(data)
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

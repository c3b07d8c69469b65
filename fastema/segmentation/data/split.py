"""Training and validation: held out by a hash of the file's stem.

So the split is the same on every machine, survives new images, does not follow the order of the files (the first
files of a set are often one scene), and never touches the test data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fastema.segmentation.data.listing import Pair
from fastema.segmentation.errors import UserError


def hold_out(pairs: Sequence[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs into (training, validation); about `fraction`, and at least one, is held out.

    Raises:
        UserError: there are fewer than two pairs, so that nothing is left to train on.
    """
    if len(pairs) < 2:
        raise UserError(f"{len(pairs)} image(s) are not enough: one to train on and one to validate on are the least")
    ordered = sorted(pairs, key=lambda pair: position(pair.stem))
    held_out = sum(position(pair.stem) < fraction for pair in pairs)
    held_out = min(max(held_out, 1), len(pairs) - 1)
    validation = set(ordered[:held_out])
    return [pair for pair in pairs if pair not in validation], [pair for pair in pairs if pair in validation]


def position(stem: str) -> float:
    """A stem's place in [0, 1), as good as random and always the same."""
    return int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big") / 2**64

"""Which live storages hold averaged weights right now, and whose: two averages of one model must not mix.

Whoever exchanges weights claims their storages for that time; everyone who reads or exchanges live weights looks here
first. A claim ends with its owner.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol


class Owner(Protocol):
    """Who exchanges weights."""

    #: The addresses of the storages, `storage._cdata`.
    live_storages: frozenset[int]
    #: For the error of others: "another ... is applied to the same model, do ... first".
    claim: str

    @property
    def is_applied(self) -> bool: ...


owners: weakref.WeakSet[Owner] = weakref.WeakSet()

#: By how much an exchange moves the version counters. Further than training ever counts, and another number every time:
#: no graph recorded during one exchange fits the versions outside of it or of the next, whoever makes them.
version_steps = itertools.count(1 << 30)


def refuse_foreign(what: str, live_storages: frozenset[int], own: Owner | None = None) -> None:
    """Raises RuntimeError while somebody else's averages are in any of these storages."""
    for owner in owners:
        if owner is not own and owner.is_applied and owner.live_storages & live_storages:
            raise RuntimeError(f"{what} while {owner.claim}")

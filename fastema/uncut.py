"""Steps that Ctrl-C, or whatever else comes from outside, finds either all done or none.

Python delivers signals between bytecodes. A loop inside one call of C has none, so that nothing cuts it, as long as its
steps are functions of C themselves: `Tensor.copy_`, `setattr`, methods of fastema._C.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeAlias

Step: TypeAlias = partial[Any]


def run_uncut(steps: Iterable[Step], done: list[Any] | None = None) -> None:
    """Calls every step, and appends one item to `done` for each that is done: an exception may follow the last one."""
    (done if done is not None else []).extend(map(partial.__call__, steps))

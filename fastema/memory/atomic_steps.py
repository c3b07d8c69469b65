"""Run steps in one call of C, so that KeyboardInterrupt cannot split them.

Python delivers signals between bytecodes, and a loop inside a call of C has none, as long as its steps are functions of
C themselves: `Tensor.copy_`, `setattr`, methods of fastema._C.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeAlias

Step: TypeAlias = partial[Any]


def run_atomically(steps: Iterable[Step], done: list[Any] | None = None) -> None:
    """Run every step, and append one item to `done` for each that is done: an exception may follow the last one."""
    (done if done is not None else []).extend(map(partial.__call__, steps))

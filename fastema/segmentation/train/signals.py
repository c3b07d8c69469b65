"""SIGINT and SIGTERM: a run leaves at once, but never in the middle of writing.

An epoch that is under way cannot be gone on with exactly, and the last finished one is on the disk already. So there
is nothing to save when a signal comes; only what is being written then is finished first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastema.segmentation.errors import Terminated

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def termination_raises() -> Iterator[None]:
    """A block in which SIGTERM raises `Terminated`, as SIGINT raises KeyboardInterrupt."""

    def raise_it(_number: int, _frame: FrameType | None) -> None:
        _expect_children_to_end()
        raise Terminated

    if not _can_handle_signals():
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that signals wait for: what comes meanwhile is delivered when it ends."""
    if not _can_handle_signals():
        yield
        return
    came: list[int] = []

    def note_it(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGTERM:
            _expect_children_to_end()

    before = {number: signal.signal(number, note_it) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def _expect_children_to_end() -> None:
    """torchrun and schedulers send SIGTERM to a whole group: that the processes that read images end is no error then.

    torch's handler would raise one, wherever this process is. It stays away, since this process is about to end.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, lambda *_: None)


def _can_handle_signals() -> bool:
    """Python delivers signals to the main thread only, and lets no other set handlers."""
    return threading.current_thread() is threading.main_thread()

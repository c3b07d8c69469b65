"""SIGINT and SIGTERM end a run at once, but never in the middle of writing.

An unfinished epoch cannot be resumed exactly, and the last finished one is on the disk. So there is nothing to save
when a signal comes; only what is being written is finished first.
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
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM within a block, as SIGINT raises KeyboardInterrupt."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        _ignore_dead_children()
        raise Terminated

    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Hold signals back within a block and deliver the first of them at its end."""
    if not _in_main_thread():
        yield
        return
    received: list[int] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGTERM:
            _ignore_dead_children()

    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
    if received:
        signal.raise_signal(received[0])


def _ignore_dead_children() -> None:
    # torchrun and schedulers send SIGTERM to a whole group, data workers included; torch's handler for SIGCHLD would
    # raise an error for each.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, lambda *_: None)


def _in_main_thread() -> bool:
    # Python lets no other thread set signal handlers.
    return threading.current_thread() is threading.main_thread()

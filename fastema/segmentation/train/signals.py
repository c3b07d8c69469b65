"""SIGINT and SIGTERM end a run at once, but never in the middle of writing.

An unfinished epoch cannot be resumed exactly, and the last finished one is on the disk. So there is nothing to save
when a signal comes; only what is being written is finished first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastema.errors import Terminated


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM within a block, as SIGINT raises KeyboardInterrupt."""

    def terminate(_: int) -> None:
        raise Terminated

    with _handled(terminate, signal.SIGTERM):
        yield


@contextmanager
def defer_signals() -> Iterator[None]:
    """Hold signals back within a block and deliver the first of them at its end."""
    received: list[int] = []
    with _handled(received.append, signal.SIGINT, signal.SIGTERM):
        yield
    if received:
        signal.raise_signal(received[0])


@contextmanager
def _handled(handle: Callable[[int], None], *numbers: signal.Signals) -> Iterator[None]:
    def handler(number: int, _frame: object) -> None:
        # torchrun and schedulers send SIGTERM to a whole group, data workers included; torch's handler for SIGCHLD
        # would raise an error for each.
        if number == signal.SIGTERM and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, lambda *_: None)
        handle(number)

    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)

"""The output of a command while it runs: lines, and a bar on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# Without a terminal, a plain line this often at most.
_SECONDS_BETWEEN_LINES = 10.0


def say(console: Console, text: str) -> None:
    """Print plain text; wrap it only on a terminal, so that a line stays one in a log."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


class Bar(Protocol):
    """The progress of one task."""

    def advance(self, note: str = "") -> None: ...


@contextmanager
def progress(console: Console, title: str, steps: int) -> Iterator[Bar]:
    """Show a task of `steps` steps while the block runs."""
    if not console.is_terminal:
        yield _Lines(console, title, steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as live:
        yield _Live(live, live.add_task(title, total=steps, note=""))


class _Live:
    def __init__(self, live: Progress, task: TaskID) -> None:
        self._live = live
        self._task = task

    def advance(self, note: str = "") -> None:
        self._live.update(self._task, advance=1, note=note)


class _Lines:
    def __init__(self, console: Console, title: str, steps: int) -> None:
        self._console = console
        self._title = title
        self._steps = steps
        self._done = 0
        self._last = time.monotonic()

    def advance(self, note: str = "") -> None:
        self._done += 1
        if self._done < self._steps and time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            say(self._console, f"  {self._title}: {self._done}/{self._steps} {note}".rstrip())

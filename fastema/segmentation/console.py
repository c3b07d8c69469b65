"""How far an epoch is: a live bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

# A log file wants a sign of life, not a line a step.
_SECONDS_BETWEEN_LINES = 10.0


class Bar(Protocol):
    """Counts the steps of one task."""

    def advance(self, note: str = "") -> None: ...


@contextmanager
def progress(console: Console, title: str, steps: int) -> Iterator[Bar]:
    """Shows a task of `steps` steps while the block runs; the bar goes when it ends."""
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
    with RichProgress(*columns, console=console, transient=True) as live:
        task = live.add_task(title, total=steps, note="")
        yield _Live(live, int(task))


class _Live:
    def __init__(self, live: RichProgress, task: int) -> None:
        self._live = live
        self._task = task

    def advance(self, note: str = "") -> None:
        self._live.update(self._task, advance=1, note=note)  # type: ignore[arg-type]


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
            self._console.print(f"  {self._title}: {self._done}/{self._steps} {note}".rstrip(), highlight=False)

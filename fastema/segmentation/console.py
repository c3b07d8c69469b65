"""The output of a command while it runs: lines, and a bar on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

# Without a terminal, a plain line this often at most.
_SECONDS_BETWEEN_LINES = 10.0

#: Count a step of a task, and show a note beside it.
Advance: TypeAlias = Callable[..., None]


def say(console: Console, text: str) -> None:
    """Print plain text; wrap it only on a terminal, so that a line stays one in a log."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


@contextmanager
def progress(console: Console, title: str, steps: int) -> Iterator[Advance]:
    """Show the progress of a task in a block; call what is yielded after each of its `steps` steps."""
    if console.is_terminal:
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[note]}")
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as live:
            task = live.add_task(title, total=steps, note="")
            yield lambda note="": live.update(task, advance=1, note=note)
        return
    done, last = 0, time.monotonic()

    def advance(note: str = "") -> None:
        nonlocal done, last
        done += 1
        if done < steps and time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(console, f"  {title}: {done}/{steps} {note}".rstrip())

    yield advance

"""Times measured in a run: what the EMA costs, and how long a loop waits for its data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

import torch

from fastema import FastEMA
from fastema.segmentation.devices import CPU, synchronize

T = TypeVar("T")

_SWAPS = 50


@dataclass
class Timers:
    """Wall-clock seconds of each optimizer step, each EMA update, and each swap in and out."""

    step: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    swap: list[float] = field(default_factory=list)
    device: torch.device = CPU  # synchronised before and after what is timed

    @contextmanager
    def timed(self, seconds: list[float]) -> Iterator[None]:
        """Append the time of a block to a list."""
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        seconds.append(time.perf_counter() - start)

    def measure_swaps(self, ema: FastEMA) -> None:
        """Time a number of swaps in and out."""
        for _ in range(_SWAPS):
            with self.timed(self.swap), ema.swapped():
                pass

    def sentence(self) -> str:
        """Describe the medians."""
        if not (self.step and self.update and self.swap):
            return "no optimizer step was made, so there is nothing to measure"
        step, update, swap = median(self.step), median(self.update), median(self.swap)
        return (
            f"ema.update() {_short(update)}, {update / step:.2%} of a training step of {_short(step)}; "
            f"swap in and back {_short(swap)} (medians of this run)"
        )


def timed_items(items: Iterable[T], seconds: list[float]) -> Iterator[T]:
    """Iterate, and append the time spent in each `next()` to a list; the start of workers counts.

    Examples:
        >>> waited = []
        >>> sum(timed_items([1, 2, 3], waited)), sum(waited) < 1
        (6, True)
    """
    started = time.perf_counter()
    iterator = iter(items)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            seconds.append(time.perf_counter() - started)
        yield item
        started = time.perf_counter()


def _short(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

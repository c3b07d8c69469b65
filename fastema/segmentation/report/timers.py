"""What the EMA costs on this machine, measured in the run itself; and what the run waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastema import FastEMA

_SWAPS = 50


@dataclass
class Costs:
    """Wall-clock seconds; an entry for each optimizer step, each update, and each swap in and out.

    Attributes:
        device: waited for before and after what is timed, since a GPU only begins what it is told.
    """

    step: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    swap: list[float] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @contextmanager
    def timed(self, kind: list[float]) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        kind.append(time.perf_counter() - start)

    def measure_swaps(self, ema: FastEMA) -> None:
        """Applies and restores the averaged weights a number of times; the model is as before afterwards."""
        for _ in range(_SWAPS):
            with self.timed(self.swap), ema.swapped():
                pass

    def sentence(self) -> str:
        """The medians, in words."""
        if not (self.step and self.update and self.swap):
            return "no optimizer step was made, so there is nothing to measure"
        step, update, swap = median(self.step), median(self.update), median(self.swap)
        return (
            f"ema.update() {_short(update)}, {update / step:.2%} of a training step of {_short(step)}; "
            f"swap in and back {_short(swap)} (medians of this run)"
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _short(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

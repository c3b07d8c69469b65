"""The contract of a backend: the classes that each has, in C++ (csrc/) or Python, held to the same tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Plan(Protocol):
    """The update of a list of segments under K shadows.

    Built as `Plan(shadows, lives, copies, views, lows=())`:
        shadows: [K][segments], 1-D and contiguous; one dtype for all K of a segment.
        lives: [segments], of the same lengths, on the same device.
        copies: [segments], True where the segment is copied rather than averaged.
        views: shadow tensors that users see: an update raises their version counters.
        lows: [K][segments], the low plane of a float32 average that is kept in two (planes.py; the shadow is the
            high one), or None; empty: all None.
    """

    def update(
        self,
        weights: Sequence[float],
        skip_nonfinite: bool,
        skip: Tensor | None = None,
        device_weights: Tensor | None = None,
    ) -> None:
        """Average or copy every segment: shadow <- shadow + weight * (live - shadow).

        Args:
            weights: [K], 1 - decay each.
            skip_nonfinite: an element whose live value is NaN or infinite keeps its shadow, one whose shadow is takes
                the live value, and both are counted.
            skip: float32 scalar on the plan's device; where it is not 0, nothing happens.
            device_weights: float64 [K] on the plan's device, read instead of `weights` when the update runs.
        """

    def exchange(self, which: int) -> None:
        """Swap the contents of live and of one shadow, bit for bit."""

    def nonfinite_count(self) -> int:
        """Return how many live values, each counted once for all shadows, and shadows were not finite so far."""


class Watch(Protocol):
    """A check that a model still holds what a plan was built for.

    Built as `Watch(dicts, tensors, shadows=(), loose=())`:
        dicts: the _parameters, _buffers and _modules of every module.
        tensors: those that the plan reads.
        shadows: one tensor of every storage that holds averages.
        loose: (dict, key) of values that may be replaced at any time.
    """

    def holds(self) -> bool:
        """Return whether every dict has the same objects, and every tensor and average the same memory."""

    def layout_holds(self) -> bool:
        """Return the same, but for where storages have their memory: a swap exchanges that."""

    def shadows_hold(self) -> bool:
        """Return whether the averages are where they were."""


class StorageExchange(Protocol):
    """The exchange of the memory of storages, which every view of them follows.

    Built as `StorageExchange(lives, others, managed, parts)`:
        lives, others: one tensor of each storage; the storages of a pair change places.
        managed: tensors whose version counters tell autograd of the exchange.
        parts: pairs of 1-D byte tensors whose contents change places instead.
    """

    @property
    def entered(self) -> bool:
        """True between `enter()` and `leave()`."""

    def enter(self, version_step: int) -> None:
        """Exchange, and add `version_step` to the version counters.

        Raises:
            ValueError, RuntimeError: the two of a pair differ in size or device; nothing is changed.
        """

    def untouched(self) -> bool:
        """Return whether every storage has the memory and size that it had when `enter()` was done."""

    def leave_untouched(self) -> bool:
        """Do `leave([])` if `untouched()`, and return whether that was so."""

    def leave(self, staying: Sequence[int]) -> None:
        """Exchange back, all but the pairs `staying` (by index), and put the version counters back."""

"""The contract of a backend: the classes that each has, in C++ (csrc/) or Python, held to the same tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Segment(NamedTuple):
    """A run of elements of a live tensor, and K averages of it; all 1-D, contiguous and of one length."""

    shadows: Sequence[Tensor]  # [K], of one dtype; of averages in two planes (fastema/memory/planes.py) the high ones
    live: Tensor
    copy: bool  # it is copied rather than averaged
    lows: Sequence[Tensor] = ()  # [K], the low planes; empty: there are none


class UpdateArgs(NamedTuple):
    """The arguments of an update."""

    weights: Sequence[float]  # [K], 1 - decay each
    #: An element whose live value is NaN or infinite keeps its shadow, one whose shadow is takes the live value, and
    #: both are counted.
    skip_nonfinite: bool
    skip: Tensor | None = None  # float32 scalar on the plan's device; where it is not 0, nothing happens
    device_weights: Tensor | None = None  # float64 [K] there, read instead of `weights` when the update runs


class Plan(Protocol):
    """The update of segments, each under K shadows, on one device.

    Built as `Plan(segments, views)`; `views` are shadow tensors that users see: an update raises their version
    counters. Without segments an update does no more than that.
    """

    def update(self, args: UpdateArgs) -> None:
        """Average or copy every segment: shadow <- shadow + weight * (live - shadow)."""

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

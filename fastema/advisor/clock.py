"""When the values of a history were measured, in the words of its log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Literal

Unit = Literal["epoch", "step", "evaluation"]


@dataclass(frozen=True)
class Clock:
    """Labels of the evaluations.

    Attributes:
        labels: an epoch, step or number for each evaluation, never falling.
        unit: what the labels count.
        zero_based: whether the first epoch has the number 0.
    """

    labels: Sequence[float]
    unit: Unit = "epoch"
    zero_based: bool = False

    @classmethod
    def counting(cls, count: int) -> Clock:
        """Return the clock of one evaluation an epoch, from epoch 1 on."""
        return cls(range(1, count + 1))

    def at(self, index: int) -> str:
        """Return when an evaluation was, as "epoch 12"."""
        label = self.labels[index]
        return f"{self.unit} {label:,.0f}" if label == round(label) else f"{self.unit} {label:.4g}"

    @cached_property
    def gap(self) -> float:
        """Labels from one evaluation to the next."""
        gaps = [b - a for a, b in pairwise(self.labels) if b > a]
        if not gaps:
            return 1.0
        return (self.labels[-1] - self.labels[0] + 1) / len(self.labels) if self._several else median(gaps)

    @cached_property
    def _several(self) -> bool:
        """Return whether an epoch, counted in whole numbers, has several evaluations."""
        return sum(b > a for a, b in pairwise(self.labels)) < 0.7 * (len(self.labels) - 1)

    @property
    def each(self) -> str:
        """The distance of two evaluations, as "an epoch"."""
        return "an epoch" if self.unit == "epoch" and 0.99 < self.gap < 1.01 else "an evaluation"

    def done(self, index: int = -1) -> float:
        """Return how many epochs were over at an evaluation."""
        return self.labels[index] + self.zero_based

    def span(self) -> str:
        """Return how long the history is, in words."""
        count = len(self.labels)
        if count == 1:
            return "one evaluation" if self.unit == "evaluation" else f"one evaluation, in {self.at(0)}"
        first, last = (self.at(i).removeprefix(f"{self.unit} ") for i in (0, -1))
        if self.unit != "epoch":
            return f"{count:,} evaluations" + (f", steps {first} to {last}" if self.unit == "step" else "")
        epochs = round(self.labels[-1] - self.labels[0] + (1 if self._several else self.gap))
        if self.labels[0] > max(1.0, self.gap):
            return f"{count:,} evaluations, epochs {first} to {last}"
        if epochs == count:
            return f"{count:,} epochs"
        return f"{count:,} evaluations in {max(1, epochs):,} {'epochs' if epochs > 1 else 'epoch'}"

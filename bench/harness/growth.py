"""Growth of an update: a line over tensors and a line over parameters, fitted to the records of `bench.scale`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.harness.console import number
from bench.harness.records import Record

#: From this many parameters on, one tensor is larger than a cache: the second line is fitted to those.
FEWEST_PARAMETERS = 10**7


@dataclass(frozen=True)
class Line:
    """`fixed + slope * x`; `worst`: largest relative error of a point."""

    fixed: float
    slope: float
    worst: float

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x


def line(points: Sequence[tuple[float, float]]) -> Line:
    """Fit a line with the least sum of squared relative errors, because the points span decades.

    A negative part becomes 0, because both parts are times.

    Args:
        points: at least two (x, y) with y > 0.

    Raises:
        ValueError: fewer than two different x, or a y that is not positive.

    Example:
        >>> line([(1, 12.0), (10, 30.0), (100, 210.0)])
        Line(fixed=10.0, slope=2.0, worst=0.0)
    """
    if len({x for x, _ in points}) < 2 or min(y for _, y in points) <= 0:
        raise ValueError(f"a line needs two different x, and y > 0, got {list(points)}")
    # Least squares of fixed * a + slope * b = 1 with a = 1 / y, b = x / y.
    rows = [(1 / y, x / y) for x, y in points]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    fixed, slope = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if fixed < 0:
        fixed, slope = 0.0, b / bb
    elif slope < 0:
        fixed, slope = a / aa, 0.0
    worst = max(abs((fixed + slope * x) / y - 1) for x, y in points)
    return Line(round(fixed, 9), round(slope, 12), round(worst, 6))


@dataclass(frozen=True)
class Growth:
    """The two lines of one implementation.

    Args:
        over_tensors: microseconds over tensors; over_parameters: microseconds over parameters.
        bend: elements per tensor at which a tensor costs as much as its bytes; None where bytes cost nothing.
    """

    impl: str
    over_tensors: Line
    over_parameters: Line

    @property
    def us_per_tensor(self) -> float:
        return self.over_tensors.slope

    @property
    def ns_per_parameter(self) -> float:
        return self.over_parameters.slope * 1e3

    @property
    def bend(self) -> float | None:
        return self.us_per_tensor / self.over_parameters.slope if self.over_parameters.slope else None


def growth(records: Sequence[Record]) -> list[Growth]:
    """Return the lines of every implementation with enough points, the lowest cost per tensor first."""
    small: dict[str, list[tuple[float, float]]] = {}
    large: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.median_us is None:
            continue
        if record.bench == "scale: tensors" and record.tensors >= 10:
            small.setdefault(record.impl, []).append((record.tensors, record.median_us))
        elif record.bench == "scale: parameters" and record.params >= FEWEST_PARAMETERS:
            large.setdefault(record.impl, []).append((record.params, record.median_us))
    found = [
        Growth(impl, line(small[impl]), line(large[impl]))
        for impl in small
        if len(small[impl]) >= 2 and len(large.get(impl, [])) >= 2
    ]
    return sorted(found, key=lambda one: one.us_per_tensor)


def growth_rows(found: Sequence[Growth]) -> list[list[str]]:
    """Return the cells of a table."""
    return [
        [
            one.impl,
            number(one.us_per_tensor),
            f"{one.over_tensors.worst:.0%}",
            number(one.ns_per_parameter),
            f"{one.over_parameters.worst:.0%}",
            "" if one.bend is None else number(one.bend),
        ]
        for one in found
    ]


GROWTH_COLUMNS = ("", "us a tensor", "off by at most", "ns a parameter", "off by at most", "bends at elements a tensor")

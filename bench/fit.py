"""A straight line through timings, and where two of them meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """`fixed + slope * x`; `worst`: by which share the point farthest from it is off."""

    fixed: float
    slope: float
    worst: float

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x


def line(points: Sequence[tuple[float, float]]) -> Line:
    """The line with the least sum of squared relative errors: the points span decades, and all count alike.

    Neither part is negative, since both are times; where the best line had a negative one, that is 0.

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

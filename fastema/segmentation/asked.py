"""What the user says about masks: --foreground and --ignore-index."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """What the user says about masks: --foreground and --ignore-index; None where nothing is said.

    Attributes:
        foreground: ranges of numbers, (first, last).
        colours: packed, 0xRRGGBB.
        alpha: whether the foreground is what is not transparent.
        ignored: numbers or packed colours.
    """

    foreground: tuple[tuple[float, float], ...] = ()
    colours: tuple[int, ...] = ()
    alpha: bool = False
    ignored: tuple[int, ...] | None = None

    @property
    def says_foreground(self) -> bool:
        return bool(self.foreground or self.colours or self.alpha)


NOTHING_ASKED = Asked()

_COLOUR = re.compile(r"#?([0-9a-fA-F]{6})")
_NUMBERS = re.compile(r"(-?[0-9.]+)(?:-([0-9.]+))?")


def parse_asked(foreground: str | None, ignored: str | None) -> Asked:
    """Read --foreground and --ignore-index.

    Raises:
        ValueError: which one, and what it may be.
    """
    ranges, colours, alpha = [], [], False
    for part in (foreground or "").split(",") if foreground is not None else ():
        text = part.strip()
        if text.lower() == "alpha":
            alpha = True
        elif match := _COLOUR.fullmatch(text):
            colours.append(int(match[1], 16))
        elif match := _NUMBERS.fullmatch(text):
            ranges.append((float(match[1]), float(match[2] or match[1])))
        else:
            raise ValueError(
                f"--foreground must be numbers (1,15 or 1-20), colours (ff0000,00ff00) or alpha, got {foreground!r}"
            )
    if alpha and (ranges or colours):
        raise ValueError(f"--foreground alpha goes with nothing else, got {foreground!r}")
    if ignored is None:
        return Asked(tuple(ranges), tuple(colours), alpha)
    values = []
    for part in ignored.split(",") if ignored.strip().lower() != "none" else ():
        text = part.strip()
        if match := _COLOUR.fullmatch(text):
            values.append(int(match[1], 16))
        elif text.lstrip("-").isdigit():
            values.append(int(text))
        else:
            raise ValueError(f"--ignore-index must be numbers (255), colours (e0e0c0) or none, got {ignored!r}")
    return Asked(tuple(ranges), tuple(colours), alpha, tuple(values))

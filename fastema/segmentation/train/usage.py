"""How the experts of the mixtures were used in an epoch, in a line; and which of them idle."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

# Chosen for fewer images than this share, on every level, an expert learns next to nothing.
_IDLE = 0.01


def usage_line(names: Sequence[str], usage: Sequence[Sequence[float]]) -> str:
    """Share of the images that each expert was chosen for, the most chosen first.

    Args:
        names: of the experts.
        usage: [levels][experts].
    """
    means = sorted(((fmean(shares), name) for name, shares in zip(names, zip(*usage, strict=True), strict=True)))
    listed = ", ".join(f"{name} {mean:.0%}" for mean, name in reversed(means))
    return f"  Experts, share of images (mean of {len(usage)} levels): {listed}"


def idle_experts(names: Sequence[str], usage: Sequence[Sequence[float]]) -> list[str]:
    """The experts that hardly any image chose on any level."""
    return [name for name, shares in zip(names, zip(*usage, strict=True), strict=True) if max(shares) < _IDLE]

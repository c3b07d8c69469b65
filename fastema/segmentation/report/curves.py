"""Draw `curves.png`: loss, IoU, learning rate and the averages' windows over the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from fastema.advisor import window
from fastema.segmentation.report.history import EpochRecord

# The palette of Okabe and Ito, distinguishable with colour blindness.
_BASE, _EMA, _OTHERS, _PLAIN = "#999999", "#0072B2", ("#D55E00", "#009E73", "#CC79A7", "#E69F00"), "#222222"

_Line = tuple[str, str, list[float]]  # name, colour, a value per epoch (NaN for none)


def write_curves(path: Path, history: Sequence[EpochRecord]) -> None:
    """Draw a run by epoch, with a dashed line where the second stage begins.

    Args:
        path: the PNG to write.
        history: not empty, in order.
    """
    epochs = [record.epoch for record in history]
    # Not pyplot: no global state, and no display needed.
    figure = Figure(figsize=(10, 6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss, iou, rate, reach = figure.subplots(2, 2, sharex=True).flat
    _draw(loss, "training loss", epochs, [("loss", _PLAIN, [record.loss for record in history])])
    _draw(iou, "validation IoU", epochs, _ious(history))
    _draw_noise(iou, history)
    _draw(rate, "learning rate", epochs, [("learning rate", _PLAIN, [record.lr for record in history])])
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    windows = _windows(history)
    _draw(reach, "the EMA's window, 1 / (1 - decay), in updates", epochs, windows)
    _scale_windows(reach, [value for _, _, values in windows for value in values if not math.isnan(value)])
    for axes in (rate, reach):
        axes.set_xlabel("epoch")
    _mark_stages((loss, iou, rate, reach), history)
    canvas.print_png(path)


def _ious(history: Sequence[EpochRecord]) -> list[_Line]:
    lines = [("base", _BASE, [record.iou for record in history])]
    if any(record.ema_iou is not None for record in history):
        lines.append(("EMA", _EMA, [math.nan if record.ema_iou is None else record.ema_iou for record in history]))
    for name, colour in _others(history):
        lines.append((f"EMA {name}", colour, [record.other_ema_ious.get(name, math.nan) for record in history]))
    return lines


def _windows(history: Sequence[EpochRecord]) -> list[_Line]:
    lines = []
    if any(record.ema_decay is not None for record in history):
        lines.append(("EMA", _EMA, [_window(record.ema_decay) for record in history]))
    for name, colour in _others(history):
        lines.append((f"EMA {name}", colour, [_window(record.other_ema_decays.get(name)) for record in history]))
    return lines


def _window(decay: float | None) -> float:
    return math.nan if decay is None or decay >= 1 else window(decay)  # infinite windows are not drawn


def _others(history: Sequence[EpochRecord]) -> list[tuple[str, str]]:
    names = dict.fromkeys(name for record in history for name in record.other_ema_ious)
    return [(name, _OTHERS[i % len(_OTHERS)]) for i, name in enumerate(names)]


def _draw(axes: Axes, title: str, epochs: Sequence[int], lines: Sequence[_Line]) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    # A single epoch is only visible as a point; many points would hide the line.
    marker = "." if len(epochs) <= 40 else ""
    for name, colour, values in lines:
        above = 4 if colour == _EMA else 3
        axes.plot(epochs, values, color=colour, marker=marker, linewidth=1.4, label=name, zorder=above)
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False)
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_noise(axes: Axes, history: Sequence[EpochRecord]) -> None:
    """Shade two standard errors of the difference around the EMA: a base inside it differs by noise."""
    noisy = [(each.epoch, each.ema_iou, 2 * each.ema_error) for each in history if each.ema_iou and each.ema_error]
    if noisy:
        epochs, ious, errors = zip(*noisy, strict=True)
        low, high = ([iou + sign * error for iou, error in zip(ious, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(
            epochs, low, high, color=_EMA, alpha=0.15, linewidth=0, label="EMA ± noise (2 standard errors)"
        )
        axes.legend(fontsize=8, frameon=False)


def _scale_windows(axes: Axes, values: Sequence[float]) -> None:
    if not values:
        axes.text(0.5, 0.5, "no EMA", transform=axes.transAxes, ha="center", color=_BASE)
        axes.set_yticks([])
        return
    if max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.1 * max(values))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _mark_stages(axes: Sequence[Axes], history: Sequence[EpochRecord]) -> None:
    for before, after in pairwise(history):
        if before.stage != after.stage:
            between = (before.epoch + after.epoch) / 2
            for one in axes:
                one.axvline(between, color=_PLAIN, linestyle="--", linewidth=0.8, alpha=0.6)
            axes[0].annotate(
                f"stage {after.stage}",
                (between, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -10),
                textcoords="offset points",
                fontsize=8,
            )

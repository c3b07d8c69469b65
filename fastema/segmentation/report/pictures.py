"""Draw `curves.png`, the figures over the epochs, and `predictions.png`, a few validation images with predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure  # not pyplot: no global state, and no display needed
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from fastema.advisor import window
from fastema.segmentation.eval.metrics import iou
from fastema.segmentation.report.history import EpochRecord

# The palette of Okabe and Ito, distinguishable with colour blindness.
BASE, EMA, OTHERS, PLAIN = "#999999", "#0072B2", ("#D55E00", "#009E73", "#CC79A7", "#E69F00"), "#222222"

_Line = tuple[str, str, np.ndarray]  # name, colour, a value per epoch (NaN for none)


def write_curves(path: Path, history: Sequence[EpochRecord], title: str = "") -> None:
    """Draw a run by epoch, with a dashed line where the second stage begins."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    canvas = FigureCanvasAgg(figure)
    loss, ious, rate, windows = axes = figure.subplots(2, 2, sharex=True).flatten()
    _draw(loss, history, "training loss", [_line("loss", PLAIN, [each.loss for each in history])])
    base = _line("base", BASE, [each.iou for each in history])
    _draw(ious, history, "validation IoU", [base, *_averages(history, lambda e: e.ema_iou, lambda e: e.other_ema_ious)])
    _draw_noise(ious, history)
    _draw(rate, history, "learning rate", [_line("learning rate", PLAIN, [each.lr for each in history])])
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    decays = _averages(history, lambda e: e.ema_decay, lambda e: e.other_ema_decays)
    # An infinite window is not drawn.
    reach = [
        _line(name, colour, [window(decay) if decay < 1 else None for decay in values])
        for name, colour, values in decays
    ]
    _draw(windows, history, "the EMA's window, 1 / (1 - decay), in updates", reach)
    _scale_windows(windows, [value for _, _, values in reach for value in values[~np.isnan(values)]])
    for each in (rate, windows):
        each.set_xlabel("epoch")
    _mark_stages(axes, history)
    canvas.print_png(path)


def _line(name: str, colour: str, values: Sequence[float | None]) -> _Line:
    return name, colour, np.array(values, float)


def _averages(
    history: Sequence[EpochRecord],
    main: Callable[[EpochRecord], float | None],
    others: Callable[[EpochRecord], Mapping[str, float]],
) -> list[_Line]:
    names = dict.fromkeys(name for record in history for name in record.other_ema_ious)
    lines = [_line("EMA", EMA, [main(each) for each in history])]
    for i, name in enumerate(names):
        lines.append(_line(f"EMA {name}", OTHERS[i % len(OTHERS)], [others(each).get(name) for each in history]))
    return lines if any(record.ema_iou is not None for record in history) else []


def _draw(axes: Axes, history: Sequence[EpochRecord], title: str, lines: Sequence[_Line]) -> None:
    epochs = [record.epoch for record in history]
    axes.set_title(title, fontsize=10, loc="left")
    # A single epoch is only visible as a point; many points would hide the line.
    marker = "." if len(epochs) <= 40 else ""
    for name, colour, values in lines:
        above = 4 if colour == EMA else 3
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
        epochs, ious, errors = np.array(noisy).T
        label = "EMA ± noise (2 standard errors)"
        axes.fill_between(epochs, ious - errors, ious + errors, color=EMA, alpha=0.15, linewidth=0, label=label)
        axes.legend(fontsize=8, frameon=False)


def _scale_windows(axes: Axes, values: Sequence[float]) -> None:
    if not values:
        axes.text(0.5, 0.5, "no EMA", transform=axes.transAxes, ha="center", color=BASE)
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
                one.axvline(between, color=PLAIN, linestyle="--", linewidth=0.8, alpha=0.6)
            axes[0].annotate(
                f"stage {after.stage}",
                (between, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -10),
                textcoords="offset points",
                fontsize=8,
            )


@dataclass(frozen=True)
class Example:
    """One row of the predictions."""

    name: str  # title of the image
    image: torch.Tensor  # float [3, S, S] in [0, 1]
    truth: torch.Tensor  # bool [H, W]
    predictions: dict[str, torch.Tensor]  # bool [H, W] by column title
    known: torch.Tensor | None = None  # bool [H, W], False where nothing counts


def write_predictions(path: Path, examples: Sequence[Example]) -> None:
    """Draw a row for each example: image, truth, every prediction with its IoU, and where the first two differ."""
    several = len(examples[0].predictions) > 1
    columns = 2 + len(examples[0].predictions) + several
    figure = Figure(figsize=(2.2 * columns, 2.3 * len(examples)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for row, axes in zip(examples, figure.subplots(len(examples), columns, squeeze=False), strict=True):
        height, width = row.truth.shape
        axes[0].imshow(row.image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
        axes[0].set_title(row.name if len(row.name) <= 40 else f"…{row.name[-39:]}", fontsize=7)
        titled = {f"{name}  IoU {iou(each, row.truth, row.known):.3f}": each for name, each in row.predictions.items()}
        for axis, (title, mask) in zip(axes[1:], {"truth": row.truth, **titled}.items(), strict=False):
            shown = mask.numpy().astype(float)
            if row.known is not None:
                shown[~row.known.numpy()] = 0.5
            axis.imshow(shown, cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
        if several:
            axes[-1].imshow(_differences(row))
            axes[-1].set_title("only EMA right: blue\nonly base right: orange", fontsize=7)
        for axis in axes:
            axis.set_axis_off()
    canvas.print_png(path)


def _differences(row: Example) -> np.ndarray:
    """Return a dimmed truth, [H, W, 3], with the pixels that only one of base and EMA has right in colour."""
    truth = row.truth.numpy()
    base, ema = (each.numpy() == truth for each in list(row.predictions.values())[:2])
    known = np.ones_like(truth) if row.known is None else row.known.numpy()
    picture = np.repeat(np.where(truth, 0.85, 0.65)[..., None], 3, axis=2)
    picture[known & ema & ~base] = to_rgb(EMA)
    picture[known & base & ~ema] = to_rgb(OTHERS[0])
    return picture

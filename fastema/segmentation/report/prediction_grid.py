"""Draw `predictions.png`: a few validation images with truth and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastema.segmentation.eval.metrics import iou


@dataclass(frozen=True)
class Example:
    """One row of the grid.

    Attributes:
        name: title of the image.
        image: float [3, S, S] in [0, 1].
        truth: bool [H, W].
        predictions: bool [H, W] by column title.
    """

    name: str
    image: torch.Tensor
    truth: torch.Tensor
    predictions: dict[str, torch.Tensor]


def write_predictions(path: Path, examples: Sequence[Example]) -> None:
    """Draw a row for each example: image, truth, and every prediction with its IoU."""
    columns = 2 + len(examples[0].predictions)
    # Not pyplot: no global state, and no display needed.
    figure = Figure(figsize=(2.2 * columns, 2.3 * len(examples)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for row, axes in zip(examples, figure.subplots(len(examples), columns, squeeze=False), strict=True):
        height, width = row.truth.shape
        axes[0].imshow(row.image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
        axes[0].set_title(row.name if len(row.name) <= 40 else f"…{row.name[-39:]}", fontsize=7)
        axes[1].imshow(row.truth.numpy(), cmap="gray", vmin=0, vmax=1)
        axes[1].set_title("truth", fontsize=9)
        for axis, (name, prediction) in zip(axes[2:], row.predictions.items(), strict=True):
            axis.imshow(prediction.numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{name}  IoU {iou(prediction, row.truth):.3f}", fontsize=9)
        for axis in axes:
            axis.set_axis_off()
    canvas.print_png(path)

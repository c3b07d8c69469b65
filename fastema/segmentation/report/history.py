"""The figures of each epoch: the line on the screen, the row in `history.csv`, plain values in every checkpoint.

The history in the checkpoint decides. The file gets a row an epoch, and is rewritten when it differs from the history,
as after a resume from an earlier epoch.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EpochRecord:
    """The figures of one epoch, as plain values: `EpochRecord(**asdict(record)) == record`.

    Attributes:
        epoch: from 1.
        loss: mean over the training images.
        iou: mean over the validation images, with the trained weights.
        ema_iou: with the averaged weights; None without an EMA.
        ema_error: standard error of `ema_iou - iou` over the images; None without an EMA, or with a single image.
        lr: learning rate of the decoder in the last step.
        ema_decay: of the last update; None without an EMA.
        seconds: of the epoch, validation included.
        stage: 1 with a frozen backbone, else 2.
        data_wait: share of the training time in [0, 1] spent waiting for batches.
        other_ema_ious: of further averages, by name (their final decay, such as `0.99`).
        other_ema_decays: by the same names.
        expert_usage: [levels][experts], share of the images that chose each expert; () without experts.
    """

    epoch: int
    loss: float
    iou: float
    ema_iou: float | None
    lr: float
    ema_decay: float | None
    seconds: float
    stage: int = 2
    data_wait: float = 0.0
    other_ema_ious: dict[str, float] = field(default_factory=dict)
    other_ema_decays: dict[str, float] = field(default_factory=dict)
    expert_usage: Sequence[Sequence[float]] = ()
    ema_error: float | None = None

    @property
    def average_ious(self) -> list[float]:
        """The IoU of every average, the main one first."""
        return [] if self.ema_iou is None else [self.ema_iou, *self.other_ema_ious.values()]

    def line(self, main: str = "main") -> str:
        """Format the epoch for the screen; `main` names the first of several averages."""
        ious = f"IoU: {self.iou:.4f}"
        if self.ema_iou is not None:
            ious += f" (base) | EMA IoU: {self.ema_iou:.4f}"
        if self.other_ema_ious:
            ious += f" ({main})" + "".join(f", {iou:.4f} ({name})" for name, iou in self.other_ema_ious.items())
        return f"Epoch {self.epoch}: Loss: {self.loss:.4f} | {ious} | LR: {self.lr:.6f}"

    def row(self) -> dict[str, Any]:
        """Return the columns of `history.csv`; None is an empty cell, levels of experts are separated by `;`."""
        return {
            "epoch": self.epoch,
            "loss": self.loss,
            "iou": self.iou,
            "ema_iou": self.ema_iou,
            **{f"ema_iou_{name}": iou for name, iou in self.other_ema_ious.items()},
            "lr": self.lr,
            "ema_decay": self.ema_decay,
            **{f"ema_decay_{name}": decay for name, decay in self.other_ema_decays.items()},
            "ema_error": self.ema_error,
            "seconds": round(self.seconds, 3),
            "stage": self.stage,
            "data_wait": round(self.data_wait, 4),
            "expert_usage": ";".join(" ".join(f"{share:.3f}" for share in level) for level in self.expert_usage),
        }


def append_csv(path: Path, records: Sequence[EpochRecord]) -> None:
    """Append the last record's row; rewrite the file if it does not hold exactly the records before it.

    A kill leaves the rows so far, at worst with a last one cut off, which the next call repairs.

    Args:
        path: `history.csv`; it need not exist.
        records: of the whole run, not empty.
    """
    before, now = _text(records[:-1]), _text(records)
    # An average that starts late adds columns, which changes the header.
    if not now.startswith(before) or _content(path) != before:
        write_csv(path, records)
        return
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(now[len(before) :])


def write_csv(path: Path, records: Sequence[EpochRecord]) -> None:
    """Write the whole history, replacing the file atomically."""
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(_text(records))
    os.replace(temporary, path)


def _text(records: Sequence[EpochRecord]) -> str:
    rows = [record.row() for record in records]
    # In the longest row's order, so that late averages have their columns beside the others'.
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _content(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None

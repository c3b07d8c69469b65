"""The figures of each epoch: plain values in every checkpoint, a line, a row in `history.csv`, a log for TensorBoard.

The history in the checkpoint decides. The file gets a row an epoch, and is rewritten when it differs from the history,
as after a resume from an earlier epoch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastema.core.writing import replacing


@dataclass(frozen=True)
class EpochRecord:
    """The figures of one epoch, as plain values: `EpochRecord(**asdict(record)) == record`."""

    epoch: int  # from 1
    loss: float  # mean over the training images
    iou: float  # mean over the validation images, with the trained weights
    ema_iou: float | None  # with the averaged weights; None without an EMA
    lr: float  # learning rate of the decoder in the last step
    ema_decay: float | None  # of the last update; None without an EMA
    seconds: float  # validation included
    stage: int = 2  # 1 with a frozen backbone
    data_wait: float = 0.0  # share of the training time in [0, 1] spent waiting for batches
    other_ema_ious: dict[str, float] = field(default_factory=dict)  # by name: their final decay, such as `0.99`
    other_ema_decays: dict[str, float] = field(default_factory=dict)  # by the same names
    expert_usage: Sequence[Sequence[float]] = ()  # [levels][experts], share of the images that chose each
    ema_error: float | None = None  # standard error of `ema_iou - iou` over the images; None for a single image

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

    def scalars(self) -> dict[str, float]:
        """Return the figures by their tags in TensorBoard."""
        scalars = {
            "loss": self.loss,
            "iou/base": self.iou,
            "iou/ema": self.ema_iou,
            "ema/decay": self.ema_decay,
            **{f"iou/ema_{name}": iou for name, iou in self.other_ema_ious.items()},
            **{f"ema/decay_{name}": decay for name, decay in self.other_ema_decays.items()},
            "learning_rate": self.lr,
            "time/seconds": self.seconds,
            "time/data_wait": self.data_wait,
            "stage": self.stage,
        }
        for level, shares in enumerate(self.expert_usage):
            scalars |= {f"experts/level{level}_expert{expert}": share for expert, share in enumerate(shares)}
        return {tag: value for tag, value in scalars.items() if value is not None}


def append_csv(path: Path, records: Sequence[EpochRecord]) -> None:
    """Append the last record's row; rewrite the file if it does not hold exactly the records before it.

    A kill leaves the rows so far, at worst with a last one cut off, which the next call repairs.
    """
    before, now = _text(records[:-1]), _text(records)
    # An average that starts late adds columns, which changes the header.
    if not now.startswith(before) or not path.exists() or path.read_bytes() != before:
        write_csv(path, records)
        return
    with path.open("ab") as file:
        file.write(now[len(before) :])


def write_csv(path: Path, records: Sequence[EpochRecord]) -> None:
    """Write the whole history, replacing the file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(_text(records))


def _text(records: Sequence[EpochRecord]) -> bytes:
    rows = [record.row() for record in records]
    # In the longest row's order, so that late averages have their columns beside the others'.
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


class TensorBoardLog:
    """Log the epochs' figures for TensorBoard, where it is installed.

    What was logged for `first_epoch` and later, before a resume, is hidden. Without `writes`, there is no log. `note`
    says where it is, or that there is none.
    """

    def __init__(self, folder: Path, first_epoch: int = 1, writes: bool = True) -> None:
        self._writer: Any = None
        self.note = ""
        if not writes:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.note = "TensorBoard: not installed, so there is no log for it; history.csv has the same figures"
            return
        self._writer = SummaryWriter(str(folder), purge_step=first_epoch)
        self.note = f"TensorBoard: tensorboard --logdir {folder}"

    def record(self, record: EpochRecord) -> None:
        """Write an epoch's figures to disk."""
        if self._writer is None:
            return
        for tag, value in record.scalars().items():
            self._writer.add_scalar(tag, value, record.epoch)
        self._writer.flush()

    def close(self) -> None:
        """End the writer's thread."""
        if self._writer is not None:
            self._writer.close()

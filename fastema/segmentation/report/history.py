"""What an epoch brought: the line on the screen, the row in `history.csv`, and plain values in every checkpoint.

The run's history, which a checkpoint carries, is the truth, and the file follows it: it gets a row an epoch, and is
written anew whenever it does not say what the history says, as after a resume from an earlier epoch.
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
    """One epoch. Plain values only, so that `asdict(record)` can be stored and `EpochRecord(**stored)` read again.

    Attributes:
        epoch: from 1.
        loss: mean over the epoch's training images.
        iou: mean over the validation images, with the trained weights.
        ema_iou: the same with the averaged weights; None without an EMA.
        lr: learning rate of the last step, of the parameters that train fastest.
        ema_decay: the decay in effect after the last update; None without an EMA.
        seconds: of the whole epoch, validation included.
        stage: 1 while the backbone is frozen, 2 when all is trained.
        data_wait: share of the training time in [0, 1] that was spent waiting for batches.
        other_ema_ious: further averages' IoU, by what to call them (the decay they aim at, such as `0.99`).
        other_ema_decays: their decays in effect, by the same names.
        expert_usage: [levels][experts], share of the images that each expert was chosen for; () without experts.
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

    def line(self, main: str = "main") -> str:
        """The epoch as people read it; `main` is what to call the first of several averages."""
        ious = f"IoU: {self.iou:.4f}"
        if self.ema_iou is not None:
            ious += f" (base) | EMA IoU: {self.ema_iou:.4f}"
        if self.other_ema_ious:
            ious += f" ({main})" + "".join(f", {iou:.4f} ({name})" for name, iou in self.other_ema_ious.items())
        return f"Epoch {self.epoch}: Loss: {self.loss:.4f} | {ious} | LR: {self.lr:.6f}"

    def row(self) -> dict[str, Any]:
        """The record by column of `history.csv`; None is an empty cell, levels of experts are separated by `;`."""
        return {
            "epoch": self.epoch,
            "loss": self.loss,
            "iou": self.iou,
            "ema_iou": self.ema_iou,
            **{f"ema_iou_{name}": iou for name, iou in self.other_ema_ious.items()},
            "lr": self.lr,
            "ema_decay": self.ema_decay,
            **{f"ema_decay_{name}": decay for name, decay in self.other_ema_decays.items()},
            "seconds": round(self.seconds, 3),
            "stage": self.stage,
            "data_wait": round(self.data_wait, 4),
            "expert_usage": ";".join(" ".join(f"{share:.3f}" for share in level) for level in self.expert_usage),
        }


def append_csv(path: Path, records: Sequence[EpochRecord]) -> None:
    """Appends the last record's row; writes the whole file if it does not hold exactly the records before it.

    A kill at any moment leaves the rows so far, at worst with a last one that is cut off, which the next call mends.

    Args:
        path: `history.csv`; it need not exist.
        records: the whole run, the new epoch last; not empty.
    """
    before, now = _text(records[:-1]), _text(records)
    # A new column, such as that of an average that starts late, makes a new heading, so `now` does not go on `before`.
    if not now.startswith(before) or _content(path) != before:
        write_csv(path, records)
        return
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(now[len(before) :])


def write_csv(path: Path, records: Sequence[EpochRecord]) -> None:
    """Writes the whole history, replacing the file in one go: for a resume, so that no later epoch's row stays."""
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(_text(records))
    os.replace(temporary, path)


def _text(records: Sequence[EpochRecord]) -> str:
    rows = [record.row() for record in records]
    # The fullest row's order for all: averages that started late have their columns beside the others' all the same.
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

"""What an epoch brought: the line on the screen, and the row in `history.csv`."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EpochRecord:
    """One epoch; `ema_iou` and `ema_decay` are None without an EMA."""

    epoch: int
    loss: float
    iou: float
    ema_iou: float | None
    lr: float
    ema_decay: float | None
    seconds: float

    def line(self) -> str:
        """The epoch as people read it."""
        ious = f"IoU: {self.iou:.4f}"
        if self.ema_iou is not None:
            ious += f" (base) | EMA IoU: {self.ema_iou:.4f}"
        return f"Epoch {self.epoch}: Loss: {self.loss:.4f} | {ious} | LR: {self.lr:.6f}"


def write_csv(path: Path, records: Sequence[EpochRecord]) -> None:
    """Writes the whole history, replacing the file in one go: after a resume no row is there twice."""
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(EpochRecord))
        writer.writerows(["" if v is None else v for v in dataclasses.astuple(record)] for record in records)
    os.replace(temporary, path)

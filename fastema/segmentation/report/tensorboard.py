"""Log the epochs' figures for TensorBoard, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastema.segmentation.report.history import EpochRecord


class TensorBoardLog:
    """Write scalars to `folder`, with the epoch as the step.

    A resumed run continues in the same folder; what was logged for `first_epoch` and later is hidden.

    Args:
        folder: for the event files; made when needed.
        first_epoch: the first to be recorded.
        writes: False in processes that write nothing.

    Attributes:
        note: where the log is, or that there is none.
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
        for tag, value in _scalars(record).items():
            self._writer.add_scalar(tag, value, record.epoch)
        self._writer.flush()

    def close(self) -> None:
        """End the writer's thread."""
        if self._writer is not None:
            self._writer.close()


def _scalars(record: EpochRecord) -> dict[str, float]:
    optional = {"iou/ema": record.ema_iou, "ema/decay": record.ema_decay}
    scalars = {
        "loss": record.loss,
        "iou/base": record.iou,
        **{tag: value for tag, value in optional.items() if value is not None},
        **{f"iou/ema_{name}": iou for name, iou in record.other_ema_ious.items()},
        **{f"ema/decay_{name}": decay for name, decay in record.other_ema_decays.items()},
        "learning_rate": record.lr,
        "time/seconds": record.seconds,
        "time/data_wait": record.data_wait,
        "stage": record.stage,
    }
    for level, shares in enumerate(record.expert_usage):
        scalars |= {f"experts/level{level}_expert{expert}": share for expert, share in enumerate(shares)}
    return scalars

"""What a training run is told: one field a flag, checked before anything is read or built."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastema.segmentation.errors import UserError

# The coarsest level of the usual pyramids has a 32nd of the size: below this it would be a single pixel.
SMALLEST_IMAGE = 64


@dataclass(frozen=True)
class TrainOptions:
    """The options of `fastema train`; the defaults are the command's."""

    dataset_path: str
    checkpoint_dir: Path
    backbone: str = "tf_efficientnet_lite0"
    pretrained: bool = True
    img_size: int = 384
    batch_size: int = 8
    epochs: int = 30
    lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 1e-4
    warmup_epochs: int = 0
    accumulation_steps: int = 1
    clip_grad: float = 1.0
    use_ema: bool = False
    ema_decay: float = 0.999
    ema_decay_type: str = "threshold"
    ema_start: str = "now"
    val_fraction: float = 0.1
    num_workers: int = 0
    seed: int = 0
    device: str = "auto"
    resume_from: Path | None = None

    def check(self) -> None:
        """Raises `UserError` for a value that cannot be meant."""
        for name, least in (("batch_size", 1), ("epochs", 1), ("accumulation_steps", 1)):
            _require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        for name in ("warmup_epochs", "num_workers", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.img_size >= SMALLEST_IMAGE, "img_size", self.img_size, f"at least {SMALLEST_IMAGE}")
        _require(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "a number above 0")
        _require(0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"between 0 and --lr ({self.lr:g})")
        for name in ("weight_decay", "clip_grad"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "a number, 0 or more")
        _require(self.warmup_epochs < self.epochs, "warmup_epochs", self.warmup_epochs, f"below --epochs {self.epochs}")
        _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        _require(self.ema_start in ("now", "auto"), "ema_start", self.ema_start, "now or auto")
        _require(0 <= self.ema_decay <= 1, "ema_decay", self.ema_decay, "in [0, 1]")

    def plain(self) -> dict[str, Any]:
        """The options as plain values, for a checkpoint."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self).items()}


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} must be {expected}, got {value}")

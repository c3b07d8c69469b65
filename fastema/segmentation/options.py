"""The options of a training, one field a flag, checked before anything is read or built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastema.segmentation.errors import UserError

# The coarsest level of the usual pyramids has a 32nd of the size; smaller images leave it a single pixel.
SMALLEST_IMAGE = 64

SYNTHETIC = "synthetic"  # --dataset-path of the generated data set
HELD_OUT = "validation"  # --split of what a run held out

SCHEDULERS = ("cosine", "cosine_restart", "onecycle", "none")
PRECISIONS = ("none", "bf16", "fp16")
EMA_STARTS = ("now", "auto")


@dataclass(frozen=True)
class TrainOptions:
    """The options of `fastema train`; None means the value of the option it falls back to."""

    dataset_path: str
    checkpoint_dir: Path
    # data
    cam_only: bool = True
    val_fraction: float = 0.1
    num_workers: int = 0
    # model
    backbone: str = "edgenext_base"
    pretrained: bool = True
    num_experts: int = 7
    top_k: int = 2
    img_size: int = 384
    device: str = "auto"
    amp: str = "none"
    fsdp: bool = False
    # stages
    epochs: int = 30
    stage1_epochs: int = 0
    skip_stage1: bool = False
    progressive_unfreeze: bool = False
    batch_size: int = 8
    stage2_batch_size: int | None = None
    accumulation_steps: int = 1
    # optimisation
    lr: float = 1e-3
    stage2_lr: float | None = None
    scheduler: str = "cosine"
    min_lr: float = 1e-5
    warmup_epochs: int = 0
    weight_decay: float = 1e-4
    clip_grad: float = 1.0
    seed: int = 0
    # exponential moving average
    use_ema: bool = False
    ema_decay: float = 0.999
    ema_decays: tuple[float, ...] = ()
    ema_decay_type: str = "threshold"
    ema_decay_args: Mapping[str, float] | None = None
    ema_start: str = "now"
    ema_start_epoch: int = 1
    # checkpoints
    resume_from: Path | None = None
    save_every: int = 0

    @property
    def first_stage_epochs(self) -> int:
        """Epochs with a frozen backbone."""
        return 0 if self.skip_stage1 else self.stage1_epochs

    @property
    def second_lr(self) -> float:
        """Highest learning rate of stage 2."""
        return self.lr if self.stage2_lr is None else self.stage2_lr

    @property
    def second_batch_size(self) -> int:
        """Images per batch in stage 2."""
        return self.batch_size if self.stage2_batch_size is None else self.stage2_batch_size

    @property
    def decays(self) -> tuple[float, ...]:
        """Every average's decay, the main one first."""
        return self.ema_decays or (self.ema_decay,)

    def check(self) -> None:
        """Raise `UserError` for a value that is not allowed, or two that do not go together."""
        for name, least in (("batch_size", 1), ("epochs", 1), ("accumulation_steps", 1), ("ema_start_epoch", 1)):
            _require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        for name in ("warmup_epochs", "stage1_epochs", "num_workers", "seed", "save_every", "num_experts"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.second_batch_size >= 1, "stage2_batch_size", self.stage2_batch_size, "at least 1")
        _require(self.img_size >= SMALLEST_IMAGE, "img_size", self.img_size, f"at least {SMALLEST_IMAGE}")
        _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        for name, known in (("scheduler", SCHEDULERS), ("amp", PRECISIONS), ("ema_start", EMA_STARTS)):
            _require(getattr(self, name) in known, name, getattr(self, name), f"{', '.join(known[:-1])} or {known[-1]}")
        if self.num_experts:
            _require(1 <= self.top_k <= self.num_experts, "top_k", self.top_k, f"from 1 to {self.num_experts} experts")
        self._check_rates()
        self._check_epochs()
        self._check_averages()

    def plain(self) -> dict[str, Any]:
        """Return the options as plain values, for a checkpoint."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}

    def _check_rates(self) -> None:
        for name in ("lr", "stage2_lr"):
            rate = getattr(self, name)
            _require(rate is None or (math.isfinite(rate) and rate > 0), name, rate, "a number above 0")
        lower, flag = self.lr, "--lr"
        if self.second_lr < self.lr:
            lower, flag = self.second_lr, "--stage2-lr"
        _require(0 <= self.min_lr <= lower, "min_lr", self.min_lr, f"between 0 and {flag} ({lower:g})")
        for name in ("weight_decay", "clip_grad"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "a number, 0 or more")

    def _check_epochs(self) -> None:
        first = self.first_stage_epochs
        _require(first <= self.epochs, "stage1_epochs", first, f"at most --epochs {self.epochs}, the total")
        limit = f"--stage1-epochs {first}" if first else f"--epochs {self.epochs}"
        _require(self.warmup_epochs < (first or self.epochs), "warmup_epochs", self.warmup_epochs, f"below {limit}")
        if self.scheduler == "onecycle" and self.warmup_epochs:
            raise UserError("--scheduler onecycle has a warm-up of its own: leave out --warmup-epochs")
        if self.progressive_unfreeze and first == self.epochs:
            raise UserError(
                f"--progressive-unfreeze opens the backbone during stage 2, but all {self.epochs} epochs are stage 1: "
                "give more --epochs or fewer --stage1-epochs"
            )

    def _check_averages(self) -> None:
        for decay in self.ema_decays:
            _require(0 <= decay <= 1, "ema_decays", decay, "in [0, 1] each")
        if len(set(self.ema_decays)) < len(self.ema_decays):
            given = ",".join(f"{decay:g}" for decay in self.ema_decays)
            raise UserError(f"--ema-decays must differ from each other, got {given}")
        _require(0 <= self.ema_decay <= 1, "ema_decay", self.ema_decay, "in [0, 1]")
        if not self.use_ema:
            return
        within = f"at most --epochs {self.epochs}"
        _require(self.ema_start_epoch <= self.epochs, "ema_start_epoch", self.ema_start_epoch, within)
        if self.ema_start == "auto" and self.ema_start_epoch > 1:
            raise UserError("--ema-start auto and --ema-start-epoch both say when the EMA starts: give one of them")


@dataclass(frozen=True)
class DistillOptions(TrainOptions):
    """The options of `fastema distill`: those of the student's training, and the teacher's."""

    use_ema: bool = True
    teacher_checkpoint: Path = field(kw_only=True)
    teacher_backbone: str | None = None
    distill_weight: float = 0.5
    temperature: float = 2.0

    def check(self) -> None:
        super().check()
        _require(0 <= self.distill_weight <= 1, "distill_weight", self.distill_weight, "in [0, 1]")
        positive = math.isfinite(self.temperature) and self.temperature > 0
        _require(positive, "temperature", self.temperature, "a number above 0")
        own = self.checkpoint_dir.resolve()
        if self.teacher_checkpoint.resolve().parent in (own, own / "previous"):
            raise UserError(
                f"--teacher-checkpoint {self.teacher_checkpoint} is in --checkpoint-dir {self.checkpoint_dir}, where "
                "this run puts the student's files in place of the teacher's: give another --checkpoint-dir"
            )


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `fastema evaluate`."""

    checkpoint: Path
    dataset_path: str
    split: str = "Test"
    cam_only: bool = True
    img_size: int | None = None
    batch_size: int = 8
    num_workers: int = 0
    device: str = "auto"
    json: Path | None = None

    def check(self) -> None:
        """Raise `UserError` for a value that is not allowed."""
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.num_workers >= 0, "num_workers", self.num_workers, "at least 0")
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            fault = "is a folder" if self.json.is_dir() else "cannot be written: its folder does not exist"
            raise UserError(f"--json: {self.json} {fault}")


def option_flag(name: str) -> str:
    """Return a field's flag."""
    return f"--{name.replace('_', '-')}"


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{option_flag(name)} must be {expected}, got {value}")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value

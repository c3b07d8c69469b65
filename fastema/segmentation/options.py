"""The options of a training, one field a flag, checked before anything is read or built."""

# ruff: noqa: RUF009 - `_flag` returns a field
from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastema.errors import UserError
from fastema.segmentation.asked import parse_asked

# The coarsest level of the usual pyramids has a 32nd of the size; smaller images leave it a single pixel.
SMALLEST_IMAGE = 64

SYNTHETIC = "synthetic"  # --dataset-path of the generated data set
HELD_OUT = "validation"  # --split of what a run held out

SCHEDULERS = ("cosine", "cosine_restart", "onecycle", "wsd", "none")
PRECISIONS = ("none", "bf16", "fp16")
EMA_STARTS = ("now", "auto")


def _parse_decays(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 0.99,0.999, got {text!r}") from None


def _parse_decay_args(text: str) -> dict[str, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected something like beta=15, got {text!r}") from None


#: The groups of flags in `--help`, with their descriptions.
GROUPS = {
    "teacher": "A checkpoint of fastema train: its averaged weights where it has any. It may be of another backbone, "
    "other experts, and another image size.",
    "data": None,
    "model": None,
    "stages": "1: the decoder alone, the backbone frozen. 2: everything, the backbone at a tenth of the rate.",
    "optimisation": "AdamW. The backbone is at a tenth of each rate, --min-lr too.",
    "exponential moving average": None,
    "checkpoints": None,
}
_EMA = "exponential moving average"


#: Keys of a field's metadata that are not arguments of `add_argument`.
NOT_FOR_ARGPARSE = ("group", "least")


def _flag(group: str, help: str, default: Any = dataclasses.MISSING, metavar: str | None = None, **more: Any) -> Any:
    """Return a field with its flag as metadata; `more`: `least`, the lowest value, and `add_argument`'s arguments."""
    metadata = {"group": group, "help": help, "metavar": metavar, **more}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainOptions:
    """The options of `fastema train`; None means the value of the option it falls back to."""

    dataset_path: str | None = _flag(
        "data",
        "folder with images and masks: Train/Image and Train/GT_Object (COD10K-v3), Imgs and GT, images and masks, "
        f"files like a.jpg and a_mask.png, …; or '{SYNTHETIC}': a camouflage data set, generated on the spot",
        metavar="DIR",
        required=False,  # with --images and --masks
    )
    checkpoint_dir: Path = _flag("checkpoints", "where everything is written", metavar="DIR")
    images: Path | None = _flag("data", "in place of --dataset-path: folder of the images, at any depth", None, "DIR")
    masks: Path | None = _flag("data", "and folder of their masks, of the same names", None, "DIR")
    cam_only: bool = _flag(
        "data",
        "of COD10K, only the images with a camouflaged object, as the papers do; this is the default",
        True,
        action=argparse.BooleanOptionalAction,
    )
    foreground: str | None = _flag(
        "data",
        "what is foreground in masks that are not black and white: numbers (1,15 or 1-20), colours (ff0000) or alpha "
        "(default: what the masks say, or an error)",
        None,
        "V,V,…",
    )
    ignore_index: str | None = _flag(
        "data",
        "numbers or colours in masks that count neither in loss nor in metrics, or none "
        "(default: 255 beside class numbers)",
        None,
        "V,V,…",
    )
    val_fraction: float = _flag("data", "share of Train held out to validate on", 0.1, "F")
    num_workers: int = _flag("data", "processes that read images beside the training", 0, "N", least=0)

    backbone: str = _flag("model", "any timm model with a feature pyramid", "edgenext_base", "NAME")
    pretrained: bool = _flag("model", "start from random weights", True)
    num_experts: int = _flag("model", "experts at every level of the decoder; 0: none", 7, "N", least=0)
    top_k: int = _flag("model", "experts that each image is given to", 2, "K")
    img_size: int = _flag("model", "images are trained on as squares of this size", 384, "PX", least=SMALLEST_IMAGE)
    device: str = _flag("model", "auto, cpu, cuda, cuda:1, …", "auto", "DEV")
    amp: str = _flag(
        "model",
        "16-bit forward and backward; fp16 (with loss scaling) on a GPU only, bf16 on a CPU too",
        "none",
        choices=PRECISIONS,
    )
    fsdp: bool = _flag(
        "model",
        "under torchrun: each process keeps a part of weights, moments and averages (fully_shard), not all of it",
        False,
    )

    epochs: int = _flag("stages", "in all, both stages and those before a resume included", 30, "N", least=1)
    stage1_epochs: int = _flag("stages", "how many of them are stage 1", 0, "N", least=0)
    skip_stage1: bool = _flag("stages", "all epochs are stage 2, whatever --stage1-epochs", False)
    progressive_unfreeze: bool = _flag(
        "stages", "in stage 2, open the backbone level by level, the deepest first, until half of the stage", False
    )
    batch_size: int = _flag("stages", "images a batch, in all processes together", 8, "N", least=1)
    stage2_batch_size: int | None = _flag("stages", "in stage 2 (default: --batch-size)", None, "N", least=1)
    accumulation_steps: int = _flag("stages", "batches an optimizer step, in both stages", 1, "N", least=1)

    lr: float = _flag("optimisation", "highest learning rate", 1e-3, "LR")
    stage2_lr: float | None = _flag("optimisation", "highest learning rate of stage 2 (default: --lr)", None, "LR")
    scheduler: str = _flag(
        "optimisation",
        "over each stage anew: half a cosine; a cosine with warm restarts (3 cycles, each twice as long); "
        "one-cycle; constant with a linear decay in the last fifth (wsd); or constant",
        "cosine",
        choices=SCHEDULERS,
    )
    min_lr: float = _flag("optimisation", "learning rate at the end of a stage (not: none)", 1e-5, "LR")
    warmup_epochs: int = _flag("optimisation", "linear warm-up at the start (not: onecycle)", 0, "N", least=0)
    weight_decay: float = _flag("optimisation", "AdamW's, on weights only", 1e-4, "W")
    clip_grad: float = _flag("optimisation", "gradient norm limit; 0: none", 1.0, "NORM")
    seed: int = _flag("optimisation", "of weights, order, augmentation and synthetic data", 0, "N", least=0)

    use_ema: bool = _flag(_EMA, "validate the averaged weights every epoch", False)
    ema_decay: float = _flag(_EMA, "it looks back over 1 / (1 - D) steps", 0.999, "D")
    ema_decays: tuple[float, ...] = _flag(
        _EMA,
        "several averages at once, in place of --ema-decay; the first is the main one, ema_net of last.pth",
        (),
        "D,D,…",
        type=_parse_decays,
    )
    ema_profiles: tuple[float, ...] = _flag(
        _EMA,
        "averages with power profiles of these sigma_rel (standard deviation over the length of the run), in place of "
        "--ema-decay; 0.05,0.10 serves --snapshots",
        (),
        "S,S,…",
        type=_parse_decays,
    )
    snapshots: int = _flag(
        _EMA,
        "save --ema-profiles N times in the run; at its end, say which sigma_rel would have been best on the "
        "validation images, and write that average to best_posthoc.pth; 0: none",
        0,
        "N",
        least=0,
    )
    ema_decay_type: str = _flag(_EMA, "constant, threshold, exp, warmup, linear", "threshold", "TYPE")
    ema_decay_args: Mapping[str, float] | None = _flag(
        _EMA,
        "what the type takes: beta=15 (exp), inv_gamma=1,power=0.67 (warmup)",
        None,
        "NAME=X,…",
        type=_parse_decay_args,
    )
    ema_start_epoch: int = _flag(_EMA, "start it before epoch N", 1, "N", least=1)
    ema_start: str = _flag(_EMA, "now, or auto: when the IoU so far shows that it helps", "now", choices=EMA_STARTS)

    resume_from: Path | None = _flag("checkpoints", "go on from a checkpoint of fastema train", None, "FILE")
    save_every: int = _flag(
        "checkpoints", "keep checkpoint_epoch{N}.pth of every Nth epoch; 0: of none", 0, "N", least=0
    )

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

    @property
    def average_names(self) -> list[str]:
        """The name of every average, the main one first."""
        if self.ema_profiles:
            return [f"sigma_rel_{sigma:g}" for sigma in self.ema_profiles]
        return [f"{decay:g}" for decay in self.decays]

    def check(self) -> None:
        """Raise `UserError` for a value that is not allowed, or two that do not go together."""
        for each in fields(self):
            value, least, choices = getattr(self, each.name), each.metadata.get("least"), each.metadata.get("choices")
            if least is not None and value is not None:
                _require(value >= least, each.name, value, f"at least {least}" if least else "0 or more")
            if choices is not None:
                _require(value in choices, each.name, value, f"{', '.join(choices[:-1])} or {choices[-1]}")
        _check_data(self)
        _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        if self.num_experts:
            _require(1 <= self.top_k <= self.num_experts, "top_k", self.top_k, f"from 1 to {self.num_experts} experts")
        self._check_rates()
        self._check_epochs()
        self._check_averages()
        self._check_snapshots()

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
        for name, values in (("ema_decays", self.ema_decays), ("ema_profiles", self.ema_profiles)):
            if len(set(values)) < len(values):
                raise UserError(f"{option_flag(name)} must differ from each other, got {_listed(values)}")
        for decay in self.ema_decays:
            _require(0 <= decay <= 1, "ema_decays", decay, "in [0, 1] each")
        _require(0 <= self.ema_decay <= 1, "ema_decay", self.ema_decay, "in [0, 1]")
        for sigma in self.ema_profiles:
            # 12 ** -0.5 is that of the plain mean, the widest there is.
            within = 0 < sigma < 12**-0.5
            _require(within, "ema_profiles", _listed(self.ema_profiles), "above 0 and below 0.2887 each")
        if self.use_ema:
            within = self.ema_start_epoch <= self.epochs
            _require(within, "ema_start_epoch", self.ema_start_epoch, f"at most --epochs {self.epochs}")
            if self.ema_start == "auto" and self.ema_start_epoch > 1:
                raise UserError("--ema-start auto and --ema-start-epoch both say when the EMA starts: give one of them")

    def _check_snapshots(self) -> None:
        _require(self.snapshots != 1, "snapshots", 1, "0, or at least 2: one holds no more than its own averages")
        if self.snapshots and not self.ema_profiles:
            raise UserError(
                f"--snapshots {self.snapshots} needs averages with known profiles: add --ema-profiles 0.05,0.10"
            )
        if self.snapshots and not self.use_ema:
            raise UserError(f"--snapshots {self.snapshots} without an EMA would do nothing: add --use-ema")


@dataclass(frozen=True)
class DistillOptions(TrainOptions):
    """The options of `fastema distill`: those of the student's training, and the teacher's."""

    use_ema: bool = _flag(_EMA, "validate the averaged weights every epoch", True)
    teacher_checkpoint: Path = dataclasses.field(
        kw_only=True, metadata={"group": "teacher", "help": "the teacher's checkpoint", "metavar": "FILE"}
    )
    teacher_backbone: str | None = _flag(
        "teacher", "the backbone that FILE must have; a check, since FILE itself says how it is built", None, "NAME"
    )
    distill_weight: float = _flag(
        "teacher", "loss = (1 - A) x loss against the masks + A x distance to the teacher", 0.5, "A"
    )
    temperature: float = _flag("teacher", "divides the logits of both before they are compared", 2.0, "T")

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
    dataset_path: str | None = None
    split: str = "Test"
    cam_only: bool = True
    foreground: str | None = None
    ignore_index: str | None = None
    img_size: int | None = None
    batch_size: int = 8
    num_workers: int = 0
    device: str = "auto"
    json: Path | None = None
    images: Path | None = None
    masks: Path | None = None

    def check(self) -> None:
        """Raise `UserError` for a value that is not allowed."""
        _check_data(self)
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.num_workers >= 0, "num_workers", self.num_workers, "at least 0")
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            fault = "is a folder" if self.json.is_dir() else "cannot be written: its folder does not exist"
            raise UserError(f"--json: {self.json} {fault}")


def _check_data(options: TrainOptions | EvaluateOptions) -> None:
    folders = [options.images, options.masks]
    if (options.dataset_path is None) == (folders == [None, None]):
        raise UserError("give --dataset-path DIR, or else --images DIR --masks DIR")
    if options.dataset_path is None and None in folders:
        given, missing = ("--images", "--masks") if options.masks is None else ("--masks", "--images")
        raise UserError(f"{given} DIR needs {missing} DIR too")
    try:
        parse_asked(options.foreground, options.ignore_index)
    except ValueError as error:
        raise UserError(str(error)) from error


def option_flag(name: str) -> str:
    """Return a field's flag."""
    return f"--{name.replace('_', '-')}"


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{option_flag(name)} must be {expected}, got {value}")


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value

"""What a run writes after every epoch, and what it takes from a checkpoint to go on.

An epoch is written once, as `last.pth`. The other names (best, every so many epochs) are further links to the same
file: `last.pth` is only ever replaced as a whole, so they keep what they have.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastema.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastema.segmentation.distributed.parallel import Spread
from fastema.segmentation.errors import UserError
from fastema.segmentation.model.network import SegmentationNet
from fastema.segmentation.options import TrainOptions, option_flag
from fastema.segmentation.report.history import EpochRecord
from fastema.segmentation.train.averages import Averages, average_ious
from fastema.segmentation.train.optimizer import Optimisation

LAST, BEST, BEST_EMA = "last.pth", "best_model.pth", "best_ema.pth"

# Without these a checkpoint cannot be gone on from.
_NEEDED = ("net", "optimizer", "history", "options")
# What must be the same for the weights to fit.
_ARCHITECTURE = ("backbone", "num_experts", "top_k")
# Where things are is no news.
_UNSAID = ("resume_from", "checkpoint_dir")


def read_resumable(path: Path, options: TrainOptions) -> dict[str, Any]:
    """Reads a checkpoint to go on from.

    Raises:
        CheckpointError: it is missing or damaged.
        UserError: it is no checkpoint of fastema train, of another architecture, or has done its epochs.
    """
    checkpoint = load_checkpoint(path)
    missing = [name for name in _NEEDED if name not in checkpoint]
    if missing:
        raise UserError(
            f"{path} cannot be resumed from: it has no {', '.join(missing)}; was it written by fastema train?"
        )
    trained, asked = checkpoint["options"], options.plain()
    differing = [name for name in _ARCHITECTURE if trained.get(name, 0) != asked[name]]
    if not asked["num_experts"]:
        differing = [name for name in differing if name != "top_k"]
    if differing:
        was = " ".join(f"{option_flag(name)} {trained.get(name, 0)}" for name in differing)
        now = " ".join(f"{option_flag(name)} {asked[name]}" for name in differing)
        raise UserError(f"{path} was trained with {was}, not {now}")
    done = checkpoint["history"][-1]["epoch"] if checkpoint["history"] else 0
    if done >= options.epochs:
        raise UserError(f"{path} has done its {done} epochs: --epochs is the total, so give more than {done}")
    return checkpoint


def changes(checkpoint: dict[str, Any], options: TrainOptions) -> list[str]:
    """What is asked now and was not when the checkpoint was written, as `--flag old → new`."""
    before, now = checkpoint["options"], options.plain()
    changed = [
        f"{option_flag(name)} {_shown(before.get(name, 'unset'))} → {_shown(value)}"
        for name, value in now.items()
        if name not in _UNSAID and before.get(name, value) != value
    ]
    gone = "teacher_checkpoint" in before and "teacher_checkpoint" not in now
    return changed + (["no teacher any more: go on with fastema distill to keep it"] if gone else [])


def write_epoch(
    folder: Path,
    net: SegmentationNet,
    averages: Averages | None,
    optimisation: Optimisation,
    history: Sequence[EpochRecord],
    options: TrainOptions,
    bests_after: int,
    spread: Spread,
) -> None:
    """Writes `last.pth`, and the names that this epoch earned beside it.

    The first process does, and what it writes is the same for any number of them. All must call it: of a sharded
    network it needs their parts.

    Args:
        folder: the run's.
        net: with its trained weights.
        averages: None before they start.
        optimisation: optimizer and scaler.
        history: up to and with this epoch.
        options: stored as plain values.
        bests_after: epochs up to this one do not compete for `best_*.pth`: another folder has theirs.
        spread: the network over the processes.

    Raises:
        CheckpointError: the disk is full, or the folder is not writable any more.
    """
    rivals = [record for record in history if record.epoch > bests_after]
    best_base = max(rivals, key=lambda record: (record.iou, record.epoch))
    saved = [] if averages is None else averages.saved(spread)
    content: dict[str, Any] = {
        "net": spread.gathered(net.state_dict()),
        "optimizer": spread.gathered(optimisation.optimizer.state_dict()),
        "scaler": optimisation.scaler,
        "epoch": history[-1].epoch,
        "history": [asdict(record) for record in history],
        "options": options.plain(),
        "rng": rng_states(),
        "bests": {"iou": best_base.iou, "ema_iou": _best_average(rivals)},
        "ema_start_epoch": None if averages is None else averages.start_epoch,
    }
    if not spread.processes.is_first:
        return
    last = folder / LAST
    save_checkpoint(last, ema=saved[0] if saved else None, **content)
    record = history[-1]
    if record is best_base:
        _link(last, folder / BEST)
    every = options.save_every
    if every and record.epoch % every == 0:
        _link(last, folder / f"checkpoint_epoch{record.epoch}.pth")
    scores = average_ious(record)
    if saved and scores and max(scores) >= (_best_average(rivals) or 0.0):
        which = scores.index(max(scores))
        if which == 0:
            _link(last, folder / BEST_EMA)
        else:
            save_checkpoint(folder / BEST_EMA, ema=saved[which], **content)


def rng_states() -> dict[str, Any]:
    """The random generators of this process, as plain values and tensors."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: dict[str, Any]) -> None:
    """Puts the generators where `rng_states` found them. Every epoch seeds torch's anew; the others go on from here."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _best_average(records: Sequence[EpochRecord]) -> float | None:
    return max((iou for record in records for iou in average_ious(record)), default=None)


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name, in one go; where the file system has no links, a copy."""
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {target}: {error.strerror}; what was there before is untouched") from error


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)

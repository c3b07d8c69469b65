"""Write a run's checkpoints, and read one to resume from.

An epoch is written once, as `last.pth`. The other names (best, every so many epochs) are hard links to the same file;
since `last.pth` is only ever replaced as a whole, they keep their content.
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
from fastema.segmentation.distributed.parallel import ParallelModel
from fastema.segmentation.errors import UserError
from fastema.segmentation.model.network import SegmentationNet
from fastema.segmentation.options import TrainOptions, option_flag
from fastema.segmentation.report.history import EpochRecord
from fastema.segmentation.train.averages import Averages
from fastema.segmentation.train.optimizer import TrainOptimizer

LAST, BEST, BEST_EMA = "last.pth", "best_model.pth", "best_ema.pth"

# Needed to resume.
_NEEDED = ("net", "optimizer", "history", "options")
# Must be equal for the weights to fit.
_ARCHITECTURE = ("backbone", "num_experts", "top_k")
# Not reported as changed.
_PLACES = ("resume_from", "checkpoint_dir")


def read_resumable(path: Path, options: TrainOptions) -> dict[str, Any]:
    """Read a checkpoint to resume from."""
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
        before = " ".join(f"{option_flag(name)} {trained.get(name, 0)}" for name in differing)
        now = " ".join(f"{option_flag(name)} {asked[name]}" for name in differing)
        raise UserError(f"{path} was trained with {before}, not {now}")
    done = checkpoint["history"][-1]["epoch"] if checkpoint["history"] else 0
    if done >= options.epochs:
        raise UserError(f"{path} has done its {done} epochs: --epochs is the total, so give more than {done}")
    return checkpoint


def changed_options(checkpoint: dict[str, Any], options: TrainOptions) -> list[str]:
    """List what differs from the checkpoint's options, as `--flag old → new`."""
    before, now = checkpoint["options"], options.plain()
    changed = [
        f"{option_flag(name)} {_shown(before.get(name, 'unset'))} → {_shown(value)}"
        for name, value in now.items()
        if name not in _PLACES and before.get(name, value) != value
    ]
    if "teacher_checkpoint" in before and "teacher_checkpoint" not in now:
        changed.append("no teacher any more: go on with fastema distill to keep it")
    return changed


def write_epoch(
    folder: Path,
    net: SegmentationNet,
    averages: Averages | None,
    optimizer: TrainOptimizer,
    history: Sequence[EpochRecord],
    options: TrainOptions,
    bests_after: int,
    parallel: ParallelModel,
) -> None:
    """Write `last.pth`, and link the other names that this epoch earned.

    The first process writes, the same for any number of processes. All must call this.

    Args:
        folder: the run's.
        net: with its trained weights.
        averages: None before they start.
        optimizer: with its scaler.
        history: up to this epoch.
        options: stored as plain values.
        bests_after: epochs up to this one do not count for `best_*.pth`; their files are in another folder.
        parallel: the network over the processes.
    """
    record = history[-1]
    candidates = [each for each in history if each.epoch > bests_after]
    best = max(candidates, key=lambda each: (each.iou, each.epoch))
    best_average = max((iou for each in candidates for iou in each.average_ious), default=None)
    saved = [] if averages is None else averages.saved(parallel)
    content: dict[str, Any] = {
        "net": parallel.gather_state(net.state_dict()),
        "optimizer": parallel.gather_state(optimizer.adamw.state_dict()),
        "scaler": optimizer.scaler,
        "epoch": record.epoch,
        "history": [asdict(each) for each in history],
        "options": options.plain(),
        "rng": rng_states(),
        "bests": {"iou": best.iou, "ema_iou": best_average},
        "ema_start_epoch": None if averages is None else averages.start_epoch,
    }
    if not parallel.processes.is_first:
        return
    last = folder / LAST
    save_checkpoint(last, ema=saved[0] if saved else None, **content)
    if record is best:
        _link(last, folder / BEST)
    if options.save_every and record.epoch % options.save_every == 0:
        _link(last, folder / f"checkpoint_epoch{record.epoch}.pth")
    scores = record.average_ious
    if saved and scores and max(scores) >= (best_average or 0.0):
        which = scores.index(max(scores))
        if which == 0:
            _link(last, folder / BEST_EMA)
        else:
            save_checkpoint(folder / BEST_EMA, ema=saved[which], **content)


def rng_states() -> dict[str, Any]:
    """Return the states of this process's random generators, as plain values and tensors."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: dict[str, Any]) -> None:
    """Restore the generators. Every epoch seeds torch's again; the others continue from here."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _link(source: Path, target: Path) -> None:
    """Replace `target` atomically by a hard link to `source`, or a copy where the file system has no links."""
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

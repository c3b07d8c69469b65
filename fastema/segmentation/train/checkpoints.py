"""The folder of a run: check its space, move an earlier run's files, write checkpoints, read one to resume from.

An epoch is written once, as `last.pth`. The other names (best, every so many epochs) are hard links to the same file;
since `last.pth` is only ever replaced as a whole, they keep their content.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from rich.filesize import decimal

from fastema.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastema.core.writing import replacing
from fastema.errors import UserError
from fastema.segmentation.devices import accelerator
from fastema.segmentation.distributed.parallel import ParallelModel
from fastema.segmentation.model.network import SegmentationNet
from fastema.segmentation.options import TrainOptions, option_flag
from fastema.segmentation.report.history import EpochRecord
from fastema.segmentation.train.averaging import Averages
from fastema.segmentation.train.epoch import TrainOptimizer

LAST, BEST, BEST_EMA, BEST_POSTHOC = "last.pth", "best_model.pth", "best_ema.pth", "best_posthoc.pth"
TENSORBOARD, SNAPSHOTS = "tensorboard", "snapshots"


def ensure_writable(folder: Path) -> None:
    """Make the folder and write a trial file, so that a run does not find it read-only after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"--checkpoint-dir {folder} cannot be written to: {error.strerror or error}. Nothing was trained; give a "
            "folder that can be, or make room"
        ) from error


def require_space(folder: Path, checkpoint_bytes: int, snapshot_bytes: int = 0) -> None:
    """Raise `UserError` where the checkpoints of a run, of `checkpoint_bytes` each, do not fit.

    In the worst case there are best base, best EMA and last, and a new one before an old one goes; and all snapshots.
    """
    free = shutil.disk_usage(folder).free
    if free < 4 * checkpoint_bytes + snapshot_bytes:
        snapshots = f", its snapshots take {decimal(snapshot_bytes)}" if snapshot_bytes else ""
        raise UserError(
            f"no space left for this run in {folder}: its checkpoints are {decimal(checkpoint_bytes)} each, and up to "
            f"4 are there at once{snapshots}; {decimal(free)} are free. Make room, or give another --checkpoint-dir"
        )


def move_previous_run(folder: Path, keep: Path | None) -> Path | None:
    """Move an earlier run's files to `previous/`, replacing what was there; return that folder.

    Nothing is moved, and None returned, if there was no run, or `keep`, the checkpoint to resume from, is in `folder`.
    """
    if (keep is not None and is_inside(keep, folder)) or not (folder / LAST).exists():
        return None
    previous = folder / "previous"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".pth", ".csv", ".png") or file.name in (TENSORBOARD, SNAPSHOTS):
            file.rename(previous / file.name)
    return previous


def is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file is in a folder, at any depth."""
    return folder.resolve() in file.resolve().parents


def read_resumable(path: Path, options: TrainOptions) -> dict[str, Any]:
    """Read a checkpoint to resume from."""
    checkpoint = load_checkpoint(path)
    if missing := [name for name in ("net", "optimizer", "history", "options") if name not in checkpoint]:
        raise UserError(
            f"{path} cannot be resumed from: it has no {', '.join(missing)}; was it written by fastema train?"
        )
    trained, asked = checkpoint["options"], options.plain()
    needed = ("backbone", "num_experts", "top_k") if asked["num_experts"] else ("backbone", "num_experts")
    if differing := [name for name in needed if trained.get(name, 0) != asked[name]]:
        before = " ".join(f"{option_flag(name)} {trained.get(name, 0)}" for name in differing)
        now = " ".join(f"{option_flag(name)} {asked[name]}" for name in differing)
        raise UserError(f"{path} was trained with {before}, not {now}")
    done = checkpoint["history"][-1]["epoch"] if checkpoint["history"] else 0
    if done >= options.epochs:
        raise UserError(f"{path} has done its {done} epochs: --epochs is the total, so give more than {done}")
    return checkpoint


def changed_options(checkpoint: dict[str, Any], options: TrainOptions) -> list[str]:
    """List what differs from the checkpoint's options, as `--flag old → new`."""

    def shown(value: Any) -> str:
        return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)

    before, now = checkpoint["options"], options.plain()
    changed = [
        f"{option_flag(name)} {shown(before.get(name, 'unset'))} → {shown(value)}"
        for name, value in now.items()
        if name not in ("resume_from", "checkpoint_dir") and before.get(name, value) != value
    ]
    if "teacher_checkpoint" in before and "teacher_checkpoint" not in now:
        changed.append("no teacher any more: go on with fastema distill to keep it")
    return changed


def write_epoch(
    options: TrainOptions,
    net: SegmentationNet,
    averages: Averages,
    optimizer: TrainOptimizer,
    history: Sequence[EpochRecord],
    bests_after: int,
    parallel: ParallelModel,
    data: Mapping[str, Any],
) -> None:
    """Write `last.pth`, and link the other names that this epoch earned. All processes must call this.

    Epochs up to `bests_after` do not count for `best_*.pth`; their files are in another folder. `data` says how the
    images were read.
    """
    record, last = history[-1], options.checkpoint_dir / LAST
    candidates = [each for each in history if each.epoch > bests_after]
    best = max(candidates, key=lambda each: (each.iou, each.epoch))
    best_average = max((iou for each in candidates for iou in each.average_ious), default=None)
    saved, names = averages.saved(parallel), averages.names
    content: dict[str, Any] = {
        "net": parallel.gather_state(net.state_dict()),
        "optimizer": parallel.gather_state(optimizer.adamw.state_dict()),
        "scaler": optimizer.scaler,
        "epoch": record.epoch,
        "history": [asdict(each) for each in history],
        "options": options.plain(),
        "rng": rng_states(),
        "bests": {"iou": best.iou, "ema_iou": best_average},
        "ema_start_epoch": averages.start_epoch,
        "ema_name": names[0] if names else None,  # of ema_net
        **data,
    }
    if not parallel.processes.is_first:
        return
    save_checkpoint(last, ema=saved[0] if saved else None, **content)
    if record is best:
        _link(last, BEST)
    if options.save_every and record.epoch % options.save_every == 0:
        _link(last, f"checkpoint_epoch{record.epoch}.pth")
    scores = record.average_ious
    if saved and scores and max(scores) >= (best_average or 0.0):
        which = scores.index(max(scores))
        if which == 0:
            _link(last, BEST_EMA)
        else:
            save_checkpoint(last.with_name(BEST_EMA), ema=saved[which], **{**content, "ema_name": names[which]})


def rng_states() -> dict[str, Any]:
    """Return the states of this process's random generators, as plain values and tensors."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if (device := accelerator()) is not None:
        states[device.type] = torch.get_device_module(device).get_rng_state_all()
    return states


def restore_rng(states: dict[str, Any]) -> None:
    """Restore the random generators. Every epoch seeds torch's again; the others continue from here."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    device = accelerator()
    if device is not None and len(states.get(device.type, ())) == torch.accelerator.device_count():
        torch.get_device_module(device).set_rng_state_all(states[device.type])


def _link(source: Path, name: str) -> None:
    """Replace a file beside `source` atomically by a hard link to it, or a copy where the file system has no links."""
    target = Path(os.path.realpath(source.with_name(name)))
    try:
        with replacing(target) as temporary:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror}; what was there before is untouched") from error

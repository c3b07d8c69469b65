"""The folder of a run: check that it can be written to, and move an earlier run's files out of the way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fastema.segmentation.errors import UserError

TENSORBOARD, SNAPSHOTS = "tensorboard", "snapshots"
_WRITTEN = frozenset({".pth", ".csv", ".png"})


def ensure_writable(folder: Path) -> None:
    """Make the folder and write a trial file, so that a run does not find it read-only after hours."""
    trial = folder / f".trial.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with trial.open("wb") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        finally:
            trial.unlink(missing_ok=True)
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
        snapshots = f", its snapshots take {_size(snapshot_bytes)}" if snapshot_bytes else ""
        raise UserError(
            f"no space left for this run in {folder}: its checkpoints are {_size(checkpoint_bytes)} each, and up to 4 "
            f"are there at once{snapshots}; {_size(free)} are free. Make room, or give another --checkpoint-dir"
        )


def move_previous_run(folder: Path, keep: Path | None) -> Path | None:
    """Move an earlier run's files to `previous/`, replacing what was there.

    Args:
        folder: the run's.
        keep: the checkpoint to resume from; if it is in the folder, nothing is moved.

    Returns:
        Where the files are now; None if nothing was moved.
    """
    if (keep is not None and is_inside(keep, folder)) or not (folder / "last.pth").exists():
        return None
    previous = folder / "previous"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for file in sorted(folder.iterdir()):
        if file.suffix in _WRITTEN or file.name in (TENSORBOARD, SNAPSHOTS):
            file.rename(previous / file.name)
    return previous


def is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file is in a folder, at any depth."""
    return folder.resolve() in file.resolve().parents


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

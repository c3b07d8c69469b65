"""The folder of a run: whether it can be written to, and what becomes of an earlier run's files in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fastema.segmentation.errors import UserError

_WRITTEN = frozenset({".pth", ".csv", ".png"})
TENSORBOARD = "tensorboard"


def make_writable(folder: Path) -> None:
    """Makes the folder and tries it out: hours later would be a bad time to learn that it is read-only.

    Raises:
        UserError: it cannot be made or written to.
    """
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


def require_space(folder: Path, checkpoint_bytes: int) -> None:
    """Raises `UserError` where the checkpoints of a run do not fit.

    Args:
        folder: exists.
        checkpoint_bytes: about what one checkpoint has. The best base, the best EMA and the last epoch are different
            ones in the worst case, and a new one is written before an old one goes.
    """
    needed = 4 * checkpoint_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no space left for this run in {folder}: its checkpoints are {_size(checkpoint_bytes)} each, and up to 4 "
            f"are there at once; {_size(free)} are free. Make room, or give another --checkpoint-dir"
        )


def set_aside(checkpoint_dir: Path, keep: Path | None) -> Path | None:
    """Moves an earlier run's files to `previous/`, in place of what was there, unless the new run goes on from them.

    Args:
        checkpoint_dir: the run's folder.
        keep: the checkpoint to resume from; if it is in the folder, nothing is moved.

    Returns:
        Where the files went; None if there were none, or they stay.
    """
    if (keep is not None and is_inside(keep, checkpoint_dir)) or not (checkpoint_dir / "last.pth").exists():
        return None
    previous = checkpoint_dir / "previous"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for file in sorted(checkpoint_dir.iterdir()):
        if file.suffix in _WRITTEN or file.name == TENSORBOARD:
            file.rename(previous / file.name)
    return previous


def is_inside(file: Path, folder: Path) -> bool:
    return folder.resolve() in file.resolve().parents


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

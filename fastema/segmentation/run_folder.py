"""The folder of a run. A second run there never overwrites the first one's checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

_WRITTEN = frozenset({".pth", ".csv", ".png"})


def set_aside(checkpoint_dir: Path, keep: Path | None) -> Path | None:
    """Moves an earlier run's files to `previous/`, in place of what was there, unless the new run goes on from them.

    Args:
        checkpoint_dir: the run's folder.
        keep: the checkpoint to resume from; if it is in the folder, nothing is moved.

    Returns:
        Where the files went; None if there were none, or they stay.
    """
    goes_on = keep is not None and checkpoint_dir.resolve() in keep.resolve().parents
    if goes_on or not (checkpoint_dir / "last.pth").exists():
        return None
    previous = checkpoint_dir / "previous"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for file in sorted(checkpoint_dir.iterdir()):
        if file.suffix in _WRITTEN:
            file.rename(previous / file.name)
    return previous

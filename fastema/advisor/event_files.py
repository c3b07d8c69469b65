"""Histories in TensorBoard's event files, read with the `tensorboard` package."""

from __future__ import annotations

from pathlib import Path


def is_event_file(path: Path) -> bool:
    """Return whether this is an event file of TensorBoard, or a folder with one."""
    return "tfevents" in path.name or (path.is_dir() and any("tfevents" in file.name for file in path.iterdir()))


def read_scalars(path: Path) -> dict[str, list[float | None]]:
    """Return every scalar of an event file or of a log folder: a column for each tag, with its n-th value in row n.

    Training and validation are logged at different steps, so a row is no step. Compare only columns that were logged
    together.

    Raises:
        ValueError: the package is missing, or there is no scalar.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
    except ImportError:
        raise ValueError(
            f"{path} is a TensorBoard log, and the package that reads it is missing: pip install tensorboard, or "
            "export the scalar as CSV"
        ) from None
    events = EventAccumulator(str(path), size_guidance={SCALARS: 0})  # 0: all of them, not a sample
    events.Reload()
    tags = events.Tags()["scalars"]
    series = {tag: [float(event.value) for event in events.Scalars(tag)] for tag in tags}
    rows = max(map(len, series.values()), default=0)
    if rows == 0:
        raise ValueError(f"{path} has no scalar in it")
    return {tag: [*values, *[None] * (rows - len(values))] for tag, values in series.items()}

"""Histories in TensorBoard's event files, read with the `tensorboard` package."""

from __future__ import annotations

from pathlib import Path

from fastema.advisor.readers.rows import Row, merged


def is_event_file(path: Path) -> bool:
    """Return whether this is an event file of TensorBoard, or a folder with one at any depth."""
    return "tfevents" in path.name or (path.is_dir() and next(path.rglob("*tfevents*"), None) is not None)


def read_events(path: Path) -> list[Row]:
    """Return every scalar of an event file or of a log folder, a row for each step, as they were written.

    Tags of a folder inside have its name before them, as in Keras' `train` and `validation`.

    Raises:
        ValueError: the package is missing, or there is no scalar.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise ValueError(
            f"{path} is a TensorBoard log, and the package that reads it is missing: pip install tensorboard, or "
            "export the scalar as CSV"
        ) from None
    written: list[tuple[float, int, str, float]] = []  # time, step, tag, value
    folders = sorted({file.parent for file in path.rglob("*tfevents*")}) if path.is_dir() else [path]
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0, TENSORS: 0})  # 0: all of them, not a sample
        events.Reload()
        inside = "" if folder == path else f"{folder.relative_to(path)}/"
        tags = events.Tags()
        for tag in tags["scalars"]:
            written += [
                (event.wall_time, event.step, inside + tag, float(event.value)) for event in events.Scalars(tag)
            ]
        for tag in tags["tensors"]:  # TensorFlow 2 writes scalars so
            values = [(event, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
            written += [
                (event.wall_time, event.step, inside + tag, float(value))
                for event, value in values
                if value.size == 1 and value.dtype.kind == "f"
            ]
    if not written:
        raise ValueError(f"{path} has no scalar in it")
    return merged({"step": float(step), tag: value} for _, step, tag, value in sorted(written, key=lambda one: one[:2]))

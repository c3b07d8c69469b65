"""Histories in files: what was logged, in its order, and which of it is the metric to judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fastema.advisor.metric_names import (
    importance_of,
    is_averaged,
    is_loss,
    is_metric,
    is_of_a_part,
    key_of,
    known_mode_of,
    looks_numeric,
    mode_of,
    split_of,
    twin_of,
)
from fastema.advisor.readers.event_files import is_event_file, read_events
from fastema.advisor.readers.json_rows import read_json
from fastema.advisor.readers.rows import PART, Row, merged
from fastema.advisor.readers.tables import read_table
from fastema.advisor.readers.text_lines import read_text

__all__ = ["History", "average_of", "metric_of", "mode_of", "other_metrics", "read_history"]

_SOME = 12  # columns that a message names


@dataclass(frozen=True)
class History:
    """Hold what was read from a file.

    Attributes:
        rows: what was logged at once, in the order of the file.
        source: what to call it in messages.
        totals: the planned length, "epochs" and "steps", as far as the file says.
    """

    rows: Sequence[Row]
    source: str
    totals: dict[str, float] = field(default_factory=dict)

    @cached_property
    def columns(self) -> dict[str, list[float]]:
        """The values of each name, without the rows that have none."""
        columns: dict[str, list[float]] = {}
        for row in self.rows:
            for name, value in row.items():
                if name != PART:
                    columns.setdefault(name, []).append(value)
        return columns

    def column(self, name: str) -> list[float | None]:
        """Return a value for each row; None where the name was not logged.

        Raises:
            ValueError: there is none of that name; offers the existing ones.
        """
        if name not in self.columns:
            raise ValueError(f"{self.source} has no column {name!r}; it has {_listed(self.columns)}")
        return [row.get(name) for row in self.rows]

    def measured(self, name: str) -> History:
        """Return the rows in which a metric was logged, and with them what was logged at the same moment."""
        return History([row for row in merged(self.rows) if name in row], self.source, self.totals)

    def whole_column(self, name: str) -> list[float]:
        """Return the finite values of one name.

        Raises:
            ValueError: unknown, or without a finite value.
        """
        values = [value for value in self.column(name) if value is not None and math.isfinite(value)]
        if not values:
            raise ValueError(f"{self.source}: column {name!r} has no finite number")
        return values

    def has_numbers(self, name: str) -> bool:
        """Return whether a name has a finite value."""
        return any(map(math.isfinite, self.columns[name]))


def read_history(path: Path) -> History:
    """Read the log of any trainer: CSV, JSON, JSON Lines, printed text, or TensorBoard's (a file or a folder).

    Raises:
        ValueError: no such file, empty, or without numbers.
    """
    if is_event_file(path):
        return History(read_events(path), str(path))
    if path.is_dir():
        raise ValueError(f"{path} is a folder without a TensorBoard log: give the log's file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    totals: dict[str, float] = {}
    rows = None
    if text.lstrip()[0] in "[{":
        try:
            rows, totals = read_json(text, path)
        except ValueError:
            rows, totals = read_text(text)  # lines that begin with a bracket, as "[12:00] epoch 1"
            if not rows:
                raise
    else:
        rows = read_table(text, path)
    if not rows:
        rows, totals = read_text(text)
    if not rows:
        raise ValueError(
            f"{path} holds no metric: no table with a heading, and no line such as 'epoch 1: val_loss 0.5'"
        )
    return History(rows, str(path), totals)


def average_of(history: History, metric: str) -> str | None:
    """Return the column with the average's values of `metric`, by its name; None: there is none."""
    if is_averaged(metric):
        return None
    averaged = [name for name in history.columns if is_averaged(name)]
    # Of "iou" it may be "val_ema_iou", and of "val_iou" "ema_iou"; but a loss is smoothed as well.
    alike = [
        name
        for name in averaged
        if twin_of(name) == twin_of(metric)
        and (split_of(metric) is None or (split_of(name) is None and not is_loss(name) and split_of(metric) != "train"))
    ]
    return next((name for name in averaged if key_of(name) == key_of(metric)), next(iter(alike), None))


def averaged_by(history: History, metric: str) -> str:
    """Return why a metric is an average's already; "" if it is not known to be."""
    if is_averaged(metric):
        return f"{metric} is an average's, by its name, and the model's own is not in the file"
    if split_of(metric) != "train" and any(name.startswith("metrics/mAP") for name in history.columns):
        return "ultralytics validates its EMA: these numbers are an average's already"
    return ""


def loss_beside(history: History, metric: str) -> str | None:
    """Return the loss on the same data as a score; None: there is none, or the metric is a loss itself."""
    if is_loss(metric):
        return None
    losses = [name for name in _candidates(history) if is_loss(name) and not is_averaged(name)]
    return next((name for name in losses if split_of(name) == split_of(metric) and split_of(name) is not None), None)


def metric_of(history: History, metric: str | None) -> str:
    """Return the column to judge: the given one, or the main one among the metrics of the validation.

    A score comes before a loss, the validation's before the test's and the training's, a metric with an average before
    one without.

    Raises:
        ValueError: none, an unknown one, or several of unknown names; offers the existing ones.
    """
    if metric is not None:
        history.column(metric)
        return metric
    found = _candidates(history)
    if not found:
        others = [name for name in history.columns if looks_numeric(name)]
        raise ValueError(
            f"which column of {history.source}? Give --metric: {_listed(others)}"
            if others
            else f"{history.source} holds no metric; it has {_listed(history.columns)}"
        )
    first = found[0]
    unknown = [name for name in found if known_mode_of(name) is None]
    if known_mode_of(first) is None and len(unknown) > 1:
        raise ValueError(f"which column of {history.source}? Give --metric: {_listed(unknown)}")
    return first


def other_metrics(history: History, metric: str) -> list[str]:
    """Return the other metrics that might be judged, the main ones first."""
    chosen = {metric, average_of(history, metric)}
    of_training = split_of(metric) == "train"
    return [
        name
        for name in _candidates(history)
        if name not in chosen and not is_averaged(name) and (of_training or not is_of_training(history, name))
    ]


def _candidates(history: History) -> list[str]:
    names = [name for name in history.columns if is_metric(name) and history.has_numbers(name)]
    averages = {name: average_of(history, name) for name in names}

    def key(name: str) -> tuple[object, ...]:
        return (
            name in averages.values(),
            is_of_training(history, name),
            is_of_a_part(name),
            known_mode_of(name) is None,
            is_loss(name),
            is_loss(name) and split_of(name) is None,
            averages[name] is None,
            importance_of(name)[:2],
            split_of(name) == "test",
            importance_of(name)[2],
            -len(history.columns[name]),
        )

    return sorted(names, key=key)


def is_of_training(history: History, name: str) -> bool:
    """Return whether a metric is the training's: by its name, or since the validation's has the same one."""
    split = split_of(name)
    if split is not None:
        return split == "train"
    if is_loss(name) and not any(split_of(other) in ("val", "test") for other in history.columns):
        return True
    validated = {twin_of(other) for other in history.columns if split_of(other) in ("val", "test")}
    unnamed = {twin_of(other) for other in history.columns if split_of(other) is None and is_metric(other)}
    # Keras has loss, acc, val_loss, val_acc: there every name without "val" is the training's.
    return bool(validated & unnamed)


def _listed(names: Sequence[str] | dict[str, list[float]]) -> str:
    listed = list(names)
    more = f", and {len(listed) - _SOME} more" if len(listed) > _SOME else ""
    return f"{', '.join(listed[:_SOME]) or 'no number'}{more}"

"""Histories in files: CSV, JSON, JSON Lines or TensorBoard's, a column or key per metric and a row per epoch."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastema.advisor.event_files import is_event_file, read_scalars

# What a metric of which less is better is usually called.
_LESS_IS_BETTER = ("loss", "error", "err", "mae", "mse", "rmse", "perplexity", "ppl", "fid", "wer", "cer")
_DEFAULT_METRIC = "iou"


@dataclass(frozen=True)
class History:
    """Columns of numbers; None where a row has no value.

    Attributes:
        columns: by name, all of the same length.
        source: what to call it in messages.
    """

    columns: dict[str, list[float | None]]
    source: str

    def column(self, name: str) -> list[float | None]:
        """One column.

        Raises:
            ValueError: there is none of that name; offers the existing ones.
        """
        if name not in self.columns:
            raise ValueError(f"{self.source} has no column {name!r}; it has {', '.join(self.columns)}")
        return self.columns[name]

    def whole_column(self, name: str) -> list[float]:
        """A column in which every row has a value; rows after its last value count as not yet run.

        Raises:
            ValueError: unknown, without any value, or with a gap.
        """
        values = self.column(name)
        while values and values[-1] is None:
            values = values[:-1]
        if not values:
            raise ValueError(f"{self.source}: column {name!r} has no number")
        for row, value in enumerate(values, 1):
            if value is None or not math.isfinite(value):
                raise ValueError(f"{self.source}: column {name!r} has {_shown(value)} in row {row}")
        return [value for value in values if value is not None]


def read_history(path: Path) -> History:
    """Reads a CSV, a JSON list of rows, a JSON object of lists, JSON Lines, or a TensorBoard log (file or folder).

    Raises:
        ValueError: no such file, empty, or not in one of these formats.
    """
    if is_event_file(path):
        return History(read_scalars(path), str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    columns = _from_json(text, path) if text.lstrip()[0] in "[{" else _from_csv(text)
    if not any(value is not None for values in columns.values() for value in values):
        raise ValueError(f"{path} has no row of numbers; it needs a heading and a row for every epoch")
    return History(columns, str(path))


def metric_of(history: History, metric: str | None) -> str:
    """The column to judge: the given one, or `iou`, which fastema train writes.

    Raises:
        ValueError: none given and no `iou`, or unknown; offers the existing ones.
    """
    name = _DEFAULT_METRIC if metric is None else metric
    if metric is None and name not in history.columns:
        raise ValueError(f"which column of {history.source}? Give --metric: {', '.join(history.columns)}")
    history.column(name)
    return name


def mode_of(metric: str) -> str:
    """Whether more or less is better, by the usual names.

    Example:
        >>> mode_of("val_loss"), mode_of("iou"), mode_of("flosses")
        ('min', 'max', 'max')
    """
    words = metric.lower().replace("/", "_").replace("-", "_").replace(".", "_").replace(" ", "_").split("_")
    return "min" if any(word in _LESS_IS_BETTER for word in words) else "max"


def _from_csv(text: str) -> dict[str, list[float | None]]:
    reader = csv.reader(io.StringIO(text))
    names = [name.strip() for name in next(reader)]
    rows = [row for row in reader if row]
    return {name: [_number(row[i]) if i < len(row) else None for row in rows] for i, name in enumerate(names) if name}


def _from_json(text: str, path: Path) -> dict[str, list[float | None]]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise ValueError(f"{path} is neither JSON nor JSON Lines: {whole}") from whole
    if isinstance(found, dict) and found and all(isinstance(values, list) for values in found.values()):
        lengths = {name: len(values) for name, values in found.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{path}: its lists differ in length: {lengths}")
        return {name: [_number(value) for value in values] for name, values in found.items()}
    if isinstance(found, dict):
        found = [found]
    if isinstance(found, list) and found and all(isinstance(row, dict) for row in found):
        return _from_rows(found)
    raise ValueError(f"{path} must be a list of objects, an object of lists, or an object a line")


def _from_rows(rows: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_number(row.get(name)) for row in rows] for name in names}


def _number(value: object) -> float | None:
    """None for what is no number; NaN stays NaN, and is refused where it is used."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _shown(value: float | None) -> str:
    return "no number" if value is None else str(value)

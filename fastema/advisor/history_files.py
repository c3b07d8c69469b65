"""Histories in files: CSV, JSON, JSON Lines or TensorBoard's, a column or key per metric and a row per epoch."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastema.advisor.event_files import is_event_file, read_scalars

# Usual names of metrics of which less is better.
_LESS_IS_BETTER = ("loss", "error", "err", "mae", "mse", "rmse", "perplexity", "ppl", "fid", "wer", "cer")
_DEFAULT_METRIC = "iou"
_DELIMITERS = ",;\t"
# Metrics of an evaluation; fastema's callbacks put `_ema` between the two parts.
_VALIDATION = re.compile(r"(val|valid|validation|eval|test)([_/.\- ].*)")


@dataclass(frozen=True)
class History:
    """Columns of numbers; None where a row has no value.

    Attributes:
        columns: by name, all of the same length.
        source: what to call it in messages.
        is_log: whether it is a trainer's log, in which a row has values of those metrics only that were logged then.
    """

    columns: dict[str, list[float | None]]
    source: str
    is_log: bool = False

    def measured(self, name: str) -> History:
        """Return the rows of a log in which a metric was logged; a table with a row an epoch stays as it is."""
        if not self.is_log:
            return self
        rows = [row for row, value in enumerate(self.column(name)) if value is not None]
        return History({column: [values[row] for row in rows] for column, values in self.columns.items()}, self.source)

    def column(self, name: str) -> list[float | None]:
        """Return one column.

        Raises:
            ValueError: there is none of that name; offers the existing ones.
        """
        if name not in self.columns:
            raise ValueError(f"{self.source} has no column {name!r}; it has {', '.join(self.columns)}")
        return self.columns[name]

    def whole_column(self, name: str) -> list[float]:
        """Return a column in which every row has a value; rows after its last value count as not yet run.

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
    """Read a CSV, a JSON list of rows, a JSON object of lists, JSON Lines, or a TensorBoard log (file or folder).

    Lightning's `metrics.csv` and the Hugging Face Trainer's `trainer_state.json` are among them. A CSV may be separated
    by commas, semicolons or tabs.

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
    merged = _merged_by_step(columns)
    return History(columns if merged is None else merged, str(path), is_log=merged is not None)


def average_of(history: History, metric: str) -> str | None:
    """Return the column with the average's values of `metric`, by the usual names; None: there is none."""
    names = [f"ema_{metric}", f"val_ema_{metric}", f"{metric}_ema"]
    if match := _VALIDATION.fullmatch(metric):
        names.insert(0, f"{match[1]}_ema{match[2]}")
    return next((name for name in names if name in history.columns), None)


def metric_of(history: History, metric: str | None) -> str:
    """Return the column to judge: the given one, or `iou`, which fastema train writes, or the one with an average.

    Raises:
        ValueError: none given and no `iou`, or unknown; offers the existing ones.
    """
    name = _DEFAULT_METRIC if metric is None else metric
    averaged = [column for column in history.columns if average_of(history, column)]
    if metric is None and name not in history.columns:
        if len(averaged) == 1:
            return averaged[0]
        raise ValueError(f"which column of {history.source}? Give --metric: {', '.join(history.columns)}")
    history.column(name)
    return name


def mode_of(metric: str) -> str:
    """Return whether more or less is better, by the usual names.

    Examples:
        >>> mode_of("val_loss"), mode_of("iou"), mode_of("flosses")
        ('min', 'max', 'max')
    """
    words = re.split(r"[_/\-. ]", metric.lower())
    return "min" if any(word in _LESS_IS_BETTER for word in words) else "max"


def _from_csv(text: str) -> dict[str, list[float | None]]:
    heading = text.lstrip().partition("\n")[0]
    delimiter = max(_DELIMITERS, key=heading.count)  # the comma where there is none at all
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    names = [name.strip() for name in next(reader)]
    rows = [row for row in reader if row]
    if delimiter == ";":  # where the comma is the decimal point
        rows = [[cell.replace(",", ".") for cell in row] for row in rows]
    return {name: [_number(row[i]) if i < len(row) else None for row in rows] for i, name in enumerate(names) if name}


def _from_json(text: str, path: Path) -> dict[str, list[float | None]]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise ValueError(f"{path} is neither JSON nor JSON Lines: {whole}") from whole
    if isinstance(found, dict) and isinstance(found.get("log_history"), list):
        found = found["log_history"]
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


def _merged_by_step(columns: dict[str, list[float | None]]) -> dict[str, list[float | None]] | None:
    """Return a log with one row for each step, with the last value of each metric; None: it is no log, but a table.

    Trainers log training and validation, and the model and its average, in rows of their own.
    """
    steps = columns.get("step")
    if steps is None or None in steps or not any(None in values for values in columns.values()):
        return None
    rows = {step: row for row, step in enumerate(dict.fromkeys(steps))}
    merged: dict[str, list[float | None]] = {name: [None] * len(rows) for name in columns}
    for name, values in columns.items():
        for step, value in zip(steps, values, strict=True):
            if value is not None:
                merged[name][rows[step]] = value
    return merged


def _number(value: object) -> float | None:
    """Return a float, or None for what is no number; NaN stays NaN, and is refused where it is used."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _shown(value: float | None) -> str:
    return "no number" if value is None else str(value)

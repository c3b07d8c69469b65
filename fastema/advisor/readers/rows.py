"""A row of a log, and the cells that readers turn into its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastema.advisor.metric_names import is_epoch, is_step, split_of, words_of

#: What was logged at once, by name; NaN stays NaN.
Row = dict[str, float]

#: A name that no column has: counts the headings of a table, where a second run begins.
PART = "\0part"

_WRAPPED = re.compile(r"(?:tensor|(?:np|numpy|torch)\.\w+|array)\(\s*([^,()]*?)\s*(?:,[^()]*)?\)")
_CELL = re.compile(
    r"([-+]?[\d.,]*\d[\d.,]*(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf(?:inity)?))\s*(?:%|(?:±|\+/-|\().*)?", re.I
)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")
# Columns of text that say whose numbers a row has.
_SPLIT_COLUMNS = frozenset({"mode", "phase", "split", "stage", "subset", "set", "part", "model", "weights"})


def number_of(cell: object) -> float | None:
    """Return the number of a cell; None for what is none. Of a list: of COCO's the first (AP), else the mean.

    Examples:
        >>> number_of("85.2%"), number_of("tensor(0.5, device='cuda:0')"), number_of("NA"), number_of([1, 3])
        (85.2, 0.5, None, 2.0)
    """
    if isinstance(cell, bool) or cell is None:
        return None
    if isinstance(cell, int | float):
        return float(cell)
    if isinstance(cell, list | tuple):
        return mean_of(number for number in map(number_of, cell) if number is not None)
    if not isinstance(cell, str):
        return None
    text = _WRAPPED.sub(r"\1", cell.strip())
    if text.startswith("[") and text.endswith("]"):
        return number_of(re.split(r"[,\s]+", text[1:-1].strip()))
    if _THOUSANDS.fullmatch(text):
        return float(text.replace(",", ""))
    match = _CELL.fullmatch(text)
    try:
        return float(match[1]) if match else None
    except ValueError:
        return None


def mean_of(numbers: Iterable[float]) -> float | None:
    """Return the mean of those that are no NaN; None of none."""
    kept = [number for number in numbers if not math.isnan(number)]
    return sum(kept) / len(kept) if kept else None


def row_of(cells: Mapping[str, Any], prefix: str = "") -> Row:
    """Return the numbers of nested cells, by their names joined with a slash."""
    row: Row = {}
    for name, cell in cells.items():
        full = f"{prefix}{name}".strip()
        if isinstance(cell, Mapping):
            row |= row_of(cell, f"{full}/")
            continue
        if isinstance(cell, list) and "coco" in full.lower():
            cell = cell[0] if cell else None  # pycocotools' statistics: the first is AP
        if full and (number := number_of(cell)) is not None:
            row[full] = number
    return row


def rows_by_split(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows; where a column of text says "train", "val" or "ema", it tells names apart that several have."""
    splits = [_split_of_record(record) for record in records]
    rows = [row_of(record) for record in records]
    seen: dict[str, set[str]] = {}
    for row, split in zip(rows, splits, strict=True):
        for name in row:
            seen.setdefault(name, set()).add(split or "")
    both = {
        name
        for name, found in seen.items()
        if ({"train"} < found or {"ema"} < found) and split_of(name) is None and not _counts(name)
    }
    return [
        {f"{split}/{name}" if split and name in both else name: value for name, value in row.items()}
        for row, split in zip(rows, splits, strict=True)
    ]


def merged(rows: Iterable[Row]) -> list[Row]:
    """Join neighbouring rows of one moment: trainers log the model and its average one after the other."""
    joined: list[Row] = []
    for row in rows:
        now = _moment(row)
        if joined and now and now == _moment(joined[-1]) and all(joined[-1].get(k, v) == v for k, v in row.items()):
            joined[-1] = {**joined[-1], **row}
        else:
            joined.append(dict(row))
    return joined


def _moment(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name == PART or is_epoch(name) or is_step(name)}


def _split_of_record(record: Mapping[str, Any]) -> str | None:
    for name, cell in record.items():
        if not isinstance(cell, str) or name.strip().lower() not in _SPLIT_COLUMNS:
            continue
        if split := "ema" if "ema" in words_of(cell) else split_of(cell):
            return split
    return None


def _counts(name: str) -> bool:
    return bool({"epoch", "iter", "step", "lr", "time", "iteration"} & set(words_of(name)))

"""JSON, JSON Lines and the logs written in them: mmengine, mmcv, detectron2, DETR, Hugging Face, W&B."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastema.advisor.readers.rows import Row, row_of, rows_by_split

# Where a trainer says how long the run is to be.
_TOTALS = {"max_steps": "steps", "num_train_epochs": "epochs"}
_ROWS = ("log_history", "history", "logs", "epochs", "records")


def read_json(text: str, path: Path) -> tuple[list[Row], dict[str, float]]:
    """Return the rows and the planned length ("steps", "epochs") of one JSON value or of several, a line each.

    Raises:
        ValueError: not JSON, or without objects.
    """
    found, complaint = _values(text)
    if not found:
        raise ValueError(f"{path} is neither JSON nor JSON Lines: {complaint}")
    if len(found) > 1:
        records = [value for value in found if isinstance(value, Mapping)]
        if records:
            return rows_by_split(records), {}
    rows, totals = _rows_of(found[0])
    if not rows:
        raise ValueError(f"{path} must be a list of objects, an object of lists, or an object a line")
    return rows, totals


def _values(text: str) -> tuple[list[Any], str]:
    """Return the JSON values that stand one after the other, without one that was cut off, and what is wrong."""
    decoder, at = json.JSONDecoder(), 0
    values: list[Any] = []
    while True:
        match = re.compile(r"[\s,]*").match(text, at)
        at = match.end() if match else at
        if at == len(text):
            return values, ""
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            at = text.find("\n", at) + 1
            if not values or at == 0:
                return values, str(error)
            continue
        values.append(value)


def _rows_of(value: Any) -> tuple[list[Row], dict[str, float]]:
    if isinstance(value, list):
        records = [record for record in value if isinstance(record, Mapping)]
        return rows_by_split(records), {}
    if not isinstance(value, Mapping):
        return [], {}
    totals = {kind: float(value[name]) for name, kind in _TOTALS.items() if isinstance(value.get(name), int | float)}
    for name in _ROWS:
        if isinstance(value.get(name), list | Mapping):
            return _rows_of(value[name])[0], totals
    lists = _lists_of(value)
    if lists:
        return _rows_of_lists(lists), totals
    # An object an epoch: {"0": {...}, "epoch_1": {...}}.
    numbered = {name: re.fullmatch(r"\D*(\d+)\D*", name) for name in value}
    if value and all(numbered.values()) and all(isinstance(each, Mapping) for each in value.values()):
        return [{"epoch": float(match[1]), **row_of(value[name])} for name, match in numbered.items() if match], totals
    row = row_of(value)
    return [row] if row else [], totals


def _lists_of(value: Mapping[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """Return the lists of numbers in nested objects, by their names joined with a slash."""
    lists: dict[str, list[Any]] = {}
    for name, each in value.items():
        if isinstance(each, Mapping):
            lists |= _lists_of(each, f"{prefix}{name}/")
        elif isinstance(each, list) and each and not isinstance(each[0], Mapping):
            lists[f"{prefix}{name}"] = each
    return lists


def _rows_of_lists(lists: dict[str, list[Any]]) -> list[Row]:
    """Return rows of lists; those of another length were logged at other moments, and have rows of their own."""
    rows = []
    for length in dict.fromkeys(map(len, lists.values())):
        together = {name: values for name, values in lists.items() if len(values) == length}
        rows += [row_of({name: values[i] for name, values in together.items()}) for i in range(length)]
    return rows

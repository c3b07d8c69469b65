"""Tables with commas, semicolons, tabs, bars or blanks: CSV of any trainer, exports of W&B, MLflow and TensorBoard."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fastema.advisor.metric_names import is_epoch, is_metric, is_step, known_mode_of
from fastema.advisor.readers.rows import PART, Row, number_of, rows_by_split

_FIRST_LINES = 20  # in which the heading is looked for
_MISSING = frozenset({"NA", "N/A", "NONE", "NULL", "-", "NAN"})
_RULE = re.compile(r"[\s|+:=─━┼┿-]*")
_NAME = re.compile(r"[\W\d_]*[^\W\d_].*(?<![:=,;])$")  # has a letter, and is no key of a text
_PAIR = re.compile(r"[A-Za-z\])]\s*[:=]\s*[-+.\d]")
# A long table: a row a number, whose name stands in a column of its own.
_NAME_COLUMNS, _VALUE_COLUMNS = ("key", "metric", "tag", "name", "metric_name"), ("value", "val", "metric_value")


def read_table(text: str, path: Path) -> list[Row] | None:
    """Return the rows of a table; None: it is none."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "//"))]
    if rows := _mlflow_rows(lines, path):
        return rows
    for at, heading in enumerate(lines[:_FIRST_LINES]):
        for split in _SPLITTERS:
            names = split(heading)
            if not _is_heading(names) or ((at > 0 or split is _blanks) and not any(map(_is_known, names))):
                continue
            body = [cells for line in lines[at + 1 :] if not _RULE.fullmatch(line) for cells in [split(line)]]
            fitting = [cells for cells in body if _fits(cells, names)]
            if fitting and len(fitting) >= 0.6 * len(body):
                return _rows(names, fitting, path)
    return _without_heading(lines, path)


def _commas(line: str) -> list[str]:
    return _cells(line, ",")


def _semicolons(line: str) -> list[str]:
    # Where the comma is the decimal point.
    return [re.sub(r"^(\s*[-+]?\d*),(\d+)", r"\1.\2", cell) for cell in _cells(line, ";")]


def _tabs(line: str) -> list[str]:
    return _cells(line, "\t")


def _bars(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"[|│┃]", line.strip().strip("|│┃"))]


def _blanks(line: str) -> list[str]:
    return line.split()


_SPLITTERS: Sequence[Callable[[str], list[str]]] = (_commas, _semicolons, _tabs, _bars, _blanks)


def _cells(line: str, delimiter: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader(io.StringIO(line), delimiter=delimiter, skipinitialspace=True))]


def _is_heading(cells: Sequence[str]) -> bool:
    named = [cell for cell in cells if cell]
    return bool(named) and all(
        number_of(cell) is None and cell.upper() not in _MISSING and _NAME.match(cell) and not _PAIR.search(cell)
        for cell in named
    )


def _is_known(name: str) -> bool:
    return is_epoch(name) or is_step(name) or (is_metric(name) and known_mode_of(name) is not None)


def _fits(cells: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether a line is a row under the names, or another heading."""
    if len(names) == 1:
        return len(cells) == 1 and (number_of(cells[0]) is not None or list(cells) == list(names))
    if not 2 <= len(cells) <= len(names) + 1:
        return False
    return any(number_of(cell) is not None for cell in cells) or (len(cells) == len(names) and _is_heading(cells))


def _rows(names: list[str], body: list[list[str]], path: Path) -> list[Row]:
    records: list[dict[str, object]] = []
    part = 0
    for cells in body:
        # Appended by a second run, or by one that was resumed; it may have other columns.
        if _is_heading(cells) and (len(names) > 1 or cells == names):
            names, part = cells, part + 1
            continue
        record: dict[str, object] = {name: cell for name, cell in zip(names, cells, strict=False) if name}
        records.append({**record, PART: part} if part else record)
    _unpivot(records)
    for record in records:
        if "Value" in record and {"Wall time", "Step"} >= set(record) - {"Value", PART}:
            record[_tag_of(path)] = record.pop("Value")
    return rows_by_split(records)


def _unpivot(records: list[dict[str, object]]) -> None:
    """Name the values of a long table, which has a row for each number."""
    names = next(iter(records), {})
    key = next((name for name in names if name.lower() in _NAME_COLUMNS and number_of(names[name]) is None), None)
    value = next((name for name in names if name.lower() in _VALUE_COLUMNS), None)
    if key is None or value is None:
        return
    for record in records:
        if value in record and record.get(key):
            record[str(record[key])] = record.pop(value)


def _tag_of(path: Path) -> str:
    """Return the tag of a file that TensorBoard saved, which only the file's name has."""
    tag = re.split(r"[-_]tag[-_]", path.stem)[-1]
    return tag if known_mode_of(tag) is not None else "Value"


def _mlflow_rows(lines: Sequence[str], path: Path) -> list[Row]:
    """Return the rows of one of MLflow's metric files: milliseconds, value and step, without a heading."""
    cells = [line.split() for line in lines]
    if not cells or any(len(row) != 3 or not re.fullmatch(r"\d{13}", row[0]) for row in cells):
        return []
    folders = path.parts[path.parts.index("metrics") + 1 :] if "metrics" in path.parts[:-1] else (path.name,)
    name = "/".join(folders)
    return [{"step": step, name: value} for _, *rest in cells for value, step in [map(float, rest)]]


def _without_heading(lines: Sequence[str], path: Path) -> list[Row] | None:
    for split in _SPLITTERS:
        cells = [split(line) for line in lines]
        numbers = [[number_of(cell) for cell in row] for row in cells]
        if len({len(row) for row in numbers}) == 1 and all(number is not None for row in numbers for number in row):
            names = [path.stem] if len(numbers[0]) == 1 else [f"column {i + 1}" for i in range(len(numbers[0]))]
            return [dict(zip(names, map(float, row), strict=True)) for row in numbers]  # type: ignore[arg-type]
    return None

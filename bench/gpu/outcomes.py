"""A plugin of pytest: `-p bench.gpu.outcomes`. Every test's outcome is a line of a file as soon as it is known.

FASTEMA_OUTCOMES is the file, FASTEMA_OUTCOMES_OF what the lines are of (a step and a digest of the sources). A test
that passed in an earlier run of the same is not run again; one that was cut runs last, lest it hang before all others.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.results import read_lines

_MOST_REASON = 300


def outcomes(path: Path, of: str) -> dict[str, dict[str, Any]]:
    """Return the last line of each test; a test without an outcome was cut: "begun"."""
    return {line["test"]: line for line in read_lines(path) if line.get("of") == of and "test" in line}


def count(lines: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Return how many tests there are of each outcome."""
    return Counter(str(line["outcome"]) for line in lines)


class _Recorder:
    def __init__(self, path: Path, of: str) -> None:
        self._path, self._of = path, of
        self._before = outcomes(path, of)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if self._outcome(item) == "passed"]
        if done:
            config.hook.pytest_deselected(items=done)
        left = [item for item in items if self._outcome(item) != "passed"]
        items[:] = sorted(left, key=lambda item: self._outcome(item) == "begun")

    def _outcome(self, item: pytest.Item) -> str | None:
        return self._before.get(item.nodeid, {}).get("outcome")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, "begun", 0.0, "")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = (yield).get_result()
        if report.when == "call" or (report.when == "setup" and not report.passed) or report.failed:
            self._write(item.nodeid, report.outcome, call.duration, "" if report.passed else _reason(report))

    def _write(self, test: str, outcome: str, seconds: float, reason: str) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "of": self._of}
        with self._path.open("a") as file:
            file.write(json.dumps(line | ({"reason": reason} if reason else {})) + "\n")


def _reason(report: pytest.TestReport) -> str:
    """Return why a test was skipped, or the end of what it failed with."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")[:_MOST_REASON]
    return str(report.longrepr)[-_MOST_REASON:]


def pytest_configure(config: pytest.Config) -> None:
    """Begin to record."""
    config.pluginmanager.register(_Recorder(Path(os.environ["FASTEMA_OUTCOMES"]), os.environ["FASTEMA_OUTCOMES_OF"]))

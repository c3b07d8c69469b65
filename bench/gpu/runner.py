"""Run the steps of a call one after the other, each in a process of its own, and keep what came out at once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.gpu.outcomes import count, outcomes
from bench.gpu.results import PACKAGE, ROOT, device_name, pack_log, read, sources_digest, write

CALL_SECONDS = 540.0  # of the ten minutes that a command may take
#: What a test may skip for on a machine with one GPU.
EXPECTED_SKIPS = re.compile(r"one (GPU|CUDA device)$|needs \d+ GiB of free GPU memory")
_MOST_SHOWN = 8000  # characters of the commands' output, of all steps together
_FAILURE_SHOWN = 1000  # of one that failed
_KEPT = 4000  # characters of the end of a command's output in results.json; all of it is in logs.txt.gz


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        command: what runs, in the repository's folder.
        seconds: its limit.
        of: the files and folders whose change makes it due again.
        environment: beside the process's own.
        again: run in every call, also where it passed before.
        stops: nothing that follows means anything where it fails.
        optional: where it fails the call has not failed.
        tests: a pytest, of which at least one test must pass, and none skip for a reason that nobody expects.
        sees: a pattern that the output must have.
        any_status: the exit status does not matter.
        shows: characters of the output's end that are printed where it passes.
        writes: a file in the folder of results that is removed when the step is due again because of `of`.
    """

    name: str
    command: Sequence[str]
    seconds: float
    of: Sequence[str] = (*PACKAGE, "bench")
    environment: Mapping[str, str] = field(default_factory=dict)
    again: bool = False
    stops: bool = False
    optional: bool = False
    tests: bool = False
    sees: str = ""
    any_status: bool = False
    shows: int = 0
    writes: str = ""


class Runner:
    """The steps of one call.

    Args:
        folder: of results.json, tests.jsonl, logs.txt.gz, running.log (the output of the command that runs now) and
            what the commands write.
        go_on: run also what follows a step that `stops`.
        seconds: of the whole call; what does not fit is left for the next.
    """

    def __init__(self, folder: Path, go_on: bool = False, seconds: float = CALL_SECONDS) -> None:
        self._folder, self._go_on = folder, go_on
        self._deadline = time.monotonic() + seconds
        self._path = folder / "results.json"
        self._running = folder / "running.log"
        self._tests = folder / "tests.jsonl"
        self._left_to_show = _MOST_SHOWN
        if self._running.is_file():
            pack_log(self._running, "what was cut")
        self._results = read(self._path)

    def run(self, steps: Sequence[Step]) -> bool:
        """Run what is not done yet; return whether every step that is not optional has passed."""
        done: dict[str, dict[str, Any]] = {}
        for number, step in enumerate(steps, 1):
            print(f"== {number}/{len(steps)} {step.name}: ", end="", flush=True)
            before = self._steps().get(step.name, {})
            of = sources_digest(step.of)
            if before.get("outcome") == "passed" and before.get("of") == of and not step.again:
                print(f"passed before, in {before['seconds']} s", flush=True)
                done[step.name] = before
                continue
            left = self._deadline - time.monotonic()
            if left < 5:
                print("the time is up: run the same command again to go on")
                break
            if step.writes and before.get("of") != of:
                (self._folder / step.writes).unlink(missing_ok=True)
            self._keep(step, {"outcome": "begun", "of": of})
            result, output = self._run(step, of, min(step.seconds, left))
            self._keep(step, result | {"of": of, "said": output[-_KEPT:]})
            done[step.name] = result
            why = f": {result['why']}" if result["why"] else ""
            print(f"{result['outcome']} in {result['seconds']} s{why}", flush=True)
            passed = result["outcome"] == "passed"
            self._show(output, step.shows if passed else max(step.shows, _FAILURE_SHOWN))
            if step.stops and not passed and not self._go_on:
                print("nothing that follows would mean anything: stopped")
                break
        return self._sum_up(steps, done)

    def _steps(self) -> dict[str, dict[str, Any]]:
        return self._results.setdefault("steps", {})

    def _keep(self, step: Step, result: dict[str, Any]) -> None:
        self._results |= {"device": device_name(), "torch": torch.__version__}
        self._steps()[step.name] = result
        write(self._path, self._results)

    def _run(self, step: Step, of: str, seconds: float) -> tuple[dict[str, Any], str]:
        """Return what a step came to, and its output."""
        begin = time.monotonic()
        if shutil.which(step.command[0]) is None:
            return {"outcome": "not run", "why": f"there is no {step.command[0]}", "seconds": 0.0}, ""
        of_tests = {"FASTEMA_OUTCOMES": str(self._tests), "FASTEMA_OUTCOMES_OF": f"{step.name} {of}"}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **of_tests, **step.environment}
        command = ["timeout", "--kill-after=10", str(max(1, int(seconds))), *step.command]
        with self._running.open("wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            try:
                status = process.wait()
            finally:  # an interrupt, or the end of this process by a signal: `timeout` takes the command with it
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        taken = round(time.monotonic() - begin, 1)
        output = pack_log(self._running, f"{step.name}: {' '.join(step.command)}")
        outcome, why = self._judge(step, of, status, output, taken >= seconds - 1)
        return {"outcome": outcome, "why": why, "seconds": taken, "status": status}, output

    def _judge(self, step: Step, of: str, status: int, output: str, in_time: bool) -> tuple[str, str]:
        if status in (124, 137) and in_time:
            return "cut", "it took too long; the next call goes on" if step.tests else "it took too long"
        missing = step.sees and re.search(step.sees, output) is None
        if missing:
            return "failed", f"its output lacks {step.sees!r}"
        if step.tests:
            return _judge_tests(list(outcomes(self._tests, f"{step.name} {of}").values()), status)
        if status != 0 and not step.any_status:
            return "failed", f"status {status}"
        return "passed", ""

    def _show(self, output: str, most: int) -> None:
        """Print the end of a command's output, as far as the reply has room for it."""
        shown = output.rstrip()[-min(most, self._left_to_show) :] if min(most, self._left_to_show) > 0 else ""
        self._left_to_show -= len(shown)
        if shown:
            print("\n".join(f"   {line}" for line in shown.splitlines()), flush=True)

    def _sum_up(self, steps: Sequence[Step], done: Mapping[str, Mapping[str, Any]]) -> bool:
        wrong = [one.name for one in steps if done.get(one.name, {}).get("outcome", "left") != "passed"]
        needed = [one.name for one in steps if one.name in wrong and not one.optional]
        words = [f"{name} ({done[name]['outcome'] if name in done else 'left'})" for name in wrong]
        print(
            f"{len(steps) - len(wrong)} of {len(steps)} steps passed" + (f"; not: {', '.join(words)}" if words else "")
        )
        print(f"in {self._folder}: {', '.join(sorted(path.name for path in self._folder.iterdir()))}")
        return not needed


def _judge_tests(lines: Sequence[Mapping[str, Any]], status: int) -> tuple[str, str]:
    """Return what the tests of a step came to, over all calls."""
    counts = count(lines)
    skips = sorted({str(line.get("reason", "")) for line in lines if line["outcome"] == "skipped"})
    summary = ", ".join(f"{number} {'cut' if outcome == 'begun' else outcome}" for outcome, number in counts.items())
    odd = [reason for reason in skips if EXPECTED_SKIPS.search(reason) is None]
    if counts["passed"] == 0:
        return "failed", f"no test passed ({summary or 'none ran'}{': ' + '; '.join(odd) if odd else ''})"
    if counts["failed"] or counts["begun"]:
        return "failed", summary
    if odd:
        return "failed", f"{summary}; skipped for a reason that is not expected: {'; '.join(odd)}"
    if status not in (0, 5):  # 5: all had passed before, and none was left
        return "failed", f"status {status}; {summary}"
    return "passed", summary


def print_dry_run(steps: Sequence[Step], folder: Path) -> None:
    """Print what would run, in which limits, and what it needs that is not here."""
    for step in steps:
        settings = "".join(f"{name}={value} " for name, value in step.environment.items())
        notes = ", optional" if step.optional else ""
        print(f"{step.name} (at most {step.seconds:g} s{notes}): {settings}{' '.join(step.command)}")
    needed = {"nvcc", *(step.command[0] for step in steps)}
    missing = sorted(tool for tool in needed if shutil.which(tool) is None)
    missing += [] if torch.cuda.is_available() else ["a CUDA device"]
    print(f"missing here: {', '.join(missing) or 'nothing'}; results: {folder}; python: {sys.executable}")

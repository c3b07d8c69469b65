"""Tests that run on several processes: `@on_ranks(2)` above a test, and its body runs once in each of them.

Importing torch takes seconds, so one process imports the file and forks the ranks, and they run all its tests one after
the other, in the file's order. The body gets a `Rank`; a test passes if it passed on every rank.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 240.0  # seconds, for all tests of a file on one number of ranks
COLLECTIVE_TIMEOUT = 60.0  # seconds; a rank that waits for one that failed gives up then


@dataclass(frozen=True)
class Rank:
    """One process of several; the process group is initialised."""

    rank: int
    world: int
    folder: Path  # one for all ranks, of this test alone


Body = Callable[[Rank], None]
_bodies: dict[tuple[str, int], dict[str, Body]] = {}  # (module, world) -> test name -> body


def on_ranks(world: int) -> Callable[[Body], Callable[[], None]]:
    """Make a test of a function that runs on `world` processes."""

    def decorate(body: Body) -> Callable[[], None]:
        module, name = body.__module__.rpartition(".")[2], body.__name__
        _bodies.setdefault((module, world), {})[name] = body

        def test() -> None:
            outcomes = [
                each.get(name, f"not run; {each.get('process', 'a test before it failed')}")
                for each in _run(module, world)
            ]
            # Of all ranks: one that fails breaks the connection of the others, and their errors say only that.
            failed = [f"on rank {rank} of {world}: {text}" for rank, text in enumerate(outcomes) if text != "passed"]
            assert not failed, "\n".join(failed)

        test.__name__, test.__doc__ = name, body.__doc__
        return pytest.mark.slow(test)

    return decorate


@functools.cache
def _run(module: str, world: int) -> list[dict[str, str]]:
    """Run all tests of `module` on `world` ranks; return their outcomes by name, rank by rank."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # the host's own name may not resolve
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),  # pytest's too
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cases.distributed", module, str(world), folder]
        with open(Path(folder, "log"), "wb") as log:
            parent = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                parent.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(parent.pid, signal.SIGKILL)  # the ranks too
                parent.wait()
        return [_outcomes(Path(folder), rank, parent.returncode) for rank in range(world)]


def _outcomes(folder: Path, rank: int, returncode: int) -> dict[str, str]:
    lines = folder / f"{rank}.json"
    outcomes = dict(json.loads(line) for line in lines.read_text().splitlines()) if lines.exists() else {}
    if returncode:
        tail = (folder / "log").read_text(errors="replace")[-3000:]
        outcomes["process"] = f"a rank ended with {returncode} (-9: after {TIMEOUT:.0f} s)\n{tail}"
    return outcomes


def _fork_ranks(module: str, world: int, folder: Path) -> int:
    """Import the module once and fork the ranks; return the first exit status that is not 0."""
    import torch

    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    importlib.import_module(module)  # fills _bodies
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _be_a_rank(module, rank, world, folder)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return next((abs(status) for status in statuses if status), 0)


def _be_a_rank(module: str, rank: int, world: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # before autograd's threads do: in torch 2.10 two at once have ended a forked process
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, world_size=world, rank=rank)
    failed = dist.FileStore(f"{folder}/failed", world)
    for name, body in _bodies[module, world].items():
        (folder / name).mkdir(exist_ok=True)
        torch.manual_seed(0)
        try:
            body(Rank(rank, world, folder / name))
            outcome = "passed"
        except BaseException:
            outcome = traceback.format_exc()
        with open(folder / f"{rank}.json", "a") as file:
            file.write(json.dumps([name, outcome]) + "\n")
        if outcome != "passed" and failed.add(name, 1) < world:
            time.sleep(1.0)
            if failed.add(name, 0) < world:  # the others may wait in a collective that this rank will never enter
                os._exit(0)
    dist.destroy_process_group()


if __name__ == "__main__":
    # As a script this module would be there twice, with two tables.
    itself = importlib.import_module("cases.distributed")
    sys.exit(itself._fork_ranks(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))

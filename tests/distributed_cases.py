"""Tests that run on several processes: `@on_ranks(2)` above a test, and its body runs once in each of them.

Importing torch takes seconds, so the processes are started once for all such tests of a file, and run them one after
the other in the file's order. The body gets what a rank needs; the test passes where it passed on every rank.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

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
    """Makes a test of a function that runs on `world` processes."""

    def decorate(body: Body) -> Callable[[], None]:
        module, name = body.__module__.rpartition(".")[2], body.__name__
        _bodies.setdefault((module, world), {})[name] = body

        def test() -> None:
            for rank, outcomes in enumerate(_run(module, world)):
                outcome = outcomes.get(name, f"not run; {outcomes.get('process', 'a test before it failed')}")
                assert outcome == "passed", f"on rank {rank} of {world}: {outcome}"

        test.__name__, test.__doc__ = name, body.__doc__
        return test

    return decorate


@functools.cache
def _run(module: str, world: int) -> list[dict[str, str]]:
    """Runs all tests of `module` on `world` ranks; their outcomes by name, rank by rank."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # the host's own name may not resolve
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),  # pytest's too
    }
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world):
            command = [sys.executable, __file__, module, str(rank), str(world), folder]
            log = open(Path(folder, f"{rank}.log"), "wb")  # noqa: SIM115 - the process has it
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            log.close()
        try:
            end = time.monotonic() + TIMEOUT
            for process in processes:
                process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [_outcomes(Path(folder), rank, process.returncode) for rank, process in enumerate(processes)]


def _outcomes(folder: Path, rank: int, returncode: int) -> dict[str, str]:
    lines = folder / f"{rank}.json"
    outcomes = dict(json.loads(line) for line in lines.read_text().splitlines()) if lines.exists() else {}
    if returncode:
        tail = (folder / f"{rank}.log").read_text(errors="replace")[-3000:]
        outcomes["process"] = f"its process ended with {returncode} (-9: after {TIMEOUT:.0f} s)\n{tail}"
    return outcomes


def _be_a_rank(module: str, rank: int, world: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    importlib.import_module(module)  # fills _bodies
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
    itself = importlib.import_module("distributed_cases")
    itself._be_a_rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))

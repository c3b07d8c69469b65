"""`python -m bench.busy [--quick] [--json FILE] [--threads N]`

What an update costs beside other busy processes, as a loader's workers are. The benchmark makes its own load: 0, 1 and
4 processes that spin. Means count here, and 95th percentiles: what waits for a thread that is not scheduled takes a
time slice of several ms, rarely or always. Implementations take turns in blocks of calls in a row.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from bench.contenders.libraries import LIBRARIES
from bench.contenders.peers import FOREACH, MULTI_FN, OURS
from bench.harness import cases
from bench.harness.cases import Case, build_model
from bench.harness.console import duration, print_table
from bench.harness.contender import Peer
from bench.harness.measure import Budget, timing_of
from bench.harness.race import assemble, dtypes
from bench.harness.records import Timing
from bench.harness.session import Session, run_benchmarks

ONE_THREAD = f"{OURS.name}, one thread"
LOADS = (0, 1, 4)
_BLOCK_SECONDS = 0.05
_SETTLE_SECONDS = 0.2

FRESH_UPDATES = 150
_FRESH = """
import json, sys
from bench import busy
print(json.dumps(busy.first_means(*sys.argv[1:])))
"""

# Ends with its parent, however that ends.
_SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


def bench_name(processes: int) -> str:
    """Return the name under which the records of a load are filed."""
    return f"busy: {processes}"


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keeps as many processes spinning."""
    spinning = [subprocess.Popen([sys.executable, "-S", "-E", "-c", _SPIN]) for _ in range(processes)]
    try:
        time.sleep(_SETTLE_SECONDS)
        yield
    finally:
        for process in spinning:
            process.kill()
        for process in spinning:
            process.wait()


def blocks_in_turns(calls: Mapping[str, tuple[int, Callable[[], object]]], budget: Budget) -> dict[str, Timing]:
    """Times blocks of calls in a row, the implementations in turns.

    Args:
        calls: threads and call, by implementation.
        budget: rounds of one block each.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    threads_before = torch.get_num_threads()
    order = list(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget.seconds
        for turn in range(budget.most):
            if turn >= budget.least and time.perf_counter() > deadline:
                break
            shuffle(order)
            for name in order:
                threads, call = calls[name]
                torch.set_num_threads(threads)
                call()  # finds what the one before has left in the caches
                end = time.perf_counter() + _BLOCK_SECONDS
                while True:
                    begin = time.perf_counter_ns()
                    call()
                    samples[name].append((time.perf_counter_ns() - begin) / 1e3)
                    if time.perf_counter() > end:
                        break
    finally:
        gc.enable()
        torch.set_num_threads(threads_before)
    return {name: timing_of(taken) for name, taken in samples.items()}


def measure(session: Session, case: Case, entrants: Sequence[Peer], seconds: float) -> None:
    """One table: everybody on the case, under every load."""
    missed_before = len(session.run.missing)
    contenders = assemble(session, "busy", case, entrants, alone=True)
    everything = torch.get_num_threads()
    calls = {peer.name: (everything, contender.run) for peer, contender in contenders.items()}
    calls[ONE_THREAD] = (1, contenders[OURS].run)
    backends = {peer.name: contender.backend for peer, contender in contenders.items()}
    backends[ONE_THREAD] = backends[OURS.name]
    rows: dict[str, list[str]] = {name: [name] for name in calls}
    loads = (0, 4) if session.quick else LOADS
    for processes in loads:
        with load(processes):
            timings = blocks_in_turns(calls, session.budget(seconds))
        for name, timing in timings.items():
            backend = backends.get(name) or "torch"
            session.record(bench_name(processes), case, name, backend, timing, "warm", bytes_floor=case.update_bytes)
            rows[name] += [duration(value or 0.0) for value in (timing.median_us, timing.mean_us, timing.p95_us)]
    columns = [""]
    for processes in loads:
        columns += [f"{processes} busy: median", "mean", "p95"]
    print_table(f"beside busy processes: {case.name}, {dtypes(case)}", columns, list(rows.values()))
    for one in session.run.missing[missed_before:]:
        print(f"  not measured: {one.impl}: {one.reason}")


def first_means(maker: str, order: str) -> dict[str, float]:
    """Return mean microseconds of this process's first updates on all threads and on one.

    Args:
        maker: a function of bench.harness.cases.
        order: "all first" or "one first".
    """
    case: Case = getattr(cases, maker)()
    run = OURS.build(build_model(case, torch.device("cpu")), case).run
    everything = torch.get_num_threads()
    means = {}
    for name in ("all", "one") if order == "all first" else ("one", "all"):
        torch.set_num_threads(everything if name == "all" else 1)
        begin = time.perf_counter()
        for _ in range(FRESH_UPDATES):
            run()
        means[name] = (time.perf_counter() - begin) / FRESH_UPDATES * 1e6
    return means


def measure_fresh(session: Session, maker: str, processes: int) -> None:
    """Print one table: ratios of all threads to one, in fresh processes, under every load."""
    rows = []
    for spinning in (0, 4) if session.quick else LOADS:
        ratios, means = [], []
        with load(spinning):
            for index in range(processes):
                order = ("all first", "one first")[index % 2]
                command = [sys.executable, "-c", _FRESH, maker, order]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                ratios.append(found["all"] / found["one"])
                means.append(found["all"])
        figures = [f"{statistics.median(ratios):.2f} x", f"{max(ratios):.2f} x"]
        rows.append([f"{spinning} busy", duration(statistics.median(means)), *figures])
    title = f"first {FRESH_UPDATES} updates of {processes} fresh processes: {maker.replace('_', ' ')}"
    print_table(title, ["", "mean, all threads", "of one thread: median", "worst"], rows)


def run(session: Session) -> None:
    """All tables."""
    entrants = (OURS, FOREACH, MULTI_FN) if session.quick else (OURS, FOREACH, *LIBRARIES)
    makers = (cases.small_tensors, cases.segmentation_list, cases.one_large_tensor)
    for make_case in makers[:1] if session.quick else makers:
        measure(session, make_case(), entrants, 8)
        measure_fresh(session, make_case.__name__, 2 if session.quick else 12)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_benchmarks("bench.busy", "An update beside busy processes.", {"busy": run}, arguments)


if __name__ == "__main__":
    sys.exit(main())

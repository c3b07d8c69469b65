"""One run of the benchmarks, and the command line that every benchmark has."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.harness.cases import Case
from bench.harness.console import print_environment
from bench.harness.machine import device_name, environment, pin, settle_allocator, versions
from bench.harness.measure import Budget, sweeper
from bench.harness.meters import Call, Meter, meter_for
from bench.harness.records import Cache, InstructionCount, Missing, Record, Run, Timing, load, save


@dataclass
class Session:
    """The device, the meter and the records of one run.

    Args:
        quick: fewer cases, and only peers that import fast.
        stretch: factor of the time that every table gets.
        path: the file of records, or None.
        before: benchmark, case and cache of the tables that the file held, where the run goes on with it.
    """

    device: torch.device
    meter: Meter
    quick: bool = False
    stretch: float = 1.0
    run: Run = field(default_factory=lambda: Run({}))
    path: Path | None = None
    before: frozenset[tuple[str, str, Cache]] = frozenset()

    @cached_property
    def sweep(self) -> Call:
        """Return a call that empties the caches."""
        return sweeper(self.device)

    def budget(self, seconds: float, least: int = 5) -> Budget:
        """Return the time for one table; a quick run takes a quarter of it."""
        return Budget(seconds * self.stretch * (0.25 if self.quick else 1.0), least=3 if self.quick else least)

    def keep(self) -> None:
        """Write the file: after each table, so that an interrupted run leaves what it measured."""
        if self.path is not None:
            save(self.run, self.path)

    def miss(self, bench: str, case: str, impl: str, reason: object) -> None:
        self.run.missing.append(Missing(bench, case, impl, str(reason)))

    def record(
        self,
        bench: str,
        case: Case,
        impl: str,
        backend: str,
        timing: Timing | None = None,
        cache: Cache = "cold",
        bytes_floor: int | None = None,
        copy_gbps: float | None = None,
        shadows: int = 1,
        launches: int | None = None,
        extra_bytes: int | None = None,
    ) -> Record:
        """Add a record; `copy_gbps`: bandwidth of the copy that took turns with it."""
        gbps = bytes_floor / timing.median_us / 1e3 if bytes_floor and timing is not None else None
        record = Record(
            bench=bench,
            case=case.name,
            impl=impl,
            backend=backend,
            device=device_name(self.device),
            dtype_shadow=str(case.shadow_dtype).removeprefix("torch."),
            dtype_live=str(case.live_dtype).removeprefix("torch."),
            tensors=case.tensors,
            params=case.params,
            shadows=shadows,
            median_us=timing.median_us if timing else None,
            p10_us=timing.p10_us if timing else None,
            p90_us=timing.p90_us if timing else None,
            host_us=timing.host_us if timing else None,
            bytes_floor=bytes_floor,
            gbps=gbps,
            # From a cache, a share of the memory's bandwidth means nothing.
            copy_share=gbps / copy_gbps if gbps and copy_gbps and cache == "cold" else None,
            launches=launches,
            extra_bytes=extra_bytes,
            versions=versions(),
            min_us=timing.min_us if timing else None,
            samples=timing.samples if timing else 0,
            cache=cache,
            mean_us=timing.mean_us if timing else None,
            p95_us=timing.p95_us if timing else None,
        )
        self.run.records.append(record)
        return record

    def count(self, case: str, impl: str, backend: str, instructions: int) -> None:
        self.run.instructions.append(InstructionCount(case, impl, backend, instructions, versions()))


Benchmark = Callable[[Session], None]


def run_benchmarks(
    program: str,
    description: str,
    benchmarks: dict[str, Benchmark],
    arguments: Sequence[str] | None = None,
    prepare: Benchmark | None = None,
) -> int:
    """Run the command line of one benchmark or of all; return the exit status.

    Args:
        program: its name, as in `bench.update`.
        description: first line of its help.
        benchmarks: by name, in their order.
        arguments: of the command line; None for the process's own.
        prepare: runs first, as "copy".
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases, fewer peers, less time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument(
        "--go-on", action="store_true", help="keep what FILE holds of this machine, and measure the rest"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads, each kept on a core (default: torch's)")
    parser.add_argument("--seconds", type=float, default=1.0, help="stretch the time of every table (default: 1)")
    parsed = parser.parse_args(arguments)
    _check(parser, parsed)
    pin(parsed.threads)
    settle_allocator()
    device = torch.device(parsed.device)
    run = _run_to_go_on(device, parsed.json if parsed.go_on else None)
    session = Session(device, meter_for(device), parsed.quick, parsed.seconds, run, parsed.json, run.tables)
    print_environment(session.run.environment)
    for name, benchmark in {**({"copy": prepare} if prepare else {}), **benchmarks}.items():
        if name in session.run.seconds:
            continue
        begin = time.perf_counter()
        benchmark(session)
        session.run.seconds[name] = round(time.perf_counter() - begin, 1)
        session.keep()
    print("seconds:", ", ".join(f"{name} {seconds:.0f}" for name, seconds in session.run.seconds.items()))
    if parsed.json is not None:
        print(f"written: {parsed.json}")
    return 0


def _run_to_go_on(device: torch.device, path: Path | None) -> Run:
    """Return what the file holds of this machine and these packages; an empty run where it holds none."""
    here = environment(device)
    if path is not None and path.is_file():
        before = load([path])
        if all(before.environment.get(key) == here[key] for key in ("device", "threads", "versions")):
            return before
    return Run(here)


def _check(parser: argparse.ArgumentParser, parsed: Any) -> None:
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if parsed.threads is not None and parsed.threads < 1:
        parser.error(f"--threads must be at least 1, got {parsed.threads}")
    if not parsed.seconds > 0:
        parser.error(f"--seconds must be positive, got {parsed.seconds:g}")
    if parsed.go_on and parsed.json is None:
        parser.error("--go-on needs --json, the file to go on with")
    if parsed.json is not None and not parsed.json.parent.is_dir():
        parser.error(f"--json: there is no folder {parsed.json.parent}")

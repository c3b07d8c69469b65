"""One run of the benchmarks: the machine, what was found so far, and the command line that every benchmark has."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.clocks import Call, Clock, clock_for
from bench.machine import device_name, environment, pin, settle_allocator, versions
from bench.measure import Budget, sweeper
from bench.records import Cache, InstructionCount, Missing, Record, Run, Timing, save
from bench.table import print_environment


@dataclass
class Session:
    """One run.

    Args:
        quick: fewer cases, and only peers whose import takes no time.
        stretch: of the time that every table gets.
    """

    device: torch.device
    clock: Clock
    quick: bool = False
    stretch: float = 1.0
    run: Run = field(default_factory=lambda: Run({}))

    @cached_property
    def sweep(self) -> Call:
        """Empties the caches."""
        return sweeper(self.device)

    def budget(self, seconds: float, least: int = 5) -> Budget:
        """For one table of a full run; a quick one gets a quarter of it."""
        return Budget(seconds * self.stretch * (0.25 if self.quick else 1.0), least=3 if self.quick else least)

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
        """Keeps what was found; `copy_gbps`: of the copy that took turns with it."""
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
            # What lies in a cache has no share of the memory's bandwidth.
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
    """The command line of one benchmark or of all; returns the exit status.

    Args:
        program: as it is called.
        description: its first line of help.
        benchmarks: by name, in their order.
        arguments: None: those of the process.
        prepare: measured before all of them.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases, fewer peers, less time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads, each kept on a core (default: torch's)")
    parser.add_argument("--seconds", type=float, default=1.0, help="stretch the time of every table (default: 1)")
    parsed = parser.parse_args(arguments)
    _check(parser, parsed)
    pin(parsed.threads)
    settle_allocator()
    device = torch.device(parsed.device)
    session = Session(device, clock_for(device), parsed.quick, parsed.seconds, Run(environment(device)))
    print_environment(session.run.environment)
    for name, benchmark in {**({"copy": prepare} if prepare else {}), **benchmarks}.items():
        begin = time.perf_counter()
        benchmark(session)
        session.run.seconds[name] = round(time.perf_counter() - begin, 1)
        if parsed.json is not None:  # each time: a run that is cut short has measured something all the same
            save(session.run, parsed.json)
    print("seconds:", ", ".join(f"{name} {seconds:.0f}" for name, seconds in session.run.seconds.items()))
    if parsed.json is not None:
        print(f"written: {parsed.json}")
    return 0


def _check(parser: argparse.ArgumentParser, parsed: Any) -> None:
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if parsed.threads is not None and parsed.threads < 1:
        parser.error(f"--threads must be at least 1, got {parsed.threads}")
    if not parsed.seconds > 0:
        parser.error(f"--seconds must be positive, got {parsed.seconds:g}")
    if parsed.json is not None and not parsed.json.parent.is_dir():
        parser.error(f"--json: there is no folder {parsed.json.parent}")

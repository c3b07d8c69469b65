"""How it is measured.

Medians with p10 and p90 of single calls. All implementations of a case take turns within one run, in a new order every
round, so that whatever else the machine does hits all of them. Warm: each timed call follows a millisecond of untimed
ones of the same implementation. Cold: each implementation rotates over several models, together larger than the
last-level cache, as weights are cold in a training step. Bandwidth is the floor of bytes over time, and its share is of
the copy bandwidth that this machine shows in the same run.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

import fastema

Call = Callable[[], object]
Cache = Literal["warm", "cold"]

_PEERS_WITH_VERSIONS = ("timm", "ema-pytorch", "torch-ema", "diffusers", "lightning", "triton")
_WARM_UP_SECONDS = 1e-3
_DEFAULT_CACHE_BYTES = 32 << 20  # where the system does not tell


@dataclass(frozen=True)
class Budget:
    """How long one case may be measured.

    Args:
        seconds: rounds go on until then.
        least, most: rounds, whatever the time.
    """

    seconds: float
    least: int = 5
    most: int = 2000


@dataclass(frozen=True)
class Timing:
    """Microseconds a call. `host_us`: until the call returned, where that is not the whole (a GPU works on)."""

    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    samples: int
    host_us: float | None = None


@dataclass(frozen=True)
class Record:
    """One implementation on one case. None: does not apply, or was not measured.

    Args:
        bench: "copy", "update", "host", "several" or "swap".
        impl: the implementation, in the words of the table; `backend`: whose kernels it runs.
        tensors, params: of the model; shadows: how many averages of it.
        median_us, p10_us, p90_us, min_us, host_us: see `Timing`.
        bytes_floor: what must be read and written at least; gbps: that over the median, in 1e9 bytes a second.
        copy_share: gbps as a share of the copy's in the same run.
        launches: kernels and copies on a GPU.
        extra_bytes: beyond the model and its shadow: kept, and the peak within a call.
    """

    bench: str
    case: str
    impl: str
    backend: str
    device: str
    dtype_shadow: str
    dtype_live: str
    tensors: int
    params: int
    shadows: int
    median_us: float
    p10_us: float
    p90_us: float
    host_us: float | None
    bytes_floor: int | None
    gbps: float | None
    copy_share: float | None
    launches: int | None
    extra_bytes: int | None
    versions: dict[str, str]
    min_us: float
    samples: int
    cache: Cache

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ---- clocks ----


class Clock(Protocol):
    """How long one call takes, in microseconds."""

    has_host_part: bool

    def device_us(self, call: Call, expected_host_us: float) -> float: ...

    def host_us(self, call: Call) -> float: ...

    def launches(self, call: Call) -> int | None: ...

    def peak_bytes(self, call: Call) -> int: ...

    def synchronize(self) -> None: ...


class CpuClock:
    """The wall clock; on a CPU a call has done its work when it returns."""

    has_host_part = False

    def device_us(self, call: Call, expected_host_us: float = 0.0) -> float:
        begin = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begin) / 1e3

    def host_us(self, call: Call) -> float:
        return self.device_us(call)

    def launches(self, call: Call) -> None:
        return None

    def peak_bytes(self, call: Call) -> int:
        """The most that torch's allocator holds within the call, beyond what it held before."""
        cpu = torch.profiler.ProfilerActivity.CPU
        with _silent_stderr(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            call()
        assert profile.profiler is not None
        results = profile.profiler.kineto_results
        level = peak = 0
        for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return peak

    def synchronize(self) -> None:
        pass


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Kineto, torch's profiler, announces every start and stop on the file descriptor itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


class CudaClock:
    """CUDA events. Written for the machine that has a GPU; it has not been run on one.

    Device time and host time come from different rounds. For the device's, the stream first gets a sleep longer than
    the host needs to enqueue the call, so that the two events enclose the device's work without gaps where it waits for
    the host (an implementation that synchronises within its call waits the sleep out and shows its gaps, as it should).
    For the host's, the queue is empty and the clock stops when the call returns.
    """

    has_host_part = True
    _CYCLES_PER_US = 2000  # of the fastest chips; a sleep that is too long costs only patience
    _LONGEST_SLEEP_US = 20_000.0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def device_us(self, call: Call, expected_host_us: float) -> float:
        self.synchronize()
        torch.cuda._sleep(int(self._CYCLES_PER_US * min(2 * expected_host_us + 20, self._LONGEST_SLEEP_US)))
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e3

    def host_us(self, call: Call) -> float:
        self.synchronize()
        begin = time.perf_counter_ns()
        call()
        elapsed = (time.perf_counter_ns() - begin) / 1e3
        self.synchronize()
        return elapsed

    def launches(self, call: Call) -> int:
        self.synchronize()
        cuda = torch.profiler.ProfilerActivity.CUDA
        with _silent_stderr(), torch.profiler.profile(activities=[cuda]) as profile:
            call()
            self.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    def peak_bytes(self, call: Call) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self._device) - before

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


# ---- taking turns ----


def take_turns(calls: Mapping[str, Sequence[Call]], clock: Clock, cache: Cache, budget: Budget) -> dict[str, Timing]:
    """Times all implementations of a case, one call each a round.

    Args:
        calls: by implementation; several calls of one are the same work on other memory, taken in rotation.
        clock: of the device.
        cache: "warm" makes untimed calls of the same before each timed one.
        budget: how many rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    for name, copies in calls.items():  # what is built on first use (plans, caches, thread pools) is no update's cost
        for call in copies:
            call()
        host[name].append(clock.host_us(copies[0]))
    order = list(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()  # as timeit does: a collection would hit whoever is on at the time
    try:
        # On a GPU a round is either for the device's time or for the host's.
        rounds_a_sample = 2 if clock.has_host_part else 1
        deadline = time.perf_counter() + budget.seconds
        for turn in range(budget.most * rounds_a_sample):
            if turn >= budget.least * rounds_a_sample and time.perf_counter() > deadline:
                break
            shuffle(order)
            for name in order:
                call = calls[name][turn % len(calls[name])]
                if cache == "warm":
                    _warm_up(call)
                if turn % rounds_a_sample == 0:
                    samples[name].append(clock.device_us(call, host[name][-1]))
                else:
                    host[name].append(clock.host_us(call))
    finally:
        gc.enable()
    return {name: _timing(samples[name], host[name] if clock.has_host_part else []) for name in calls}


def _warm_up(call: Call) -> None:
    """Once is not enough for a call of microseconds: the last one's data and branches are still everywhere."""
    until = time.perf_counter() + _WARM_UP_SECONDS
    call()
    while time.perf_counter() < until:
        call()


def _timing(samples: list[float], host: list[float]) -> Timing:
    ordered = sorted(samples)
    return Timing(
        median_us=percentile(ordered, 50),
        p10_us=percentile(ordered, 10),
        p90_us=percentile(ordered, 90),
        min_us=ordered[0],
        samples=len(ordered),
        host_us=percentile(sorted(host), 50) if host else None,
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of an ascending list, with linear interpolation.

    Example:
        >>> percentile([1.0, 2.0, 4.0], 50), percentile([1.0, 2.0, 4.0], 75)
        (2.0, 3.0)
    """
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def rounds_until_cold(bytes_a_round: int, device: torch.device) -> int:
    """After how many rounds twice the last-level cache has passed, so that memory seen before them is cold."""
    return max(1, math.ceil(2 * cache_bytes(device) / max(bytes_a_round, 1)))


# ---- the machine ----


def cache_bytes(device: torch.device) -> int:
    """The last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def device_name(device: torch.device) -> str:
    """As in the name of the file of results: the model of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of what takes part, as far as it is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "fastema": fastema.__version__}
    for package in _PEERS_WITH_VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader must know about the machine. `load`: other work at the start; above about 0.3, mistrust the run."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": versions(),
    }

"""Meters: the time, the launches and the memory of one call. One class per kind of device."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]


class Allocated(NamedTuple):
    """Bytes beyond those allocated before a call: after it, and at its peak."""

    kept: int
    peak: int


class Meter(Protocol):
    """The measurements of a call: times in microseconds, memory in bytes."""

    has_host_part: bool

    def device_us(self, call: Call, expected_host_us: float) -> float:
        """Return the time of the device's work alone."""

    def host_us(self, call: Call) -> float:
        """Return the time until the call returns."""

    def wall_us(self, call: Call) -> float:
        """Return the time from an idle device until it is idle again."""

    def launches(self, call: Call) -> int | None:
        """Return the number of kernels and copies; None on a CPU."""

    def allocated(self, call: Call) -> Allocated:
        """Return what torch's allocator allocated for the call."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""


class CpuMeter:
    """The wall clock: on a CPU a call has done its work when it returns."""

    has_host_part = False

    def device_us(self, call: Call, expected_host_us: float = 0.0) -> float:
        begin = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begin) / 1e3

    def host_us(self, call: Call) -> float:
        return self.device_us(call)

    def wall_us(self, call: Call) -> float:
        return self.device_us(call)

    def launches(self, call: Call) -> None:
        return None

    def allocated(self, call: Call) -> Allocated:
        cpu = torch.profiler.ProfilerActivity.CPU
        profiler = torch.profiler.profile(activities=[cpu], profile_memory=True)
        with _without_collections(), _silent_stderr(), profiler as profile:
            call()
        assert profile.profiler is not None
        results = profile.profiler.kineto_results
        level = peak = 0
        for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return Allocated(level, peak)

    def synchronize(self) -> None:
        pass


@contextmanager
def _without_collections() -> Iterator[None]:
    """Collect garbage before the block and not within it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence the file descriptor: torch's profiler (Kineto) writes to it at every start and stop."""
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


class CudaMeter:
    """CUDA events.

    Device time and host time come from different rounds. For device time, the stream first sleeps for longer than the
    host needs to enqueue the call, so that the device never waits for the host between the two events (an
    implementation that synchronises within its call does wait, and its time includes that). For host time, the queue is
    empty and the time ends when the call returns.
    """

    has_host_part = True
    _CYCLES_PER_US = 2000  # of the fastest chips; a sleep that is too long only makes the benchmark slower
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

    def wall_us(self, call: Call) -> float:
        self.synchronize()
        begin = time.perf_counter_ns()
        call()
        self.synchronize()
        return (time.perf_counter_ns() - begin) / 1e3

    def launches(self, call: Call) -> int:
        self.synchronize()
        cuda = torch.profiler.ProfilerActivity.CUDA
        with _silent_stderr(), torch.profiler.profile(activities=[cuda]) as profile:
            call()
            self.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    def allocated(self, call: Call) -> Allocated:
        with _without_collections():
            self.synchronize()
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            call()
            self.synchronize()
        after, peak = (count(self._device) for count in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated))
        return Allocated(after - before, peak - before)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def meter_for(device: torch.device) -> Meter:
    return CudaMeter(device) if device.type == "cuda" else CpuMeter()


def captured(call: Call) -> Call:
    """Capture the call in a CUDA graph and return its replay.

    Raises:
        RuntimeError: the call cannot be captured, for example because it synchronises.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay

"""The device of the tests that need one with streams: CUDA, or the test accelerator in a process that has loaded it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

IS_CUDA = not hasattr(torch, "hostgpu")  # tests/accelerator/load.py
DEVICE = "cuda" if IS_CUDA else "hostgpu"
#: With kernels of their own there; on the test accelerator also what runs on one that has none.
BACKENDS = ["native", "triton"] if IS_CUDA else ["native", "torch"]
gpu: Any = torch.get_device_module(DEVICE)

NO_GPU = "no CUDA device: run `make gpu-test` on a machine with one"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not gpu.is_available(), reason=NO_GPU)]
needs_cuda = pytest.mark.skipif(not IS_CUDA, reason="the test accelerator has no graphs, compiler or collectives")


def new_stream() -> Any:
    return torch.cuda.Stream() if IS_CUDA else torch.Stream(DEVICE)


def current_stream() -> Any:
    return torch.cuda.current_stream() if IS_CUDA else torch.accelerator.current_stream()


def on(stream: Any) -> AbstractContextManager[Any]:
    return torch.cuda.stream(stream) if IS_CUDA else stream


def sleep() -> None:
    """Make what is enqueued on the current stream from now on run after what the host does next."""
    if IS_CUDA:
        torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
    else:
        gpu.sleep(0.2)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Open a block in which an operation that waits for the device raises."""
    gpu.set_sync_debug_mode("error")
    try:
        yield
    finally:
        gpu.set_sync_debug_mode("default")


def allocations() -> int:
    return torch.cuda.memory_stats()["allocation.all.allocated"] if IS_CUDA else gpu.allocations()


def enqueued_by(run: Callable[[], object]) -> list[str]:
    """Return what `run()` gives to the device: kernels, copies, fills."""
    gpu.synchronize()
    if not IS_CUDA:
        before = gpu.tasks()
        run()
        return ["task"] * (gpu.tasks() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        gpu.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]

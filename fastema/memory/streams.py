"""Streams of a device of any kind: the current one, new ones, events, captures, and the memory that they use.

The functions are those of the device's own module (`torch.cuda`, `torch.xpu`), else those of `torch.accelerator`.
csrc/plan.cpp does the same through torch's device guard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_ONE_QUEUE = ("cpu", "mps", "meta")  # everything that torch enqueues there runs in order


def has_streams(device: torch.device) -> bool:
    """Return whether work on the device may run beside other work on it."""
    return device.type not in _ONE_QUEUE


def is_available(device_type: str) -> bool:
    """Return whether torch sees a device of this kind; True for kinds that torch has no module for."""
    try:
        module = torch.get_device_module(device_type)
    except RuntimeError:
        return True
    return getattr(module, "is_available", lambda: True)()


def with_index(device: torch.device) -> torch.device:
    """Return "cuda" as the current CUDA device, and so for every kind; a device with an index as it is."""
    if device.index is not None or not has_streams(device) or not is_available(device.type):
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())


def current_stream(device: torch.device) -> torch.Stream:
    """Return the stream that work for `device` is enqueued on now."""
    return _function(device, "current_stream")(device)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Open a block in which `device` is the current one; no other device gets a context by it."""
    module = torch.get_device_module(device)
    if hasattr(module, "device"):
        return module.device(device)
    return torch.accelerator.device_index(device.index)


@contextmanager
def on_stream(stream: torch.Stream) -> Iterator[None]:
    """Open a block whose work is enqueued on `stream`, of the current device."""
    before = current_stream(stream.device)
    set_stream = _function(stream.device, "set_stream")
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


def new_stream(device: torch.device) -> torch.Stream:
    """Return a stream of the device's own class where it has one, as `current_stream()` does."""
    return getattr(torch.get_device_module(device), "Stream", torch.Stream)(device)


def new_event(device: torch.device) -> torch.Event:
    """Return an event for streams of `new_stream`; a thread that waits for it sleeps, where the device offers that.

    Stream and event come from one module: a torch.cuda.Event cannot be recorded on a torch.Stream.
    """
    if device.type == "cuda":  # elsewhere torch does not offer it
        return torch.cuda.Event(blocking=True)
    own = getattr(torch.get_device_module(device), "Event", None)
    return torch.Event(device) if own is None else own()


def is_capturing() -> bool:
    """Return whether the current stream of the accelerator is being captured into a graph."""
    if not torch.accelerator.is_available():
        return False
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    return getattr(module, "is_current_stream_capturing", lambda: False)()


@cache
def can_copy_to_pinned(device: torch.device) -> bool:
    """Return whether the device has streams, and pinned host memory that a copy on one of them reaches."""
    if not has_streams(device) or not is_available(device.type):
        return False
    try:
        new_stream(device)
        return torch.empty(1, device="cpu", pin_memory=True).is_pinned()
    except (RuntimeError, NotImplementedError):  # the device lacks one of the two
        return False


def _function(device: torch.device, name: str) -> Any:
    return getattr(torch.get_device_module(device), name, None) or getattr(torch.accelerator, name)


class Streams:
    """Tensors of a plan, recorded once on every stream that uses them.

    Otherwise the allocator could reuse their memory while a kernel on another stream still reads it.

    Args:
        device: where the tensors are; nothing is recorded if it has one queue.
    """

    def __init__(self, device: torch.device, tensors: Iterable[Tensor]) -> None:
        self._device = device
        self._tensors = list(tensors) if has_streams(device) else []
        self._seen: list[torch.Stream] = []

    def note_current(self) -> None:
        """Record the tensors on the current stream of their device."""
        if not self._tensors:
            return
        stream = current_stream(self._device)
        if stream not in self._seen:
            self._seen.append(stream)
            for tensor in self._tensors:
                tensor.record_stream(stream)

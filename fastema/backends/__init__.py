"""The backends, which run updates and exchanges: one module each.

A backend is a module with
    NAME                                         "native", "triton", "torch"
    why_unusable(device_type)                    None, or the reason why it cannot run on that kind of device
    probe(device)                                None, or the reason why it cannot run on this one: asks the device
    describe(device_type)                        what runs there
    Plan, StorageExchange, Watch                 see contract.py
    second_owner(tensor)                         another storage over the memory of `tensor`, which it keeps alive
`native` has also
    device_schedule_launch(device)               one step of a DeviceCounter in one launch, or None
`triton` has a Plan alone, and takes the rest from `host`. `native.Plan` has `update_watched(watch, ...)` too: the check
and the update in one call.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, accelerator, float32
from torch import device as Device  # not `import torch`: the submodule of that name would take its place

from fastema.backends import native, triton
from fastema.backends import torch as plain_torch
from fastema.memory.streams import with_index

device_schedule_launch = native.device_schedule_launch
BACKENDS: dict[str, ModuleType] = {"native": native, "triton": triton, "torch": plain_torch}


@dataclass(frozen=True)
class BackendReport:
    """One line of `fastema info`."""

    name: str
    usable: bool
    detail: str


def report() -> list[BackendReport]:
    """Return which backends can run here, on which devices, and why one cannot."""
    lines = []
    for name, backend in BACKENDS.items():
        for device in _devices():
            reason = backend.why_unusable(device.type) or backend.probe(device)
            detail = reason if reason is not None else backend.describe(device.type)
            lines.append(BackendReport(f"{name} ({device})", reason is None, detail))
    return lines


def _devices() -> list[Device]:
    """Return every device; where there is no accelerator, "cuda" stands for the one that is missing."""
    kind = accelerator.current_accelerator() if accelerator.is_available() else None
    if kind is None:
        return [Device("cpu"), Device("cuda")]
    return [Device("cpu"), *(Device(kind.type, index) for index in range(accelerator.device_count()))]


def default_name() -> str:
    """Return FASTEMA_BACKEND, or "auto"."""
    return os.environ.get("FASTEMA_BACKEND") or "auto"


def select(name: str, device: Device | str) -> ModuleType:
    """Return the backend for tensors on `device`; "auto": native, else on a GPU triton, else torch.

    Each is probed on the device before it is taken. A backend that was built but cannot run there is warned of, once.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot run there.
    """
    device = with_index(Device(device))
    if name != "auto":
        if name not in BACKENDS:
            known = ", ".join(["auto", *BACKENDS])
            raise ValueError(f"unknown backend {name!r} (argument or FASTEMA_BACKEND); known: {known}")
        reason = BACKENDS[name].why_unusable(device.type) or BACKENDS[name].probe(device)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot run on {device}: {reason}")
        return BACKENDS[name]
    reasons: list[str] = []
    was_built = False
    for backend in (native, triton) if device.type != "cpu" else (native,):
        reason = backend.why_unusable(device.type)
        if reason is None:
            reason = backend.probe(device)
            was_built = was_built or reason is not None
        if reason is None:
            if was_built:
                _warn_once(f"fastema runs its {backend.NAME} backend on {device}: {'; '.join(reasons)}")
            return backend
        reasons.append(f"{backend.NAME}: {reason}")
    _warn_once(f"fastema runs its torch backend on {device}, slower than its own kernels: {'; '.join(reasons)}")
    return plain_torch


def skips_on(devices: Sequence[Device], skip: Tensor | None) -> list[Tensor | None]:
    """Return `skip` on each device, so that the plans of a model on several devices agree whether there is an update.

    Raises:
        ValueError: it is no float32 scalar. Nothing was enqueued.
    """
    if skip is None:
        return [None] * len(devices)
    if skip.dtype != float32 or skip.numel() != 1:
        raise ValueError(f"found_inf must be 1 {float32}, got {skip.numel()} {skip.dtype}")
    copies = {device: skip.detach().to(device) for device in dict.fromkeys(devices)}
    return [copies[device] for device in devices]


def host(name: str) -> ModuleType:
    """Return the backend whose StorageExchange and Watch to use; they need no kernel for the device."""
    return plain_torch if name == "torch" or native.why_unusable("cpu") is not None else native


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)

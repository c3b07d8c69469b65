"""The backends: who runs an update. One small contract, one module each.

A backend is a module with
    NAME                                         "native", "triton", "torch"
    why_unusable(device_type)                    None, or the reason why it cannot run there
    describe(device_type)                        what runs there
    Plan(shadows, lives, copies, views)          see csrc/plan.h
    StorageExchange(lives, others, managed, parts), second_owner(tensor)    see csrc/storage_exchange.h
    Watch(dicts, tensors, shadows, loose)                                   see csrc/watch.h
and the C++ classes of `native` and the Python ones of `torch` are twins, held to the same tests. `triton` has a Plan
alone, and takes the rest from `host`.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from types import ModuleType

from fastema.backends import native, triton
from fastema.backends import torch as plain_torch

BACKENDS: dict[str, ModuleType] = {"native": native, "triton": triton, "torch": plain_torch}


@dataclass(frozen=True)
class BackendReport:
    """One line of `fastema info`."""

    name: str
    usable: bool
    detail: str


def report() -> list[BackendReport]:
    """Which backends can run here, on what, and why one cannot."""
    lines = []
    for name, backend in BACKENDS.items():
        for device_type in ("cpu", "cuda"):
            reason = backend.why_unusable(device_type)
            detail = reason if reason is not None else backend.describe(device_type)
            lines.append(BackendReport(f"{name} ({device_type})", reason is None, detail))
    return lines


def default_name() -> str:
    """FASTEMA_BACKEND, or "auto"."""
    return os.environ.get("FASTEMA_BACKEND") or "auto"


def select(name: str, device_type: str) -> ModuleType:
    """The backend for tensors on `device_type`; "auto": native, else on CUDA triton, else torch.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot run there.
    """
    if name == "auto":
        reason = native.why_unusable(device_type)
        if reason is None:
            return native
        if device_type == "cuda":
            no_triton = triton.why_unusable(device_type)
            if no_triton is None:
                return triton
            reason = f"{reason}; {no_triton}"
        _warn_once(f"fastema runs its torch backend on {device_type}, slower than its own kernels: {reason}")
        return plain_torch
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"unknown backend {name!r} (argument or FASTEMA_BACKEND); known: {known}")
    reason = BACKENDS[name].why_unusable(device_type)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run on {device_type}: {reason}")
    return BACKENDS[name]


def host(name: str) -> ModuleType:
    """Whose StorageExchange and Watch to use: they need a compiler, but no kernel for the device."""
    return plain_torch if name == "torch" or native.why_unusable("cpu") is not None else native


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)

"""The native backend: fastema._C, the C++ plan with the CPU and CUDA kernels.

The compiled module may be missing, or built for another torch: `why_unusable()` then returns the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastema.backends import loading
from fastema.memory.streams import is_available

NAME = "native"

_C: Any = None
_import_error: str | None = None
try:
    sys.modules["fastema._C"] = _C = loading.load(loading.extension_file())
except ImportError as error:
    _import_error = f"{type(error).__name__}: {error}"
else:
    Plan, StorageExchange, Watch = _C.Plan, _C.StorageExchange, _C.Watch


def second_owner(tensor: torch.Tensor) -> torch.Tensor:
    """Return a second storage over the memory of a tensor's, as bytes; what replaces one frees nothing of the other."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    _C.make_second_owner(tensor, flat)
    return flat


def _build_record() -> dict[str, str | None]:
    """Return what setup.py could not build, and why."""
    try:
        return json.loads((loading.FOLDER / "_build_record.json").read_text())
    except (OSError, ValueError):
        return {}


def why_unusable(device_type: str) -> str | None:
    """Return why the backend cannot run on this kind of device, or None."""
    if _C is None:
        reason = _build_record().get("extension") or _import_error
        return f"fastema._C is not available ({reason}); `python -m fastema build` compiles it, with a C++ compiler"
    if device_type == "cpu":
        return None
    if device_type != _C.gpu_type():
        return f"there are no kernels for {device_type}"
    if not _C.has_cuda():
        return f"fastema._C was built without CUDA ({_build_record().get('cuda') or 'no record'})"
    if not is_available(device_type):
        return "built, but torch sees no CUDA device"
    return None


@cache
def probe(device: torch.device) -> str | None:
    """Return why the kernels cannot run on this device (no machine code for it, or too old a driver), or None."""
    if device.type == "cpu":
        return None
    try:
        reason = _C.probe_cuda(device.index)
    except RuntimeError as error:  # torch's own, if the driver is too old for torch as well
        reason = str(error).partition("\n")[0]
    if reason is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"its CUDA kernels cannot run on {torch.cuda.get_device_name(device)} ({reason}); reinstall on this machine or "
        f'with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
    )


def device_schedule_launch(device: torch.device) -> Callable[..., None] | None:
    """Return the function that runs a step of a DeviceCounter in one launch; None: it cannot run on this device."""
    if device.type == "cpu" or why_unusable(device.type) is not None or probe(device) is not None:
        return None
    return _C.advance_clock


def describe(device_type: str) -> str:
    """Describe what runs on this kind of device."""
    if device_type != "cpu":
        return "CUDA kernels, swap by pointer"
    threads, file = torch.get_num_threads(), Path(_C.__file__).name
    return f"C++ kernels ({_C.cpu_isa()}, {threads} threads), swap by pointer; {file}"

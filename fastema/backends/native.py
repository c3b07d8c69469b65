"""The native backend: fastema._C, the C++ plan with the CPU and CUDA kernels.

The compiled module may be missing, or built for another torch: `why_unusable()` then returns the reason.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # its libraries must be loaded before fastema._C

from fastema.backends.building import extension_name
from fastema.backends.streams import is_available

NAME = "native"
FOLDER = Path(__file__).parent.parent


def _table(library: Path, function: str) -> int:
    """Return the address of a library's kernels; see csrc/kernel_tables.h."""
    find = getattr(ctypes.CDLL(str(library)), function)
    find.restype = ctypes.c_void_p
    return find()


def _current_stream() -> int:
    """Return the address of torch's function for it; 0: its streams tell their handle themselves, or there are none."""
    library = Path(torch.__file__).parent / "lib/libtorch_cuda.so"
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11) or not library.is_file():
        return 0
    function = ctypes.CDLL(str(library)).aoti_torch_get_current_cuda_stream
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _loaded() -> ModuleType:
    """Load fastema._C, the extension for this torch."""
    path = FOLDER / f"{extension_name(torch.__version__)}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    spec = importlib.util.spec_from_file_location("fastema._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use_kernels(gpu: Path) -> None:
    """Let the extension run the kernels of fastema/_kernels.so, and those of `gpu` if there is such a file."""
    _C.use_kernels(
        cpu=_table(FOLDER / "_kernels.so", "fastema_cpu_kernels"),
        gpu=_table(gpu, "fastema_gpu_kernels") if gpu.is_file() else 0,
        current_stream=_current_stream(),
    )


_C: Any = None
_import_error: str | None = None
try:
    sys.modules["fastema._C"] = _C = _loaded()
    use_kernels(FOLDER / "_cuda.so")
except (ImportError, OSError) as error:
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
        return json.loads((FOLDER / "_build_record.json").read_text())
    except (OSError, ValueError):
        return {}


def why_unusable(device_type: str) -> str | None:
    """Return why the backend cannot run on this kind of device, or None."""
    if _C is None:
        reason = _build_record().get("extension") or _import_error
        return f"fastema._C is not available ({reason}); reinstall with --no-build-isolation and a C++ compiler"
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
    """Return the function that runs a step of a DeviceSchedule in one launch; None: it cannot run on this device."""
    if device.type == "cpu" or why_unusable(device.type) is not None or probe(device) is not None:
        return None
    return _C.advance_clock


def describe(device_type: str) -> str:
    """Describe what runs on this kind of device."""
    if device_type != "cpu":
        return "CUDA kernels, swap by pointer"
    return f"C++ kernels ({_C.cpu_isa()}, {torch.get_num_threads()} threads), swap by pointer"

"""The machine: its name, caches, memory, cores and package versions."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastema

_PEERS_WITH_VERSIONS = ("timm", "ema-pytorch", "torch-ema", "diffusers", "lightning", "ultralytics", "triton")
_DEFAULT_CACHE_BYTES = 32 << 20  # where the system does not tell


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def free_bytes(device: torch.device) -> int | None:
    """Return the memory available without swapping; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def tidy_up() -> None:
    """Collect garbage and return freed memory to the system, so that `free_bytes` counts it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def settle_allocator() -> None:
    """Bring glibc's allocator into the state in which a training step leaves it, where temporaries reuse freed memory.

    After a block of almost 32 MB was freed, glibc no longer asks the system for each smaller block. Without this, peers
    that make temporaries took up to three times as long, from page faults alone.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)


@cache
def device_name(device: torch.device) -> str:
    """Return the model of the processor or of the GPU."""
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


def cores() -> list[int]:
    """Return the cores that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(threads: int | None) -> None:
    """Set the number of threads (None: leave torch's) and bind the process to as many cores."""
    if threads is not None:
        torch.set_num_threads(threads)
    usable = cores()
    if usable and torch.get_num_threads() <= len(usable):
        os.sched_setaffinity(0, usable[: torch.get_num_threads()])


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that are measured, as far as they are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "fastema": fastema.__version__}
    for package in _PEERS_WITH_VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader must know about the machine. `load`: above about 0.3, do not trust the timings."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "cache_bytes": cache_bytes(device),
        "free_bytes": free_bytes(device),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": versions(),
    }

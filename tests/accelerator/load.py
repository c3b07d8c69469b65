"""Build the test accelerator and load it, in a process of its own: torch knows one accelerator, and never forgets it.

FASTEMA_TEST_ACCELERATOR=kernels   fastema._C runs csrc/cuda_kernels.cu, compiled for this device
FASTEMA_TEST_ACCELERATOR=plain     fastema._C has no kernels for it
FASTEMA_SANITIZE=thread            both under ThreadSanitizer, whose runtime must be loaded already
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

NAME = "hostgpu"
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FLAGS = [
    "-O1",
    "-g1",
    "-fno-tree-loop-distribute-patterns",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    "-Wno-sign-compare",
]
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def _built(name: str, sources: list[Path], flags: list[str], **options: Any) -> Any:
    """Compile what has changed, and load it. Processes that start together wait for the first."""
    kind = os.environ.get("FASTEMA_SANITIZE")
    sanitize = [f"-fsanitize={kind}", "-fno-omit-frame-pointer"] if kind else []
    folder = ROOT / "build" / f"accelerator{f'-{kind}' if kind else ''}" / name
    folder.mkdir(parents=True, exist_ok=True)
    preload = os.environ.pop("LD_PRELOAD", None)  # the sanitizer's runtime is not for the compiler
    try:
        return _compiled(name, sources, [*FLAGS, *flags, *sanitize], sanitize, folder, options)
    finally:
        if preload is not None:
            os.environ["LD_PRELOAD"] = preload


def _compiled(
    name: str, sources: list[Path], flags: list[str], link_flags: list[str], folder: Path, options: Any
) -> Any:
    return cpp_extension.load(
        name,
        [str(source) for source in sources],
        extra_cflags=flags,
        extra_ldflags=link_flags,
        extra_include_paths=[str(HERE), str(ROOT / "csrc"), str(ROOT / "tests/csrc/cuda_on_host/include")],
        build_directory=str(folder),
        **options,
    )


def _current_device(device: torch.device | int) -> Any:
    """Return a block with this current device, as `torch.cuda.device`."""
    return torch.accelerator.device_index(device if isinstance(device, int) else device.index)


def load_if_asked() -> None:
    """Do what FASTEMA_TEST_ACCELERATOR says; before fastema is imported."""
    wanted = os.environ.get("FASTEMA_TEST_ACCELERATOR")
    if wanted is not None:
        load(with_kernels={"kernels": True, "plain": False}[wanted])


def load(with_kernels: bool) -> types.ModuleType:
    """Register the accelerator with torch, as `torch.hostgpu`; `with_kernels`: before fastema is imported."""
    device = _built("hostgpu_device", [HERE / "device.cpp", HERE / "torch_device.cpp"], [])
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.__dict__.update({name: getattr(device, name) for name in dir(device) if not name.startswith("_")})
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device=_current_device,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,  # its random numbers are the CPU's
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    if with_kernels:
        assert "fastema" not in sys.modules
        sources = [HERE / "kernels.cpp", ROOT / "csrc/gpu_table.cpp"]
        number = 20  # c10::DeviceType::PrivateUse1
        kernels = _built("hostgpu_kernels", sources, [*KERNEL_FLAGS, f"-DFASTEMA_GPU={number}"], is_python_module=False)
        from fastema.backends import loading, native

        loading.use_kernels(native._C, Path(kernels))
    return module

"""The GPU kernels compiled for AMD, without one: Triton's by the AMD backend of its ordinary wheel, the CUDA source
behind a shim by clang. Compiled, not run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_triton import AVERAGE, CONVERT_F32_BF16, COPY_BYTES, compiled, kernels, update_source

from build_support import gpu

__all__ = ["kernels"]  # a fixture

ROOT = Path(__file__).parents[2]
CHIPS = {"gfx942": 64, "gfx90a": 64, "gfx1100": 32}  # -> threads of a warp
takes_a_minute = pytest.mark.skipif(
    os.environ.get("FASTEMA_ALL_ARCHITECTURES") != "1", reason="takes a minute: set FASTEMA_ALL_ARCHITECTURES=1"
)
ACCESS = re.compile(r"\b(global|flat|scratch|buffer)_(load|store)_(\w+)")
WIDTHS = {"dwordx4": 16, "b128": 16, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4}


def accesses(assembly: str) -> dict[str, Counter[int]]:
    """ "load" and "store" -> bytes -> how many; the narrow ones of the last elements count as 0."""
    found: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for space, kind, width in ACCESS.findall(assembly):
        assert space in ("global", "buffer"), f"{space}_{kind}_{width}"  # neither local memory nor generic addresses
        found[kind][WIDTHS.get(width, 0)] += 1
    return found


def numbers(assembly: str, name: str) -> set[int]:
    return {int(number) for number in re.findall(rf"\.{name}:\s+(\d+)", assembly)}


def compiled_for(chip: str, function: Any, signature: dict[str, str], constants: dict[str, Any]) -> str:
    try:
        from triton.backends.compiler import GPUTarget

        target = GPUTarget("hip", chip, CHIPS[chip])
        result = compiled(function, signature, constants, target=target, num_warps=256 // CHIPS[chip])
    except RuntimeError as error:
        if "0 compatible backends" in str(error):
            pytest.skip("this Triton comes without its AMD backend")
        raise
    return result.asm["amdgcn"]


@pytest.mark.parametrize("chip", CHIPS)
def test_triton_averages_move_16_bytes_at_once(kernels: ModuleType, chip: str) -> None:
    for kind in (*AVERAGE.values(), CONVERT_F32_BF16, COPY_BYTES):
        assembly = compiled_for(chip, *update_source(kernels, [kind], [1]))
        for name in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
            assert numbers(assembly, name) == {0}, (kind, name)
        seen = accesses(assembly)
        assert seen["load"][16] >= 2 and seen["store"][16] >= 2, (kind, seen)
        assert seen["store"].total() - seen["store"][16] <= 1 + (kind == AVERAGE["planes<-bf16"]), (
            kind,
            seen,
        )  # the last elements


@pytest.mark.parametrize("chip", CHIPS)
def test_triton_exchange_moves_16_bytes_at_once(kernels: ModuleType, chip: str) -> None:
    signature = {"table": "*i64", "which": "i64", "K": "constexpr"}
    seen = accesses(compiled_for(chip, kernels.exchange, signature, {"K": 2}))
    assert seen["load"][16] >= 4 and seen["store"][16] >= 4, seen


@takes_a_minute
def test_the_cuda_source_compiles_for_gfx90a(tmp_path: Path) -> None:
    compiler = next((name for name in ("clang++-15", "clang++") if shutil.which(name)), None)
    bitcode = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")
    if compiler is None or not bitcode.is_dir() or not Path("/usr/include/hip/hip_runtime.h").is_file():
        pytest.skip("no HIP (Debian: clang-15 libamdhip64-dev rocm-device-libs)")
    target = tmp_path / "kernels.s"
    command = [compiler, "-x", "hip", "--offload-arch=gfx90a", "--cuda-device-only", "--rocm-path=/usr", "-S"]
    command += [f"--rocm-device-lib-path={bitcode}", "-std=c++17", "-O3", "-ffp-contract=off", "-Wno-unused-result"]
    command += ["-I", str(ROOT / "csrc/hip"), str(ROOT / "csrc/cuda_kernels.cu"), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    assembly = target.read_text()
    assert numbers(assembly, "vgpr_spill_count") == {0}
    seen = accesses(assembly)
    assert seen["load"][16] > 16 and seen["store"][16] > 16


@takes_a_minute
@pytest.mark.skipif(shutil.which("hipcc") is None, reason="no hipcc on PATH: the source is not compiled for AMD GPUs")
def test_a_real_hipcc_compiles_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one AMD GPU. Not run on one."""
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    monkeypatch.setattr(torch, "__version__", "2.11.0+rocm6.4")
    monkeypatch.setenv("FASTEMA_CUDA", "1")
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", "gfx90a")
    code_object = gpu.compile_gpu_code(tmp_path)[0]
    assert b"gfx90a" in Path(code_object).read_bytes()

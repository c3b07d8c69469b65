"""The CUDA kernels without a GPU: nvcc compiles them for every chip we name, with nothing spilled and wide accesses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc/cuda_kernels.cu"
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v"]  # as in setup.py, with a report
KERNELS = 3  # update with and without the guard, exchange

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: the CUDA source is not compiled")


def architectures() -> list[str]:
    """Those that setup.py compiles for, and the newest that this nvcc knows."""
    if shutil.which("nvcc") is None:
        return []
    result = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True)
    newest = max(result.stdout.split(), key=lambda name: int(name.removeprefix("sm_")))
    return ["sm_80", "sm_90", "sm_100", newest]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Of each architecture the machine code and what the compiler reports; a compilation takes half a minute."""
    folder = tmp_path_factory.mktemp("cubins")

    def compile_for(architecture: str) -> tuple[Path, str]:
        cubin = folder / f"{architecture}.cubin"
        command = ["nvcc", *FLAGS, f"-arch={architecture}", "-cubin", "-o", str(cubin), str(SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return cubin, result.stdout + result.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(architectures(), pool.map(compile_for, architectures()), strict=True))


@pytest.mark.parametrize("architecture", architectures())
def test_nothing_is_spilled(compiled: dict[str, tuple[Path, str]], architecture: str) -> None:
    _, report = compiled[architecture]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    print(f"{architecture}: registers {registers}")
    assert len(frames) == len(registers) == KERNELS, report
    assert set(frames) == {("0", "0", "0")}, report
    assert max(registers) <= 80, "more than 80 registers do not fit the launch bounds"


def disassembler() -> str:
    """nvdisasm from the CUDA toolkit, or from Triton's wheel."""
    found = shutil.which("nvdisasm")
    if found is None:
        triton = importlib.util.find_spec("triton")
        candidate = Path(triton.origin or "").parent / "backends/nvidia/bin/nvdisasm" if triton else Path()
        found = str(candidate) if candidate.is_file() else None
    if found is None:
        pytest.skip("no nvdisasm, neither from a CUDA toolkit nor from Triton")
    return found


@pytest.mark.parametrize("architecture", [name for name in architectures() if name in ("sm_80", "sm_90")])
def test_the_hot_loops_move_16_bytes_at_once(compiled: dict[str, tuple[Path, str]], architecture: str) -> None:
    cubin, _ = compiled[architecture]
    listing = subprocess.run([disassembler(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"\.section\s+\.text\.", listing)[1:]
    assert len(kernels) == KERNELS
    for kernel in kernels:
        name = kernel.split(",")[0]
        loads, stores = re.findall(r"\bLDG?\.E\S*\.128\b", kernel), re.findall(r"\bSTG?\.E\S*\.128\b", kernel)
        assert loads and stores, f"{name} has no 16-byte accesses"
        assert not re.search(r"\b(LDL|STL)\b", kernel), f"{name} goes through local memory"

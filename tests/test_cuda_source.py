"""The CUDA kernels without a GPU: nvcc compiles them for every chip we name, with nothing spilled and wide accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "csrc/cuda_kernels.cu"
FLAGS = ["-std=c++17", "-O3", "--fmad=false"]  # as in setup.py

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: the CUDA source is not compiled")


def compiled(architecture: str, output: Path, *options: str) -> str:
    """Compiles for one chip; returns what the compiler reports."""
    command = ["nvcc", *FLAGS, f"-arch={architecture}", *options, "-o", str(output), str(SOURCE)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_nothing_is_spilled(architecture: str, tmp_path: Path) -> None:
    report = compiled(architecture, tmp_path / "kernels.cubin", "-cubin", "-Xptxas", "-v")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    print(f"{architecture}: registers {registers}")
    assert len(frames) == len(registers) == 3, report  # update with and without the guard, exchange
    assert set(frames) == {("0", "0", "0")}, report
    assert max(registers) <= 80, "more than 80 registers do not fit the launch bounds"


def test_aligned_body_moves_16_bytes_at_once(tmp_path: Path) -> None:
    ptx = tmp_path / "kernels.ptx"
    compiled("sm_90", ptx, "-ptx")
    accesses = re.findall(r"\b(ld|st)(?:\.global)?\.v4\.(?:b|u|f)32\b", ptx.read_text())
    assert {"ld", "st"} <= set(accesses)

"""The CPU kernels for another processor and by another compiler: the same bits, vectorised, without a warning.

Minutes on two cores, so with FASTEMA_ALL_ARCHITECTURES=1 only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cuda_on_host import FOLDERS, ROOT, SHARED

from fastema.backends.building import CPP_FLAGS

SOURCE = ROOT / "csrc/cpu_kernels.cpp"
PAIRS = 16
pytestmark = pytest.mark.skipif(
    os.environ.get("FASTEMA_ALL_ARCHITECTURES") != "1", reason="takes minutes: set FASTEMA_ALL_ARCHITECTURES=1"
)


def found_tool(package: str, *names: str) -> str:
    """The first of `names` on PATH."""
    for name in names:
        if shutil.which(name):
            return name
    pytest.skip(f"no {names[-1]} on PATH (Debian: {package})")


def output_of(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def average_lines() -> range:
    """Where the averaging loop is in the source."""
    text = SOURCE.read_text()
    begin, end = (
        text[: text.index(name)].count("\n") + 1 for name in ("int32_t average_block", "int64_t average_chunk")
    )
    return range(begin, end)


def matrix(compiler: str, program: Path, *options: str) -> Path:
    sources = ["-x", "c++", str(ROOT / "csrc/cuda_kernels.cu"), *(str(ROOT / name) for name in SHARED)]
    wanted = [*CPP_FLAGS, "-std=c++17", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-static", "-pthread", *options]
    output_of(compiler, *wanted, *FOLDERS, *sources, "-o", program)
    return program


def test_aarch64_has_the_bits_of_this_processor(tmp_path: Path) -> None:
    compiler = found_tool("g++-aarch64-linux-gnu", "aarch64-linux-gnu-g++")
    emulator = found_tool("qemu-user", "qemu-aarch64-static", "qemu-aarch64")
    there = output_of(emulator, matrix(compiler, tmp_path / "there"))
    here = output_of(matrix(found_tool("g++", "g++"), tmp_path / "here"))
    assert ", 0 differ, digest 0x" in there
    assert there == here


def test_aarch64_is_vectorised(tmp_path: Path) -> None:
    compiler = found_tool("g++-aarch64-linux-gnu", "aarch64-linux-gnu-g++")
    disassembler = found_tool("binutils-aarch64-linux-gnu", "aarch64-linux-gnu-objdump")
    target = tmp_path / "kernels.o"
    report = output_of(compiler, "-std=c++17", *CPP_FLAGS, "-fopt-info-vec", "-c", SOURCE, "-o", target)
    lines = re.findall(r"cpu_kernels\.cpp:(\d+):\d+: optimized:\s+loop vectorized using 16 byte vectors", report)
    assert sum(int(line) in average_lines() for line in lines) >= 2 * PAIRS, report  # with and without skip_nonfinite
    assert len(re.findall(r"\bfmla\s+v\d+\.[24][sd]", output_of(disassembler, "-d", target))) >= 2 * PAIRS


def test_clang_has_no_warning_and_vectorises_every_pair(tmp_path: Path) -> None:
    compiler = found_tool("clang", "clang++", "clang++-15")
    command = [compiler, "-std=c++17", *CPP_FLAGS, "-Wall", "-Wextra", "-Rpass=loop-vectorize", "-c"]
    report = output_of(*command, SOURCE, "-o", tmp_path / "kernels.o")
    assert "warning" not in report
    lines = re.findall(r"cpu_kernels\.cpp:(\d+):\d+: remark: vectorized loop", report)
    variants = 3 if "x86_64" in output_of(compiler, "-dumpmachine") else 1  # instruction sets
    assert sum(int(line) in average_lines() for line in lines) >= variants * 2 * PAIRS, report

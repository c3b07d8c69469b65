"""What the compiler makes of the CPU kernels: loops that are not vectorised are right, and many times slower."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastema.backends.building import CPP_FLAGS

ROOT = Path(__file__).parents[2]


def is_gcc() -> bool:
    if shutil.which("g++") is None:
        return False
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    return "Free Software Foundation" in version and platform.machine() == "x86_64"


@pytest.mark.slow
@pytest.mark.skipif(not is_gcc(), reason="needs gcc for x86-64, whose report this reads")
def test_every_dtype_pair_is_vectorised_with_and_without_skip_nonfinite(tmp_path: Path) -> None:
    source = ROOT / "csrc/cpu_kernels.cpp"
    text = source.read_text()
    begin = text[: text.index("EMA_FN int32_t average_block")].count("\n") + 1
    end = text[: text.index("EMA_FN int64_t average_chunk")].count("\n") + 1
    command = ["g++", "-std=c++17", *CPP_FLAGS, "-fopt-info-vec", "-c", str(source), "-o", tmp_path / "it.o"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    lines = re.findall(r"cpu_kernels\.cpp:(\d+):\d+: optimized:\s+loop vectorized using 64 byte vectors", report)
    assert sum(begin < int(line) < end for line in lines) >= 2 * 16 + 2  # and the average in two planes

"""The CUDA kernels' own source on the host, under AddressSanitizer and UBSan, against the CPU kernels bit for bit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-O0", "-g", *SANITIZED, "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas"]
FOLDERS = ["-I", str(ROOT / "tests/cuda_on_host/include"), "-I", str(ROOT / "csrc")]
SHARED = ["csrc/cpu_kernels.cpp", "csrc/sharing.cpp", "tests/cuda_on_host/matrix.cpp"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run the CUDA source on the host")


def built(kernels: Path, program: Path) -> Path:
    sources = ["-x", "c++", str(kernels), *(str(ROOT / name) for name in SHARED)]
    result = subprocess.run(["g++", *FLAGS, *FOLDERS, *sources, "-o", str(program)], capture_output=True, text=True)
    if "cannot find" in result.stderr and "san" in result.stderr:
        pytest.skip("this g++ comes without the sanitizers' runtime")
    assert result.returncode == 0, result.stderr
    return program


def test_matrix_is_bit_equal_to_the_cpu_kernels(tmp_path: Path) -> None:
    result = subprocess.run([built(ROOT / "csrc/cuda_kernels.cu", tmp_path / "matrix")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    cases, elements = (int(word) for word in result.stdout.split() if word.isdigit() and word != "0")
    assert cases > 300 and elements > 1_000_000, result.stdout


def test_a_planted_access_beyond_the_end_is_caught(tmp_path: Path) -> None:
    source = (ROOT / "csrc/cuda_kernels.cu").read_text()
    right = "head + vectors * kCount, elements, rule)"
    assert source.count(right) == 1
    planted = tmp_path / "planted.cu"
    planted.write_text(source.replace(right, "head + vectors * kCount, elements + 1, rule)"))
    result = subprocess.run([built(planted, tmp_path / "planted")], capture_output=True, text=True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr

"""A float32 in two 16-bit planes: split and join, of a sample of all bit patterns; `make long` takes all of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the check")
def test_every_pattern_of_a_sample_joins_to_what_was_split(tmp_path: Path) -> None:
    program = tmp_path / "planes"
    source = ROOT / "tests/csrc/planes.cpp"
    subprocess.run(["g++", "-std=c++17", "-O2", "-I", ROOT / "csrc", source, "-o", program], check=True)
    result = subprocess.run([program, "251"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith("17111424 patterns")

"""How an update is shared out among threads: every index once, and no waiting again for a thread that came late."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [str(ROOT / "csrc/sharing.cpp"), str(ROOT / "tests/sharing_cases.cpp")]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the cases")


@pytest.mark.parametrize("flags", [["-fopenmp"], ["-pthread"], ["-pthread", "-fsanitize=thread"]], ids=" ".join)
def test_sharing(flags: list[str], tmp_path: Path) -> None:
    program = tmp_path / "cases"
    command = ["g++", "-std=c++17", "-O1", "-g", *flags, "-I", str(ROOT / "csrc"), *SOURCES, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("this g++ comes without ThreadSanitizer's runtime")
    assert built.returncode == 0, built.stderr
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr

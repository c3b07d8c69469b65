"""Under ThreadSanitizer (`make sanitize`) a missing wait is a report, whoever was first this time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTEMA_SANITIZE") != "thread", reason="ThreadSanitizer only: `make sanitize`"
)

_TWO_STREAMS = """
import sys, torch
sys.path.insert(0, "tests")
from accelerator.load import load
gpu = load(with_kernels=False)
source, target = torch.ones(1000, device="hostgpu"), torch.zeros(1000, device="hostgpu")
side, main = torch.Stream("hostgpu"), torch.accelerator.current_stream()
gpu.synchronize()
gate = gpu.Gate(main)  # else the first copy may be over, and seen to be, before the second is enqueued
source.copy_(target)
if sys.argv[1] == "waits":
    side.wait_stream(main)
with side:
    target.copy_(source)
gate.open()
gpu.synchronize()
"""


@pytest.mark.parametrize("waits", [True, False])
def test_a_missing_wait_is_reported(waits: bool) -> None:
    command = [sys.executable, "-c", _TWO_STREAMS, "waits" if waits else "does not"]
    for _ in range(1 if waits else 4):  # on a busy machine one stream may be over before the other is looked at
        result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        if "data race" in result.stderr:
            break
    assert ("data race" in result.stderr) != waits, result.stderr
    assert (result.returncode == 0) == waits

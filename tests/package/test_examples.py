"""The files in docs/examples run as they are, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
# file -> the packages it needs beside torch, and what its last line must hold
EXPECTED = {
    "plain_loop.py": ((), "loaded ema_net"),
    "lightning_callback.py": (("lightning",), "trained and averaged tensors"),
    "hf_trainer.py": (("transformers", "accelerate"), "['ema.json', 'ema.safetensors']"),
    "fsdp2.py": ((), "'0.weight': (32, 8)"),
    "segmentation.py": (("timm", "PIL", "rich", "scipy", "matplotlib"), "16 masks are written"),
}
# lightning, transformers and timm import torchvision, and a CUDA build of it needs help beside a CPU torch. The process
# ends at once: where a gloo thread drops its last tensor while the interpreter ends, torch 2.13 aborts.
RUN = """
import contextlib, os, runpy, sys
with contextlib.suppress(ImportError):
    import fastema.segmentation.torchvision_shim
runpy.run_path(sys.argv[1], run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""


def test_every_example_is_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    packages, expected = EXPECTED[name]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    script = tmp_path / "run.py"
    script.write_text(RUN)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if name == "fsdp2.py" else []
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, *start, str(script), str(EXAMPLES / name)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert expected in run.stdout.strip().splitlines()[-1]

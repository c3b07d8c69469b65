"""`import fastema` needs torch and nothing else, and brings nothing else along."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
import torch
before = set(sys.modules)
import fastema
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(" ".join(sorted(new - {"fastema"} - set(sys.stdlib_module_names))))
print(" ".join(sorted(name for name in sys.modules if name.startswith("fastema."))))
print(" ".join(sorted(set(fastema.__all__) - set(dir(fastema)))))
"""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120)
    return run.stdout.split("\n")


def test_import_brings_nothing_but_torch(lines: list[str]) -> None:
    assert lines[0] == "", f"import fastema imports {lines[0]}"


def test_guests_are_not_imported(lines: list[str]) -> None:
    """Nothing imports the trainer, the integrations or the command line but those who want them."""
    guests = ("segmentation", "integrations", "cli")
    assert not [name for name in lines[1].split() if name.split(".")[1] in guests]
    assert "fastema.ema" in lines[1].split()


def test_every_public_name_exists(lines: list[str]) -> None:
    assert lines[2] == ""


def test_torch_without_numpy_is_enough() -> None:
    code = """
import sys
sys.modules["numpy"] = None  # an import of it raises
import torch
from fastema import FastEMA
model = torch.nn.Linear(2, 2)
ema = FastEMA(model, decay=0.5)
ema.update()
with ema.swapped():
    pass
ema.load_state_dict(ema.state_dict())
print("fine")
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "fine", run.stderr

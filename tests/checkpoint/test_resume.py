"""Resuming is exact: n updates, a checkpoint, a new process, n more are 2n in one go, bit for bit.

The file is also the new process: `python test_resume.py IN OUT` loads every case and goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cases import raw
from fastema import EMA_DECAY_FUNCTIONS, FastEMA, IDecayFunction, backends

pytestmark = pytest.mark.usefixtures("one_thread")

N = 7  # odd, so that update_every=2 is in the middle of a pair
SEED = 3


class Halving(IDecayFunction):
    """A schedule of the user's own."""

    def __init__(self, **kwargs: Any) -> None:
        self.base = kwargs["base"]

    def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
        return decay * (1 - self.base**step)


CASES: dict[str, dict[str, Any]] = {
    "constant": {"decay": 0.9, "decay_type": "constant"},
    "threshold": {"decay": 0.9, "decay_type": "threshold"},
    "exp": {"decay": 0.99, "decay_type": "exp", "total_steps": 2 * N, "beta": 5},
    "linear": {"decay": 0.99, "decay_type": "linear", "total_steps": 2 * N},
    "warmup": {"decay": 0.9, "decay_type": "warmup", "inv_gamma": 2.0, "power": 0.75},
    "own": {"decay": 0.9, "decay_type": "halving", "base": 0.5},
    "debiased": {"decay": 0.9, "decay_type": "debiased"},
    "power": {"decay_type": "power", "sigma_rel": 0.1},
    "power, every second step": {"decay_type": "power", "gamma": 2.5, "update_every": 2},
    "half_life": {"decay_type": "half_life", "half_life": 60, "batch_size": 12, "rampup_ratio": 0.1},
    "half_life_fraction": {"decay_type": "half_life_fraction", "half_life_fraction": 0.1},
    "every second step": {"decay": 0.9, "decay_type": "threshold", "update_every": 2},
    "after a step": {"decay": 0.9, "update_after_step": N + 2},
    "wider shadow": {"decay": 0.9, "dtype": torch.float64},
    "buffers averaged": {"decay": 0.9, "buffers": "average"},
}


def built(name: str, backend: str) -> tuple[nn.Module, torch.optim.Optimizer, FastEMA]:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    model.register_parameter("scale", nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    EMA_DECAY_FUNCTIONS["halving"] = Halving
    try:
        return model, optimizer, FastEMA(model, backend=backend, **CASES[name])
    finally:
        del EMA_DECAY_FUNCTIONS["halving"]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, ema: FastEMA, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(6, 5, generator=generator)
        optimizer.zero_grad()
        (model(features) * model.scale.float() - 1.0).square().mean().backward()
        optimizer.step()
        ema.update()


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, ema: FastEMA) -> dict[str, Any]:
    return {"net": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}


def fingerprint(model: nn.Module, ema: FastEMA) -> dict[str, Any]:
    state = ema.state_dict()
    return {
        "shadow": {name: raw(tensor) for name, tensor in state["shadow"].items()},
        "net": {name: raw(tensor) for name, tensor in model.state_dict().items()},
        "step": state["step"],
        "num_updates": state["num_updates"],
    }


def resume(source: Path, target: Path) -> None:
    """Do what the new process does."""
    results = {}
    for (name, backend), saved in torch.load(source, weights_only=True).items():
        model, optimizer, ema = built(name, backend)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # nothing may come from the construction
        model.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.load_state_dict(saved["ema"])
        run(model, optimizer, ema, range(N, 2 * N))
        results[name, backend] = fingerprint(model, ema)
    torch.save(results, target)


@pytest.fixture(scope="module")
def resumed(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """(case, backend) -> where the new process ended up."""
    folder = tmp_path_factory.mktemp("resume")
    states = {}
    for backend in ("native", "torch"):
        if backends.BACKENDS[backend].why_unusable("cpu") is None:
            for name in CASES:
                parts = built(name, backend)
                run(*parts, range(N))
                states[name, backend] = checkpoint(*parts)
    torch.save(states, folder / "in.pt")
    command = [sys.executable, __file__, str(folder / "in.pt"), str(folder / "out.pt")]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_resuming_in_a_new_process_is_exact(
    backend: str, name: str, resumed: dict[tuple[str, str], dict[str, Any]]
) -> None:
    model, optimizer, ema = built(name, backend)
    run(model, optimizer, ema, range(2 * N))
    expected = fingerprint(model, ema)
    got = resumed[name, backend]
    assert got["step"] == expected["step"] == 2 * N
    assert got["num_updates"] == expected["num_updates"]
    assert got["net"] == expected["net"], "the training itself did not resume exactly"
    assert got["shadow"] == expected["shadow"]


def test_every_registered_schedule_is_among_the_cases() -> None:
    covered = {arguments.get("decay_type", "threshold") for arguments in CASES.values()}
    assert set(EMA_DECAY_FUNCTIONS) <= covered


def test_a_state_of_one_backend_resumes_on_the_other() -> None:
    pytest.importorskip("fastema._C")
    results = []
    for first, second in (("native", "native"), ("torch", "torch"), ("native", "torch"), ("torch", "native")):
        model, optimizer, ema = built("threshold", first)
        run(model, optimizer, ema, range(N))
        saved = checkpoint(model, optimizer, ema)
        model, optimizer, ema = built("threshold", second)
        model.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.load_state_dict(saved["ema"])
        run(model, optimizer, ema, range(N, 2 * N))
        results.append(fingerprint(model, ema))
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch.lerp is not fused on this machine, so the backends differ in the last bit")
    assert all(result == results[0] for result in results)


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the fixture one_thread does in the first process
    resume(Path(sys.argv[1]), Path(sys.argv[2]))

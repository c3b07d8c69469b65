"""Pickles that fastema 0.1.0 wrote load, and their averages go on.

Each holds a Linear(2, 1) that began at 0 and gained 1 in each of 5 updates.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PICKLES = Path(__file__).parent / "pickles_of_0_1_0"


def loaded(name: str) -> Any:
    return pickle.loads((PICKLES / f"{name}.pkl").read_bytes())


def gain_one(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def average_of(decay: float, first: int, updates: int) -> float:
    """Return the average of the weights 1, 2, ... that began as the first ones."""
    average = float(first)
    for weight in range(1, updates + 1):
        average = decay * average + (1 - decay) * weight
    return average


def assert_all(tensor: Tensor, value: float) -> None:
    torch.testing.assert_close(tensor.detach(), torch.full_like(tensor, value))


def test_several_averages() -> None:
    (ema,) = loaded("ema_several")
    for which, decay in enumerate((0.5, 0.9)):
        assert_all(ema.shadow_state_dict(which)["weight"], average_of(decay, 0, 5))
    gain_one(ema._source)
    ema.update()
    for which, decay in enumerate((0.5, 0.9)):
        assert_all(ema.shadow_state_dict(which)["weight"], average_of(decay, 0, 6))
    assert ema.state_dict()["step"] == ema.state_dict()["last_update"] == 6


def test_a_schedule_its_arguments_and_the_nonfinite_policy() -> None:
    (ema,) = loaded("ema_exp")
    state = ema.state_dict()
    assert (state["step"], state["last_update"], state["decay_type"]) == (5, 4, "exp")
    assert state["decay_args"] == {"beta": 5.0}
    before = ema.shadow_state_dict()["weight"].clone()
    with torch.no_grad():
        ema._source.weight.fill_(float("nan"))
    ema.update()  # the 6th step, with update_every=2
    assert not before.isnan().any() and ema.shadow_state_dict()["weight"].isnan().all()


def test_averaged_model() -> None:
    averaged, model = loaded("averaged_model")
    gain_one(model)
    averaged.update_parameters(model)
    assert_all(averaged.module.weight, average_of(0.5, 1, 6))  # the first update copies
    assert averaged.n_averaged == 6


def test_timm() -> None:
    average, model = loaded("timm")
    gain_one(model)
    average.update(model)
    assert_all(average.module.weight, average_of(0.5, 0, 6))


def test_diffusers() -> None:
    average, model = loaded("diffusers")
    before, step = average.shadow_params[0].clone(), average.optimization_step
    gain_one(model)
    average.step(model.parameters())
    assert step == 5 and average.optimization_step == 6
    decay = min(0.5, (1 + 5) / (10 + 5))  # diffusers' warm-up at the 6th step
    assert_all(average.shadow_params[0], float(before[0, 0]) + (1 - decay) * (6 - float(before[0, 0])))

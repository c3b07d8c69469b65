"""fastema.swa_utils on a GPU: torch's bits, and no wait for the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils as theirs

from cases import bits, train
from cases.gpu import DEVICE, needs_gpu, no_waiting
from fastema import swa_utils as ours

pytestmark = needs_gpu
FUNCTIONS = ["get_ema_multi_avg_fn", "get_swa_multi_avg_fn"]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 17, 3), nn.BatchNorm2d(17), nn.Linear(33, 129), nn.Linear(1, 1)).to(DEVICE, dtype)


def step(model: nn.Module, seed: int) -> None:
    """Change a model on a GPU as one on the CPU."""
    moved = copy.deepcopy(model).cpu()
    train(moved, seed)
    model.load_state_dict(moved.state_dict())


def host_bits(model: nn.Module) -> dict[str, bytes]:
    return bits(copy.deepcopy(model).cpu())


@pytest.mark.parametrize("device", [None, DEVICE])
@pytest.mark.parametrize("name", [*FUNCTIONS, None])
def test_the_bits_of_torch(name: str | None, device: Any) -> None:
    model = make_model()
    pair = []
    for module in (theirs, ours):
        arguments = {"multi_avg_fn": getattr(module, name)()} if name else {}
        pair.append(module.AveragedModel(model, device, **arguments))
    for seed in range(10):
        step(model, seed)
        for averaged in pair:
            averaged.update_parameters(model)
    assert host_bits(pair[0]) == host_bits(pair[1])
    assert pair[1].n_averaged.device == pair[0].n_averaged.device
    assert pair[1].n_averaged == 10


@pytest.mark.parametrize("device", [None, DEVICE])
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_update_does_not_wait(name: str, use_buffers: bool, device: Any) -> None:
    model = make_model()
    averaged = ours.AveragedModel(model, device, multi_avg_fn=getattr(ours, name)(), use_buffers=use_buffers)
    for _ in range(2):
        averaged.update_parameters(model)
    with no_waiting():
        for _ in range(3):
            averaged.update_parameters(model)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():  # it would have been seen
        averaged.module[0].weight.sum().item()
    assert averaged.n_averaged == 5
    averaged.n_averaged.zero_()
    step(model, 1)
    averaged.update_parameters(model)
    assert host_bits(averaged.module) == host_bits(model)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_average_on_the_cpu(name: str) -> None:
    model = make_model()
    pair = [module.AveragedModel(model, "cpu", multi_avg_fn=getattr(module, name)()) for module in (theirs, ours)]
    for seed in range(5):
        step(model, seed)
        for averaged in pair:
            averaged.update_parameters(model)
    for got, expected in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
        assert got.device.type == "cpu"
        torch.testing.assert_close(got, expected)
    average, live = host_bits(pair[1].module), host_bits(model)
    with pair[1].swapped(model):
        assert host_bits(model) == average
    assert host_bits(model) == live


def test_a_model_on_two_devices() -> None:
    model = make_model()
    model[2].cpu()
    pair = [module.AveragedModel(model, multi_avg_fn=module.get_ema_multi_avg_fn(0.9)) for module in (theirs, ours)]
    for seed in range(5):
        step(model, seed)
        for averaged in pair:
            averaged.update_parameters(model)
    for got, expected in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
        assert got.device == expected.device
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_swap(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.5))
    averaged.module.float()
    for seed in range(3):
        averaged.update_parameters(model)
        step(model, seed)
    live, expected = host_bits(model), host_bits(copy.deepcopy(averaged.module).to(dtype))
    for _ in range(2):
        with averaged.swapped(model):
            assert host_bits(model) == expected
        assert host_bits(model) == live

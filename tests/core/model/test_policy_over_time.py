"""What is averaged once stays averaged; what begins to train is averaged from then on, starting as a copy."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastema import FastEMA

pytestmark = pytest.mark.usefixtures("one_thread")
HALF: dict[str, Any] = {"decay": 0.5, "decay_type": "constant"}


def what_trains(name: str, tensor: Tensor, module: nn.Module | None) -> Any:
    return "average" if tensor.requires_grad else "skip"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def shift(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)


def move(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@pytest.fixture(params=[False, True], ids=["in_place", "moved"])
def moves(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(autouse=True)
def no_other_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_frozen_weights_stay_averaged(backend: str, moves: bool) -> None:
    model = net()
    ema = FastEMA(model, policy=what_trains, backend=backend, **HALF)
    shift(model)
    expected = {name: tensor.clone() for name, tensor in ema.state_dict()["shadow"].items()}
    for frozen in ((), (0,), (0, 1), (1,), ()):
        for index, layer in enumerate(model):
            layer.requires_grad_(index not in frozen)
        if moves:
            move(model)
        shift(model)
        ema.update()
        for name, parameter in model.named_parameters():
            expected[name] = torch.lerp(expected[name], parameter.detach(), 0.5)
    torch.testing.assert_close(dict(ema.state_dict()["shadow"]), expected)
    with ema.swapped():
        torch.testing.assert_close(dict(model.named_parameters()), expected, check_stride=False)


@pytest.mark.parametrize("then", ["update", "swapped", "state_dict", "copy_to"])
def test_what_begins_to_train_starts_as_a_copy_with_one_warning(backend: str, moves: bool, then: str) -> None:
    model = net()
    model[0].requires_grad_(False)
    ema = FastEMA(model, policy=what_trains, backend=backend, **HALF)
    shift(model)
    ema.update()
    assert sorted(ema.state_dict()["shadow"]) == ["1.bias", "1.weight"]
    model[0].requires_grad_(True)
    if moves:
        move(model)
    live = model[0].weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if then == "swapped":
            with ema.swapped():
                torch.testing.assert_close(model[0].weight.detach(), live)
        elif then == "state_dict":
            ema.update()
            torch.testing.assert_close(ema.state_dict()["shadow"]["0.weight"], live)
        else:
            getattr(ema, then)()
        ema.update()
    assert len(caught) == 1
    assert "'0.weight', '0.bias' are averaged from now on, starting as a copy" in str(caught[0].message)
    shift(model)
    ema.update()
    torch.testing.assert_close(ema.state_dict()["shadow"]["0.weight"], live + 0.5)


def test_a_policy_by_name_goes_on_as_it_was(backend: str) -> None:
    model = net()
    model[0].requires_grad_(False)
    ema = FastEMA(model, policy=lambda name, *_: "skip" if name.startswith("0") else None, backend=backend, **HALF)
    ema.update()
    model[0].requires_grad_(True)
    for _ in range(2):
        ema.update()
    assert sorted(ema.state_dict()["shadow"]) == ["1.bias", "1.weight"]


def test_a_layer_that_is_added_and_trains_is_averaged_from_then_on(backend: str) -> None:
    model = net()
    ema = FastEMA(model, policy=what_trains, backend=backend, **HALF)
    ema.update()
    model.append(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"'2\.weight', '2\.bias' are averaged from now on"):
        ema.update()
    del model[2]
    with pytest.raises(RuntimeError, match=r"'2\.weight' is gone"):
        ema.update()


def test_statistics_of_a_layer_that_is_frozen_stay_averaged(backend: str) -> None:
    def rule(name: str, tensor: Tensor, module: Any) -> Any:
        return None if module.weight.requires_grad else "skip"

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    ema = FastEMA(model, policy=rule, backend=backend, **HALF)
    model[0].requires_grad_(False)
    move(model)
    model[0].running_mean.add_(1.0)
    ema.update()
    assert torch.equal(ema.shadow_state_dict()["0.running_mean"], torch.full((3,), 0.5))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_averages_what_its_original_did(copied: Any) -> None:
    model = net()
    ema = FastEMA(model, policy=what_trains, **HALF)
    shift(model)
    ema.update()
    model[0].requires_grad_(False)
    again, twin = copied((ema, model))
    torch.testing.assert_close(again.state_dict()["shadow"], ema.state_dict()["shadow"])
    twin[0].weight.data = twin[0].weight.data.clone()
    again.update()


def test_a_state_brings_back_what_is_frozen_now(backend: str) -> None:
    model = net()
    ema = FastEMA(model, policy=what_trains, backend=backend, **HALF)
    shift(model)
    ema.update()
    state = ema.state_dict()
    other = net()
    other[0].requires_grad_(False)
    resumed = FastEMA(other, policy=what_trains, backend=backend, **HALF)
    with pytest.raises(ValueError, match=r"'1\.weight' has shape"):
        resumed.load_state_dict({**state, "shadow": {**state["shadow"], "1.weight": torch.zeros(9)}})
    resumed.load_state_dict(state, strict=False)
    assert sorted(resumed.state_dict()["shadow"]) == ["1.bias", "1.weight"], "it loads what fits, and refused nothing"
    resumed.load_state_dict(state)
    torch.testing.assert_close(dict(resumed.state_dict()["shadow"]), dict(state["shadow"]))
    resumed.update()


def test_adapters_that_take_turns(backend: str) -> None:
    """As PEFT's set_adapter: one trains, the other is frozen and keeps its average."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].requires_grad_(False)
    ema = FastEMA(model, policy=what_trains, backend=backend, **HALF)
    shift(model)
    ema.update()
    average = ema.state_dict()["shadow"]["a.weight"].clone()
    live = model["a"].weight.detach().clone()
    model["a"].requires_grad_(False)
    model["b"].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'b\.weight', 'b\.bias' are averaged from now on"):
        ema.update()
    model["a"].requires_grad_(True)
    model["b"].requires_grad_(False)
    move(model)
    ema.update()
    torch.testing.assert_close(ema.state_dict()["shadow"]["a.weight"], live + (average - live) / 4)

"""`attach`: one update for every step, whatever steps and however often it is attached."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from fastema import FastEMA

pytestmark = pytest.mark.usefixtures("one_thread")


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def is_copy(ema: FastEMA, model: nn.Module) -> bool:
    averages = ema.shadow_state_dict()
    return all(torch.equal(averages[name], tensor) for name, tensor in model.state_dict().items())


def test_an_optimizer_that_is_attached_twice_counts_once(backend: str) -> None:
    model = nn.Linear(3, 2)
    ema, optimizer = FastEMA(model, backend=backend), sgd(model.parameters())
    ema.attach(optimizer)
    handle = ema.attach(optimizer)
    ema.attach(optimizer, optimizer)
    train(model, optimizer)
    assert ema.num_updates == 1
    handle.remove()  # of an attachment that was replaced
    train(model, optimizer)
    assert ema.num_updates == 2


def test_an_optimizer_moves_to_the_group_it_is_attached_with_last() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    ema = FastEMA(model)
    first, second = sgd(model[0].parameters()), sgd(model[1].parameters())
    ema.attach(first)
    handle = ema.attach(first, second)
    train(model, first, second)
    assert ema.num_updates == 1
    handle.remove()
    train(model, first, second)
    assert ema.num_updates == 1


def test_a_dropped_ema_stops_and_is_not_kept_alive(backend: str) -> None:
    """The cell of a notebook that is run again leaves an old EMA behind."""
    model = nn.Linear(3, 2)
    optimizer = sgd(model.parameters())
    ema = FastEMA(model, backend=backend)
    handle = ema.attach(optimizer)
    dropped = weakref.ref(ema)
    gc.disable()
    try:
        ema = FastEMA(model, backend=backend)
        assert dropped() is None
    finally:
        gc.enable()
    ema.attach(optimizer)
    train(model, optimizer)
    assert ema.num_updates == 1
    handle.remove()


def test_several_optimizers_make_one_step_in_any_order(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    ema = FastEMA(model, decay=0.0, backend=backend)
    first, second = sgd(model[0].parameters()), sgd(model[1].parameters())
    ema.attach(first, second)
    for order in ([first, second], [second, first]):
        train(model, *order)
        assert is_copy(ema, model)
    assert ema.num_updates == 2


def test_one_optimizer_steps_more_often_than_the_other() -> None:
    """A GAN whose discriminator takes five steps for one of the generator."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    ema = FastEMA(model)
    discriminator, generator = sgd(model[1].parameters()), sgd(model[0].parameters())
    ema.attach(discriminator, generator)
    for _ in range(2):
        train(model, *[discriminator] * 5, generator)
    assert ema.num_updates == 2


def test_optimizers_that_step_in_backward() -> None:
    """One for each parameter; the last parameter's steps first."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    ema = FastEMA(model, decay=0.0)
    optimizers = {parameter: sgd([parameter]) for parameter in model.parameters()}
    ema.attach(*optimizers.values())

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
    assert ema.num_updates == 3
    assert is_copy(ema, model)


class Lookahead:
    """A Lookahead as many write it by hand: an optimizer inside, and no hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


class Uninitialised(torch.optim.Optimizer):
    """A subclass that never calls its base class, as schedule-free's wrapper."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base


@pytest.mark.parametrize(
    "wrong",
    [lambda o: Lookahead(o), lambda o: Uninitialised(o), lambda o: [o], lambda o: nn.Linear(1, 1), lambda o: None],
)
def test_what_has_no_step_hooks_is_refused(wrong: Any) -> None:
    model = nn.Linear(3, 2)
    ema, optimizer = FastEMA(model), sgd(model.parameters())
    with pytest.raises(TypeError, match=r"call update\(\) after their step\(\) instead"):
        ema.attach(optimizer, wrong(optimizer))
    train(model, optimizer)
    assert ema.num_updates == 0, "nothing is attached before all are checked"


class SAM(torch.optim.Optimizer):
    """Steps in two methods of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(1)


def test_a_swap_warns_where_weights_change_and_no_step_is_seen(backend: str, recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Linear(3, 2)
    ema, optimizer = FastEMA(model, backend=backend), SAM(model.parameters())
    ema.attach(optimizer)
    with ema.swapped():
        pass
    assert not recwarn.list, "nothing has changed yet"
    optimizer.first_step()
    with pytest.warns(UserWarning, match="its step\\(\\) was never called"), ema.swapped():
        pass
    recwarn.clear()
    with ema.swapped():
        pass
    assert not recwarn.list, "once is enough"


def test_no_warning_where_steps_are_seen(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Linear(3, 2)
    ema, optimizer = FastEMA(model, update_every=100), sgd(model.parameters())
    ema.attach(optimizer)
    train(model, optimizer)
    with ema.swapped():
        pass
    assert not recwarn.list

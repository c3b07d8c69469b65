"""`attach`: one update for every step, whatever steps and however often it is attached."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from types import ModuleType
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


# ---- updates and training that come apart ----


@pytest.mark.parametrize("kind", ["all", "head"])
@pytest.mark.parametrize("swaps", [0, 2])
@pytest.mark.parametrize("steps", [0, 5])
def test_a_swap_warns_where_another_optimizer_took_over(
    kind: str, swaps: int, steps: int, recwarn: pytest.WarningsRecorder
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    ema, first = FastEMA(model), sgd(model.parameters())
    ema.attach(first)
    for _ in range(steps):
        train(model, first)
    for _ in range(swaps):
        with ema.swapped():
            pass
    second = torch.optim.AdamW(model[2].parameters() if kind == "head" else model.parameters(), lr=0.01)
    assert not recwarn.list
    for _ in range(3):
        train(model, second)
    with pytest.warns(UserWarning, match="attach it too"), ema.swapped():
        pass
    recwarn.clear()
    with ema.swapped():
        pass
    assert not recwarn.list, "once is enough"
    ema.attach(second)
    train(model, second)
    with ema.swapped():
        pass
    assert not recwarn.list
    for _ in range(3):
        train(model, first)
    assert ema.num_updates == steps + 4, "the first one is attached still"


def clamp_and_normalise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-1, 1).div_(parameter.norm())


def test_no_warning_where_weights_are_loaded_clamped_or_updated_by_hand(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Linear(3, 2)
    ema, optimizer = FastEMA(model), sgd(model.parameters())
    ema.attach(optimizer)
    for change in (
        lambda: model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}),
        lambda: [parameter.data.clamp_(-1, 1) for parameter in model.parameters()],
        lambda: clamp_and_normalise(model),
        lambda: [model.load_state_dict(copy.deepcopy(model.state_dict())) for _ in range(2)],  # there and back
        lambda: ema.copy_to(),
        lambda: [(train(model, sgd(model.parameters())), ema.update()) for _ in range(3)],
        lambda: model.double().float(),
    ):
        train(model, optimizer)
        change()
        with ema.swapped():
            pass
    assert not recwarn.list


def test_no_warning_where_the_user_ended_the_updates(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Linear(3, 2)
    ema, optimizer = FastEMA(model), sgd(model.parameters())
    handle = ema.attach(optimizer)
    for steps in (0, 1):
        for _ in range(steps):
            train(model, optimizer)
        handle.remove()
        for _ in range(10):
            train(model, optimizer)
        with ema.swapped():
            pass
        handle = ema.attach(optimizer)
    assert not recwarn.list


def flattened(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer flat copies of its parameters in groups of their own, as DeepSpeed does."""
    for group in optimizer.param_groups:
        group["params"] = [torch.cat([parameter.detach().flatten() for parameter in group["params"]])]


@pytest.mark.parametrize("late", [False, True])
def test_a_swap_warns_where_an_optimizer_steps_copies(late: bool) -> None:
    model = nn.Linear(3, 2)
    ema = FastEMA(model)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1)
    if late:
        ema.attach(optimizer)
    flattened(optimizer)
    if not late:
        ema.attach(optimizer)
    with pytest.warns(UserWarning, match="trains no tensor of the averaged model"), ema.swapped():
        pass


@pytest.mark.parametrize("kind", ["views", "part", "both", "moved"])
def test_no_warning_where_an_optimizer_steps_the_models_memory(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """One of two is enough: a GAN's discriminator may be attached beside its generator."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    ema = FastEMA(model)
    if kind == "views":
        ema.attach(sgd([model.weight.data.view(-1)]))
    elif kind == "part":
        ema.attach(sgd([model.bias]))
    elif kind == "both":
        ema.attach(sgd(other.parameters()), sgd(model.parameters()))
    else:
        optimizer = sgd(model.parameters())
        ema.attach(optimizer)
        model.weight.data = model.weight.data.clone()
    with ema.swapped():
        pass
    assert not recwarn.list


def test_an_optimizer_inside_opacus_wrapper_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """It steps at the end of each logical batch; the wrapper's own step() runs for every physical one."""

    class DPOptimizer(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.original_optimizer, self.param_groups, self.calls = optimizer, optimizer.param_groups, 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.original_optimizer.zero_grad(set_to_none)

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.calls += 1
            if self.calls % 4 == 0:
                self.original_optimizer.step()

    module = ModuleType("opacus.optimizers")
    module.DPOptimizer = DPOptimizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opacus.optimizers", module)
    model = nn.Linear(3, 2)
    ema, optimizer = FastEMA(model), DPOptimizer(sgd(model.parameters()))
    ema.attach(optimizer)
    for _ in range(16):
        train(model, optimizer)
    assert ema.num_updates == 4

"""docs/recipes/attach.md, row by row: what `attach` does with each kind of optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import values
from cases.peers import package
from fastema import FastEMA

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS = values(8, 3)


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def backward(model: nn.Module) -> Tensor:
    loss = model(INPUTS).square().mean()
    loss.backward()
    return loss


def is_copy(ema: FastEMA, model: nn.Module) -> bool:
    """With decay 0 the average is the weights at the last update."""
    state = ema.shadow_state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_every_row_has_its_test() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes" / "attach.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    tests = [name for name in globals() if name.startswith("test_row_")]
    assert len(tests) == len(rows) == 11


def test_row_accumulated_and_skipped_batches() -> None:
    model, optimizer = model_and_optimizer()
    ema = FastEMA(model, 0.0)
    ema.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for batch in range(6):
        loss = model(INPUTS).square().mean() * (torch.inf if batch == 3 else 1.0)
        scaler.scale(loss).backward()
        if batch % 2 == 1:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert ema.num_updates == 2
    assert is_copy(ema, model)


def test_row_closure() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    ema = FastEMA(model, 0.0)
    ema.attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    for _ in range(2):
        optimizer.step(closure)
        assert is_copy(ema, model)
    assert ema.num_updates == 2


def gan() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    generator, discriminator = nn.Linear(3, 2), nn.Linear(2, 1)
    first = torch.optim.Adam(generator.parameters(), lr=0.1)
    return generator, discriminator, first, torch.optim.Adam(discriminator.parameters(), lr=0.1)


def test_row_average_of_the_generator() -> None:
    generator, discriminator, of_the_generator, of_the_discriminator = gan()
    ema = FastEMA(generator, 0.0)
    ema.attach(of_the_generator)
    for _ in range(2):
        for optimizer in (of_the_discriminator, of_the_discriminator, of_the_generator):
            backward(nn.Sequential(generator, discriminator))
            optimizer.step()
    assert ema.num_updates == 2
    assert is_copy(ema, generator)


def test_row_average_of_both_nets() -> None:
    generator, discriminator, of_the_generator, of_the_discriminator = gan()
    both = nn.Sequential(generator, discriminator)
    ema = FastEMA(both, 0.0)
    ema.attach(of_the_generator, of_the_discriminator)
    for order in ([of_the_discriminator] * 3 + [of_the_generator], [of_the_generator, of_the_discriminator]):
        for optimizer in order:
            backward(both)
            optimizer.step()
        assert is_copy(ema, both)
    assert ema.num_updates == 2


def test_row_one_optimizer_for_each_parameter_in_backward() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    ema = FastEMA(model, 0.0)
    ema.attach(*optimizers.values())
    for _ in range(3):
        backward(model)
        assert is_copy(ema, model)
    assert ema.num_updates == 3


def test_row_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(*model_and_optimizer())
    ema = FastEMA(model, 0.0)
    ema.attach(optimizer)
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(INPUTS).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert ema.num_updates == 2


class SAM(torch.optim.Optimizer):
    """An optimizer that climbs to the worst weights nearby, and steps from the old ones with their gradient."""

    def __init__(self, base_optimizer: torch.optim.Optimizer, rho: float = 0.5) -> None:
        self.base_optimizer = base_optimizer
        super().__init__(base_optimizer.param_groups, {})
        self._rho = rho
        self._before: list[Tensor] = []

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        self._before = [parameter.clone() for parameter in self._parameters()]
        for parameter in self._parameters():
            parameter.add_(parameter.grad, alpha=self._rho)  # type: ignore[arg-type]

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter, before in zip(self._parameters(), self._before, strict=True):
            parameter.copy_(before)
        self.base_optimizer.step()

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def test_row_sam_by_its_base_optimizer() -> None:
    model, optimizer = model_and_optimizer()
    sam = SAM(optimizer)
    ema = FastEMA(model, 0.0)
    ema.attach(sam.base_optimizer)
    for _ in range(3):
        backward(model)
        sam.first_step()
        optimizer.zero_grad()
        backward(model)
        assert not is_copy(ema, model), "these are the perturbed weights"
        sam.second_step()
        optimizer.zero_grad()
        assert is_copy(ema, model)
    assert ema.num_updates == 3


def test_row_sam_itself() -> None:
    model, optimizer = model_and_optimizer()
    sam = SAM(optimizer)
    ema = FastEMA(model, 0.0)
    ema.attach(sam)
    backward(model)
    sam.first_step()
    sam.second_step()
    assert ema.num_updates == 0
    with pytest.warns(UserWarning, match=r"its step\(\) was never called"), ema.swapped():
        pass
    sam.step(lambda: backward(model))
    assert ema.num_updates == 1
    assert is_copy(ema, model)
    with warnings.catch_warnings(action="error"), ema.swapped():
        pass


class Lookahead:
    """A Lookahead as many write it by hand."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int) -> None:
        self.optimizer, self.k, self.count = optimizer, k, 0
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.slow = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.count += 1
        if self.count % self.k == 0:
            for slow, fast in zip(self.slow, self.parameters, strict=True):
                fast.copy_(slow.lerp_(fast, 0.5))


@pytest.mark.parametrize("whose", ["by hand", "timm"])
def test_row_lookahead(whose: str) -> None:
    model, optimizer = model_and_optimizer()
    ema = FastEMA(model, 0.0)
    kind = package("timm.optim").Lookahead if whose == "timm" else Lookahead
    lookahead = kind(optimizer, k=2)
    with pytest.raises(TypeError, match=r"call update\(\) after their step\(\) instead"):
        ema.attach(lookahead)
    for _ in range(4):
        backward(model)
        lookahead.step()
        ema.update()
        assert is_copy(ema, model)
    assert ema.num_updates == 4


class ScheduleFree(torch.optim.Optimizer):
    """Trains at weights between its fast ones and its own average, which `eval()` puts into the model."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self._parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._fast = [parameter.detach().clone() for parameter in self._parameters]
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._count = 0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self._count += 1
        for parameter, fast, average in zip(self._parameters, self._fast, self._average, strict=True):
            fast.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])  # type: ignore[arg-type]
            average.lerp_(fast, 1 / self._count)
            parameter.copy_(torch.lerp(fast, average, 0.9))

    @torch.no_grad()
    def eval(self) -> None:
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.copy_(average)


def test_row_schedule_free() -> None:
    model = nn.Linear(3, 2)
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    ema = FastEMA(model, 0.0)
    ema.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert is_copy(ema, model)
    assert ema.num_updates == 3
    optimizer.eval()
    assert not is_copy(ema, model), "eval() writes other weights into the model"


class ScheduleFreeWrapper:
    """A wrapper around any optimizer that steps by itself."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.param_groups = base.param_groups

    def step(self) -> None:
        self.base.step()


def test_row_schedule_free_wrapper() -> None:
    model, optimizer = model_and_optimizer()
    wrapper = ScheduleFreeWrapper(optimizer)
    ema = FastEMA(model, 0.0)
    with pytest.raises(TypeError, match=r"call update\(\) after their step\(\) instead"):
        ema.attach(wrapper)  # type: ignore[arg-type]
    backward(model)
    wrapper.step()
    ema.update()
    assert ema.num_updates == 1
    assert is_copy(ema, model)

"""`ema.attach(optimizer)` in plain loops and under Accelerate: only steps that really happened count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import bits, raw, values
from fastema import FastEMA

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS = values(8, 3)


def averages(ema: FastEMA) -> list[bytes]:
    return [raw(average) for average in ema.state_dict()["shadow"].values()]


def loss_of(model: nn.Module, overflow: bool = False) -> Tensor:
    loss = model(INPUTS).square().mean()
    return loss * torch.inf if overflow else loss


class Lerp:
    """Return the average, computed beside FastEMA."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.averages = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        for average, parameter in zip(self.averages, self.model.parameters(), strict=True):
            average.lerp_(parameter, 1 - self.decay)

    def bits(self) -> list[bytes]:
        return [raw(average) for average in self.averages]


# ---- plain loops ----


def test_accumulated_batches_count_once(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, expected = FastEMA(model, 0.5, decay_type="constant", backend=backend), Lerp(model, 0.5)
    ema.attach(optimizer)
    for batch in range(9):
        loss_of(model).backward()
        if (batch + 1) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
            expected.update()
        assert averages(ema) == expected.bits()
    assert ema.num_updates == 3


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_skipped_steps_with_a_schedule_and_a_scheduler(backend: str, fused: bool) -> None:
    """A step that the scaler skips does not move the schedule; a scheduler that wraps step() must not matter."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    ema = FastEMA(model, 0.999, decay_type="threshold", backend=backend)
    ema.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    expected = Lerp(model, 0.0)
    happened = 0
    for overflow in (False, True, False, True, True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, overflow)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if not overflow:
            happened += 1
            expected.decay = (1 + happened) / (10 + happened)
            expected.update()
        assert ema.num_updates == happened
        assert averages(ema) == expected.bits()
    assert happened == 3


def test_a_closure_counts_once_and_is_averaged_at_its_end(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    ema, expected = FastEMA(model, 0.5, decay_type="constant", backend=backend), Lerp(model, 0.5)
    ema.attach(optimizer)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        expected.update()
        assert averages(ema) == expected.bits()
    assert calls > 4
    assert ema.num_updates == 2


def two_optimizers() -> tuple[nn.Sequential, torch.optim.Optimizer, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    return model, first, torch.optim.AdamW(model[1].parameters(), lr=0.01)


def test_optimizers_attached_together_update_once_a_round(backend: str) -> None:
    model, first, second = two_optimizers()
    ema, expected = FastEMA(model, 0.5, decay_type="constant", backend=backend), Lerp(model, 0.5)
    handle = ema.attach(first, second)
    for _ in range(3):
        loss_of(model).backward()
        first.step()
        first.step()  # a critic steps more often than its generator
        assert averages(ema) == expected.bits()
        second.step()
        expected.update()
        assert averages(ema) == expected.bits(), "it must see the weights after the last one"
    assert ema.num_updates == 3
    live = bits(model)
    with ema.swapped():
        for optimizer in (first, second):
            with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) while the EMA weights are applied"):
                optimizer.step()
    assert bits(model) == live
    handle.remove()
    first.step()
    second.step()
    assert ema.num_updates == 3
    with ema.swapped():
        first.step()  # nobody watches any more


def test_optimizers_attached_one_by_one_update_each(backend: str) -> None:
    model, first, second = two_optimizers()
    ema, expected = FastEMA(model, 0.5, decay_type="constant", backend=backend), Lerp(model, 0.5)
    ema.attach(first)
    ema.attach(second)
    for _ in range(3):
        loss_of(model).backward()
        for optimizer in (first, second):
            optimizer.step()
            expected.update()
    assert averages(ema) == expected.bits()
    assert ema.num_updates == 6


def test_attach_needs_an_optimizer() -> None:
    with pytest.raises(TypeError, match="needs an optimizer"):
        FastEMA(nn.Linear(3, 2)).attach()


# ---- Accelerate ----


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """Yield the package, without what an earlier Accelerator left in it."""
    package = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield package
    for state in states:
        state._reset_state()


@pytest.mark.parametrize("prepared", [False, True], ids=["inner", "wrapper"])
def test_accelerate_with_accumulation(accelerate: Any, prepared: bool, backend: str) -> None:
    """The wrapper's step() is called for every batch, and leaves the optimizer's out while gradients add up."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    plain = torch.optim.SGD((model := nn.Linear(3, 2)).parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, plain)
    ema, expected = FastEMA(model, 0.5, decay_type="constant", backend=backend), Lerp(model, 0.5)
    handle = ema.attach(optimizer if prepared else plain)
    for batch in range(9):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model))
            optimizer.step()
            optimizer.zero_grad()
        if (batch + 1) % 3 == 0:
            expected.update()
        assert averages(ema) == expected.bits(), f"batch {batch}"
    assert ema.num_updates == 3
    loss_of(model).backward()
    with ema.swapped(), pytest.raises(RuntimeError, match="while the EMA weights are applied"):
        optimizer.step()
    handle.remove()
    optimizer.step()
    assert ema.num_updates == 3


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_accelerate_with_skipped_steps(accelerate: Any, fused: bool, backend: str) -> None:
    """On a CPU Accelerate makes no scaler of its own, so its wrapper gets one here, as it does for fp16 on a GPU."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(3, 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, fused=fused), scaler=scaler
    )
    ema, expected = FastEMA(model, 0.5, decay_type="constant", backend=backend), Lerp(model, 0.5)
    ema.attach(optimizer)
    for overflow in (False, True, False, True, True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, overflow)).backward()
        before = bits(model)
        optimizer.step()
        assert (bits(model) == before) == overflow
        if not overflow:
            expected.update()
        assert averages(ema) == expected.bits()
    assert ema.num_updates == 3


def test_accelerate_with_a_scheduler(accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(3, 2)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, scheduler = accelerator.prepare(model, plain, torch.optim.lr_scheduler.StepLR(plain, 1))
    ema = FastEMA(model)
    ema.attach(optimizer)
    for _ in range(3):
        accelerator.backward(loss_of(model))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert ema.num_updates == 3


def test_the_average_resumes_with_accelerate_s_own_checkpoint(accelerate: Any, tmp_path: Any) -> None:
    def run(resume_at: int | None) -> list[bytes]:
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True)
        model = nn.Linear(3, 2)
        model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.1))
        ema = FastEMA(model, 0.9, decay_type="threshold")
        ema.attach(optimizer)
        accelerator.register_for_checkpointing(ema)
        if resume_at is not None:
            accelerator.load_state(tmp_path / "state")
            assert ema.num_updates == resume_at
        for step in range(resume_at or 0, 6):
            if resume_at is None and step == 4:
                accelerator.save_state(tmp_path / "state")
            accelerator.backward(loss_of(model))
            optimizer.step()
            optimizer.zero_grad()
        return averages(ema)

    whole = run(resume_at=None)
    assert run(resume_at=4) == whole


def test_the_diffusers_adapter_in_accelerate_s_checkpoint(accelerate: Any, tmp_path: Any) -> None:
    """diffusers' scripts step it where gradients are in sync, and Accelerate saves it."""
    from fastema.integrations.diffusers import EMAModel

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ema, other = EMAModel(model.parameters()), EMAModel(nn.Linear(3, 2).parameters())
    accelerator.register_for_checkpointing(ema)
    for _ in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(model.parameters())
    assert ema.optimization_step == 4
    accelerator.save_state(tmp_path / "state")
    accelerator._custom_objects.clear()
    accelerator.register_for_checkpointing(other)
    accelerator.load_state(tmp_path / "state")
    assert other.optimization_step == 4
    assert [raw(each) for each in other.shadow_params] == [raw(each) for each in ema.shadow_params]

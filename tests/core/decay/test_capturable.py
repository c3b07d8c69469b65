"""capturable=True: step and weight live on the device, and the results are those of the eager path, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastema import EMA_DECAY_FUNCTIONS, FastEMA, IDecayFunction
from fastema.core.counters import DeviceCounter
from fastema.core.decays import Decays

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "threshold": {"decay": 0.9},
    "exp": {"decay": 0.999, "total_steps": 7, "beta": 2},
    "linear": {"decay": 0.99, "total_steps": 7},
    "warmup": {"decay": 0.9},
    "debiased": {"decay": 0.7},
    "power": {"sigma_rel": 0.1, "total_steps": 100},
    "half_life": {"half_life": 3, "rampup_ratio": 0.05, "total_steps": 100},
    "half_life_fraction": {"total_steps": 100},
}


def make_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 33), nn.BatchNorm1d(33)).double()


def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def pair(backend: str, **arguments: Any) -> tuple[nn.Module, FastEMA, FastEMA]:
    model = make_model()
    eager = FastEMA(model, backend=backend, **arguments)
    return model, eager, FastEMA(model, backend=backend, capturable=True, **arguments)


def same(first: FastEMA, second: FastEMA) -> bool:
    a, b = first.state_dict(), second.state_dict()
    shadows: tuple[dict[str, Tensor], dict[str, Tensor]] = a.pop("shadow"), b.pop("shadow")
    return a == b and all(torch.equal(shadows[0][name], shadows[1][name]) for name in shadows[0])


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("decay_type", SCHEDULES)
def test_same_bits_as_eager(backend: str, decay_type: str, update_every: int) -> None:
    arguments = {"decay_type": decay_type, "update_every": update_every, "update_after_step": 2}
    model, eager, captured = pair(backend, **arguments, **SCHEDULES[decay_type])
    for step in range(1, 101):  # far beyond total_steps
        move(model, step)
        eager.update()
        captured.update()
    assert same(eager, captured)
    assert captured.num_updates == eager.num_updates == 100 // update_every


def test_found_inf_skips_the_step_as_eager_does(backend: str) -> None:
    model, eager, captured = pair(backend, decay_type="threshold", update_every=2)
    for step, found in enumerate([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]):
        move(model, step)
        for ema in (eager, captured):
            ema.update(found_inf=torch.tensor([found]))
    assert same(eager, captured)
    assert captured.num_updates == 2


def test_several_decays(backend: str) -> None:
    model = make_model()
    decays = [0.9, 0.99, 0.999]
    eager = FastEMA(model, decay=decays, decay_type="warmup", backend=backend)
    captured = FastEMA(model, decay=decays, decay_type="warmup", backend=backend, capturable=True)
    for step in range(20):
        move(model, step)
        eager.update()
        captured.update()
    for which in range(3):
        first, second = eager.shadow_state_dict(which=which), captured.shadow_state_dict(which=which)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_between_the_two_ways(backend: str) -> None:
    model, eager, captured = pair(backend, decay_type="threshold")
    for step in range(5):
        move(model, step)
        eager.update()
    captured.load_state_dict(copy.deepcopy(eager.state_dict()))
    again = pickle.loads(pickle.dumps(captured))
    assert again.num_updates == 5
    move(model, 9)
    eager.update()
    captured.update()
    assert same(eager, captured)


def test_addresses_stay_over_updates_loads_and_an_exchange_in_place(backend: str) -> None:
    """Shadow, step and weights must stay where they are: a captured graph has their addresses."""
    _, _, captured = pair(backend, decay_type="threshold")
    counter = captured.counter
    assert counter is not None

    def addresses() -> list[int]:
        tensors = [counter.step, counter.weights, *captured.state_dict()["shadow"].values()]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    captured.update()
    captured.load_state_dict(copy.deepcopy(captured.state_dict()))
    with captured.swapped(in_place=True):
        pass
    assert addresses() == before


def test_a_step_from_outside_is_refused(backend: str) -> None:
    _, _, captured = pair(backend)
    with pytest.raises(ValueError, match="counts its own steps"):
        captured.update(step=3)
    assert captured.num_updates == 0


class Sawtooth(IDecayFunction):
    """Never settles."""

    def __init__(self, **kwargs: Any) -> None: ...

    def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
        return decay * (step % 3) / 3


def test_a_schedule_of_ones_own_needs_an_end(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMA_DECAY_FUNCTIONS, "sawtooth", Sawtooth)
    with pytest.raises(ValueError, match="needs total_steps with Sawtooth"):
        FastEMA(make_model(), decay_type="sawtooth", capturable=True, backend=backend)
    model, eager, captured = pair(backend, decay_type="sawtooth", total_steps=9)
    for step in range(9):
        move(model, step)
        eager.update()
        captured.update()
    assert same(eager, captured)


def test_a_schedule_that_takes_too_long_to_settle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastema.core.counters._MAX_ROWS", 50)
    with pytest.raises(ValueError, match="has not reached its decay after 50 updates"):
        FastEMA(make_model(), decay=0.999, decay_type="threshold", capturable=True)


FOUND_INF = [None, 1.0, 0.0, 0.0, float("nan"), *[None] * 30, 1.0, 0.0]


def counter_states(counter: DeviceCounter) -> list[list[float]]:
    """Return the state after each step: step, updates, skip, weights."""
    states = []
    for value in FOUND_INF:
        args = counter.begin(None, None if value is None else torch.tensor(value, device=counter.step.device), None)
        assert args is not None and args.skip is not None
        skip = args.skip
        states.append([float(counter.step), float(counter.num_updates), float(skip), *counter.weights.tolist()])
    return states


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_clock_kernel_has_the_bits_of_torchs_operations() -> None:
    decays = Decays([0.9, 0.999], "exp", 20, 2, {})
    counter = DeviceCounter(decays, 3, True, torch.device("cuda", torch.cuda.current_device()))
    if counter._launch is None:
        pytest.skip("the CUDA kernels cannot run here")
    assert counter_states(counter) == counter_states(DeviceCounter(decays, 3, True, torch.device("cpu")))


def test_a_found_inf_that_the_clock_kernel_cannot_read_goes_to_torchs_operations() -> None:
    counter = DeviceCounter(Decays(0.9, "constant", None, 0, {}), 1, True, torch.device("cpu"))
    launched: list[Any] = []
    counter._launch = lambda *arguments: launched.append(arguments[2])
    found_inf = torch.ones(())
    counter.begin(None, None, None)
    counter.begin(None, found_inf, None)
    counter.begin(None, found_inf.double(), None)
    counter.begin(None, torch.tensor(True), None)
    assert launched == [None, found_inf]
    assert int(counter.step) == 0  # both of the others were skipped

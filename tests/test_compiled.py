"""`ema.update()` inside a compiled step: the graph does not break, nothing gets lost, the bits are the eager path's."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

from fastema import FastEMA, compiled


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def make_model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.LSTM(5, 2))


def same(first: FastEMA, second: FastEMA) -> bool:
    a, b = first.state_dict(), second.state_dict()
    shadows: tuple[dict[str, Tensor], dict[str, Tensor]] = a.pop("shadow"), b.pop("shadow")
    return a == b and all(torch.equal(shadows[0][name], shadows[1][name]) for name in shadows[0])


@pytest.mark.parametrize("capturable", [False, True], ids=["eager-clock", "device-clock"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_update_in_a_compiled_step(backend: str, compiler: str, capturable: bool) -> None:
    model = make_model()
    parameters = list(model.parameters())
    ema = FastEMA(model, decay=0.9, decay_type="threshold", backend=backend, capturable=capturable)
    twin = copy.deepcopy(ema)

    def step(into: FastEMA, weights: list[nn.Parameter], move: Tensor) -> None:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(0.5).add_(move)
        into.update()

    compiled_step = torch.compile(step, backend=compiler, fullgraph=True)
    for number in range(4):
        compiled_step(ema, parameters, torch.tensor(float(number)))
        step(twin, list(twin._source.parameters()), torch.tensor(float(number)))  # type: ignore[union-attr]
    assert ema.num_updates == 4
    assert same(ema, twin)
    ema.update()  # eager again, on the same shadow
    twin.update()
    assert same(ema, twin)


def test_update_in_a_step_that_inductor_compiles() -> None:
    model = nn.Linear(3, 5)
    ema = FastEMA(model, decay=[0.9, 0.5])
    twin = copy.deepcopy(ema)

    def step(into: FastEMA, weight: Tensor, bias: Tensor) -> None:
        with torch.no_grad():
            weight.add_(1.0)
            bias.mul_(0.5)
        into.update()

    compiled_step = torch.compile(step, fullgraph=True)
    for _ in range(3):
        compiled_step(ema, model.weight, model.bias)
        step(twin, twin._source.weight, twin._source.bias)  # type: ignore[union-attr]
    for which in (0, 1):
        first, second = ema.shadow_state_dict(which=which), twin.shadow_state_dict(which=which)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_op_is_sound(backend: str) -> None:
    ema = FastEMA(make_model(), backend=backend)
    torch.library.opcheck(compiled.update, (*ema._shadow.operands(), ema._handle, None, None))
    torch.library.opcheck(compiled.update, (*ema._shadow.operands(), ema._handle, 3, torch.tensor(0.0)))


def test_an_ema_that_is_gone_is_an_error() -> None:
    ema = FastEMA(make_model())
    operands, handle = ema._shadow.operands(), ema._handle
    del ema
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        compiled.update(*operands, handle, None, None)


def test_overlapping_tensors_cannot_be_stood_in_for() -> None:
    buffer = torch.zeros(6)
    ema = FastEMA([("a", buffer[:4]), ("b", buffer[2:])])
    shadows, lives = ema._shadow.operands()
    with pytest.raises(RuntimeError, match="overlap in memory"):
        compiled.update(shadows, [live.clone() for live in lives], ema._handle, None, None)
    assert ema.num_updates == 0

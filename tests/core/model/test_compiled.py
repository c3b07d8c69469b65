"""Compiled models and compiled steps: no graph breaks, nothing is compiled again, the bits are the eager path's."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn

from fastema import FastEMA
from fastema.core import compiled

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def make_model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.LSTM(5, 2))


def same(first: FastEMA, second: FastEMA, agree: Callable[..., bool] = torch.equal) -> bool:
    a, b = first.state_dict(), second.state_dict()
    shadows: tuple[dict[str, Tensor], dict[str, Tensor]] = a.pop("shadow"), b.pop("shadow")
    return a == b and all(agree(shadows[0][name], shadows[1][name]) for name in shadows[0])


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
        step(twin, list(twin.source.parameters()), torch.tensor(float(number)))  # type: ignore[union-attr]
    assert ema.num_updates == 4
    assert same(ema, twin)
    ema.update()  # eager again, on the same shadow
    twin.update()
    assert same(ema, twin)


@pytest.mark.slow
@needs_compiler
def test_update_in_a_step_that_inductor_compiles() -> None:
    model = nn.Linear(3, 5)
    ema = FastEMA(model, decay=[0.9, 0.5], decay_type="constant")
    twin = copy.deepcopy(ema)

    def step(into: FastEMA, weight: Tensor, bias: Tensor) -> None:
        with torch.no_grad():
            weight.add_(1.0)
            bias.mul_(0.5)
        into.update()

    compiled_step = torch.compile(step, fullgraph=True)
    for _ in range(3):
        compiled_step(ema, model.weight, model.bias)
        step(twin, twin.source.weight, twin.source.bias)  # type: ignore[union-attr]
    for which in (0, 1):
        first, second = ema.shadow_state_dict(which=which), twin.shadow_state_dict(which=which)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@needs_compiler
def test_a_captured_step_leaves_the_update_outside_of_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`reduce-overhead` partitions the step: the user's code is captured before and after, and every update counts."""
    from torch._inductor import scheduler, utils

    reasons: list[str | None] = []
    should_partition = scheduler.Scheduler.should_partition

    def as_on_a_gpu(self: Any, node: Any) -> str | None:
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(type(node), "is_gpu", lambda _: True)
            reasons.append(should_partition(self, node))
        return reasons[-1]

    captured: list[int] = []  # calls of each graph
    model = nn.Linear(3, 5)
    ema = FastEMA(model, decay=0.9, decay_type="threshold")
    twin = copy.deepcopy(ema)

    def capture(graph: Any, metadata: Any) -> Any:
        captured.append(0)
        which = len(captured) - 1

        def replay(inputs: Any) -> Any:
            captured[which] += 1
            before = ema.num_updates
            result = graph(inputs)
            assert ema.num_updates == before, "a replay would not update"
            return result

        return replay

    monkeypatch.setattr(scheduler.Scheduler, "should_partition", as_on_a_gpu)
    utils.set_customized_partition_wrappers(capture)
    try:

        def step(into: FastEMA, weight: Tensor, bias: Tensor) -> Tensor:
            with torch.no_grad():
                weight.add_(1.0)
                bias.mul_(0.5)
            into.update()
            return torch.sin(weight) * bias.sum()

        with inductor_config.patch(graph_partition=True, force_disable_caches=True):
            compiled_step = torch.compile(step, fullgraph=True)
            for number in range(1, 4):
                compiled_step(ema, model.weight, model.bias)
                step(twin, twin.source.weight, twin.source.bias)  # type: ignore[union-attr]
                assert ema.num_updates == number
    finally:
        utils.set_customized_partition_wrappers(None)  # type: ignore[arg-type]
    assert same(ema, twin)
    assert reasons.count("CUDAGraph-unsafe custom ops") >= 1 and None in reasons
    assert captured and set(captured) == {3}, "the step's own code is captured"


def test_the_op_is_sound(backend: str) -> None:
    ema = FastEMA(make_model(), backend=backend)
    operands, handle = ema.engine.averages.operands(), ema._compiled_handle()
    torch.library.opcheck(compiled.update, (*operands, handle, None, None))
    torch.library.opcheck(compiled.update, (*operands, handle, 3, torch.tensor(0.0)))


def test_an_ema_that_is_gone_is_an_error() -> None:
    ema = FastEMA(make_model())
    operands, handle = ema.engine.averages.operands(), ema._compiled_handle()
    del ema
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        compiled.update(*operands, handle, None, None)


def test_overlapping_tensors_cannot_be_stood_in_for() -> None:
    buffer = torch.zeros(6)
    ema = FastEMA([("a", buffer[:4]), ("b", buffer[2:])])
    shadows, lives = ema.engine.averages.operands()
    with pytest.raises(RuntimeError, match="overlap in memory"):
        compiled.update(shadows, [live.clone() for live in lives], ema._compiled_handle(), None, None)
    assert ema.num_updates == 0


# ---- a swap under compiled code ----


class Net(nn.Module):
    """A class of its own: torch compiles no `nn.Sequential` in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features)


def as_wrapper(model: nn.Module, compiler: str = "aot_eager") -> Any:
    return torch.compile(model, backend=compiler)


def in_place(model: nn.Module, compiler: str = "aot_eager") -> Any:
    model.compile(backend=compiler)
    return model


def inside_a_function(model: nn.Module, compiler: str = "aot_eager") -> Any:
    return torch.compile(lambda features: model(features), backend=compiler)


def inside_a_parent(model: nn.Module, compiler: str = "aot_eager") -> Any:
    return torch.compile(nn.Sequential(model), backend=compiler)


Kind = Callable[..., Any]
KINDS: list[Kind] = [as_wrapper, in_place, inside_a_function, inside_a_parent]


def frames() -> int:
    """Return how many frames dynamo has compiled since the last reset of its counters."""
    return torch._dynamo.utils.counters["frames"]["ok"]


def trained(model: nn.Module, dtype: torch.dtype = torch.float32) -> FastEMA:
    ema = FastEMA(model, decay=0.5, decay_type="constant", dtype=dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    ema.update()
    return ema


def plain_output(state: dict[str, Tensor], features: Tensor) -> Tensor:
    model = Net().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(features)


@pytest.mark.parametrize("contents", [False, True], ids=["pointers", "contents"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_under_a_compiled_model(kind: Kind, contents: bool, backend: str) -> None:
    model = Net().eval()
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    ema.update()
    run, features = kind(model), torch.randn(5, 6)
    average = {name: tensor.clone() for name, tensor in ema.shadow_state_dict().items()}
    live = copy.deepcopy(model.state_dict())
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        run(features)
        compiled_frames = frames()
        assert compiled_frames > 0
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                with ema.swapped(in_place=contents):
                    swapped = run(features)
                restored = run(features)
    assert frames() == compiled_frames
    assert torch.equal(swapped, plain_output(average, features))
    assert torch.equal(restored, plain_output(live, features))
    assert not torch.allclose(swapped, restored)


@pytest.mark.slow
@needs_compiler
def test_a_swap_under_a_model_that_inductor_compiles() -> None:
    """Both exchanges, and stand-ins (a float64 shadow)."""
    model, features = Net().eval(), torch.randn(5, 6)
    run = torch.compile(model)
    direct, cast = trained(model), trained(model, torch.float64)
    with torch.no_grad():
        run(features)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ema, contents in ((direct, False), (direct, True), (cast, False)):
            average = {name: tensor.clone() for name, tensor in ema.shadow_state_dict().items()}
            live = copy.deepcopy(model.state_dict())
            with torch.no_grad(), ema.swapped(in_place=contents):
                torch.testing.assert_close(run(features), plain_output(average, features))
            with torch.no_grad():
                torch.testing.assert_close(run(features), plain_output(live, features))
    assert frames() == 0


def test_a_swap_between_steps_of_a_compiled_training() -> None:
    model = Net()
    ema = FastEMA(model, decay=0.9, decay_type="constant")
    twin_model = copy.deepcopy(model)
    twin = FastEMA(twin_model, decay=0.9, decay_type="constant")

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, into: FastEMA, features: Tensor) -> None:
        net(features).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        into.update()

    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin_model)]
    compiled_step = torch.compile(step, backend="aot_eager")
    # Bit for bit; but below torch 2.13, where a compiled step itself differs from an eager one, by 6e-8.
    agree = torch.equal if torch.__version__ >= "2.13" else torch.allclose
    batches = [torch.randn(5, 6) for _ in range(6)]
    for number, features in enumerate(batches):
        compiled_step(model, optimizers[0], ema, features)
        step(twin_model, optimizers[1], twin, features)
        if number == 1:
            torch._dynamo.utils.counters.clear()
        if number % 2 == 0:
            outputs = []
            for its, each in ((ema, model), (twin, twin_model)):
                each.eval()
                with torch.no_grad(), its.swapped():
                    outputs.append(each(features))
                each.train()
            assert agree(*outputs)
    assert frames() == 0, "nothing compiled after the second step"
    assert same(ema, twin, agree)


# ---- frozen weights ----


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", [as_wrapper, inside_a_function, inside_a_parent])
def test_frozen_weights_are_refused(kind: Kind) -> None:
    model, features = Net().eval(), torch.randn(5, 6)
    ema = trained(model)
    run = kind(model, "inductor")
    live = copy.deepcopy(model.state_dict())
    with inductor_config.patch(freezing=True), torch.no_grad():
        run(features)
        for contents in (False, True):
            with pytest.raises(RuntimeError, match=r"_inductor.config.freezing.*torch._dynamo.reset"):
                ema.apply_shadow(in_place=contents)
            assert not ema.is_applied
            assert all(torch.equal(tensor, live[name]) for name, tensor in model.state_dict().items())

            ema.engine.averages.apply(0, contents)  # what it would do
            assert not torch.allclose(run(features), model.body(features)), "freezing no longer breaks it: allow it"
            ema.restore()


@pytest.mark.parametrize("kind", [as_wrapper, in_place])
def test_a_wrapper_is_refused_before_anything_is_frozen(kind: Kind) -> None:
    ema = FastEMA(kind(Net()))
    with inductor_config.patch(freezing=True), pytest.raises(RuntimeError, match="freezing"):
        ema.apply_shadow()
    with ema.swapped():
        assert ema.is_applied


def test_a_model_that_is_not_compiled_does_not_mind_freezing() -> None:
    other, features = Net().eval(), torch.randn(5, 6)
    ema = trained(Net())
    with inductor_config.patch(freezing=True), torch.no_grad():
        as_wrapper(other)(features)
        with ema.swapped():
            assert ema.is_applied

"""A shadow in host memory of weights on a GPU, with streams: `make gpu-test`, and tests/accelerator without a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases.gpu import DEVICE, current_stream, gpu, needs_cuda, needs_gpu, no_waiting, on, sleep
from fastema import FastEMA
from fastema.backends import native

pytestmark = [
    *needs_gpu,
    pytest.mark.skipif(native.why_unusable("cpu") is not None, reason="fastema._C is not available"),
]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(2)
    layers = [nn.Linear(64, 257), nn.BatchNorm1d(257), nn.ReLU(), nn.Linear(257, 65)]
    return nn.Sequential(*layers).to(DEVICE).to(dtype)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    dtype = next(model.parameters()).dtype
    optimizer.zero_grad()
    model(torch.randn(32, 64, device=DEVICE, dtype=dtype)).float().square().mean().backward()
    optimizer.step()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)


def side_stream(ema: FastEMA) -> Any:
    (plan,) = ema.engine.averages.plans.offloaded
    return plan._transfer._stream  # type: ignore[attr-defined]


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "by hand"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fifty_steps_have_the_bits_of_a_copied_average(dtype: torch.dtype, attached: bool) -> None:
    model = make_model(dtype)
    arguments: dict[str, Any] = {"decay": [0.9, 0.99], "decay_type": "threshold"}
    on_host = FastEMA(model, device="cpu", **arguments)
    on_cpu = copy.deepcopy(model).cpu()
    ordinary = FastEMA(on_cpu, **arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if attached:
        on_host.attach(optimizer)
    for _ in range(50):
        train_step(model, optimizer)
        with torch.no_grad():
            for own, other in zip(on_cpu.state_dict().values(), model.state_dict().values(), strict=True):
                own.copy_(other)
        ordinary.update()
        if not attached:
            on_host.update()
    for which in (0, 1):
        assert equal(on_host.shadow_state_dict(which=which), ordinary.shadow_state_dict(which=which))


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "by hand"])
def test_fifty_steps_without_a_wait_in_between(attached: bool) -> None:
    """Beside an average on the GPU, that nothing here waits for either."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    on_host, on_gpu = (
        FastEMA(model, decay=0.9, decay_type="constant", device="cpu"),
        FastEMA(model, decay=0.9, decay_type="constant"),
    )
    if attached:
        on_gpu.attach(optimizer)
        on_host.attach(optimizer)
    for _ in range(50):
        train_step(model, optimizer)
        if not attached:
            on_gpu.update()
            on_host.update()
    assert equal(on_host.shadow_state_dict(), on_gpu.shadow_state_dict())
    live, average = copy.deepcopy(model.state_dict()), on_gpu.shadow_state_dict()
    with on_host.swapped():
        assert equal(model.state_dict(), average)
    assert equal(model.state_dict(), live)


def test_an_update_does_not_wait_for_the_device() -> None:
    model = make_model()
    ema = FastEMA(model, device="cpu")
    ema.update()
    ema.synchronize()
    end = torch.Event(DEVICE)
    sleep()
    end.record(current_stream())
    with no_waiting():
        ema.update(found_inf=torch.zeros((), device=DEVICE))
    assert not end.query()
    ema.synchronize()
    assert end.query()


def test_what_is_being_copied_is_not_overwritten() -> None:
    model = make_model()
    ema = FastEMA(model, decay=0.0, decay_type="constant", device="cpu")
    expected = copy.deepcopy(model.state_dict())
    gpu.synchronize()
    with on(side_stream(ema)):
        sleep()  # the copy comes late
    ema.update()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    assert equal(ema.shadow_state_dict(), expected)


def test_an_attached_step_alone_waits_for_the_copy() -> None:
    model = nn.Linear(64, 64).to(DEVICE)
    ema = FastEMA(model, decay=0.0, decay_type="constant", device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer)
    features = torch.randn(8, 64, device=DEVICE)
    model(features).sum().backward()
    gpu.synchronize()
    with on(side_stream(ema)):
        sleep()
    optimizer.step()
    stepped = [parameter.detach().clone() for parameter in model.parameters()]
    model(features).sum().backward()
    current_stream().synchronize()
    late = ema.engine.averages.plans.offloaded[0]._deferred_copy
    assert late is not None and not late.copied.query(), "forward and backward ran beside the copy"  # type: ignore[attr-defined]
    ema.engine.averages.plans.order_writes()  # as the hook before the next step does
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert all(
        torch.equal(average, live.cpu())
        for average, live in zip(ema.shadow_state_dict().values(), stepped, strict=True)
    )


def test_found_inf_on_the_device_skips() -> None:
    model = make_model()
    ema = FastEMA(model, decay=0.5, decay_type="constant", device="cpu")
    before = copy.deepcopy(ema.shadow_state_dict())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    found_inf = torch.ones(1, device=DEVICE)
    ema.update(found_inf=found_inf)
    found_inf.zero_()
    assert equal(before, ema.shadow_state_dict())
    ema.update(found_inf=found_inf)
    found_inf.fill_(1.0)
    assert not equal(before, ema.shadow_state_dict())


@needs_cuda
def test_a_captured_update_is_refused() -> None:
    model = make_model()
    ema = FastEMA(model, device="cpu")
    graph = torch.cuda.CUDAGraph()
    gpu.synchronize()
    with torch.cuda.graph(graph):
        torch.zeros(1, device=DEVICE)
        with pytest.raises(RuntimeError, match="a replay would run no average"):
            ema.update()
    assert ema.num_updates == 0
    ema.update()
    ema.synchronize()


def test_staging_memory_is_pinned_and_as_large_as_the_weights() -> None:
    model = make_model()
    (plan,) = FastEMA(model, device="cpu").engine.averages.plans.offloaded
    assert all(host.is_pinned() for host, _ in plan._pairs)
    own = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert sum(host.numel() * host.element_size() for host, _ in plan._pairs) == own

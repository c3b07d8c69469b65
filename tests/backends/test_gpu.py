"""Tests that need a GPU: `make gpu-test` runs these; so does tests/accelerator, on a device that is made up."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import DTYPE_PAIRS, SIZES, values
from cases.gpu import (
    BACKENDS,
    DEVICE,
    allocations,
    enqueued_by,
    gpu,
    needs_cuda,
    needs_gpu,
    new_stream,
    no_waiting,
    on,
    sleep,
)
from cases.plans import plan_of
from fastema import FastEMA, backends
from fastema.backends import native
from fastema.backends.contract import UpdateArgs

pytestmark = needs_gpu


@pytest.fixture(params=BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """A backend that runs on the GPU."""
    module = backends.BACKENDS[request.param]
    reason = module.why_unusable(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(
        nn.Conv2d(3, 17, 3), nn.BatchNorm2d(17), nn.LSTM(7, 9), nn.Linear(33, 129, bias=False), nn.Linear(1, 1)
    ).to(dtype)


def move(model: nn.Module, seed: int) -> None:
    """The same change on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            change = torch.randn(tensor.shape, generator=generator)
            tensor.add_(change.to(tensor.device, tensor.dtype) if tensor.is_floating_point() else 1)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)


def flat(tensor: Tensor, offset: int) -> Tensor:
    """The same values on the GPU, `offset` elements into a larger buffer: no longer 16-byte aligned."""
    room = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype, device=DEVICE)
    room[offset:].copy_(tensor)
    return room[offset:]


@pytest.mark.parametrize("skip_nonfinite", [True, False], ids=["skipping", "plain"])
@pytest.mark.parametrize(("shadow_dtype", "live_dtype"), DTYPE_PAIRS, ids=str)
def test_matrix_is_bit_equal_to_the_cpu(
    gpu_backend: str, shadow_dtype: torch.dtype, live_dtype: torch.dtype, skip_nonfinite: bool
) -> None:
    lives = [values(size, dtype=live_dtype, seed=size) for size in SIZES for _ in range(4)]
    offsets = [(a, b) for _ in SIZES for a, b in ((0, 0), (1, 1), (3, 0), (0, 1))]
    shadows = [
        [values(live.numel(), dtype=shadow_dtype, seed=live.numel() + 1 + which) for live in lives] for which in (0, 1)
    ]
    if skip_nonfinite:
        for live in lives:
            live[::7] = float("nan")
            live[3::11] = float("inf")
    weights = [0.01, 0.6]
    cpu_shadows = [[shadow.clone() for shadow in each] for each in shadows]
    plan_of(native, cpu_shadows, lives).update(UpdateArgs(weights, skip_nonfinite))
    gpu_lives = [flat(live, offset) for live, (_, offset) in zip(lives, offsets, strict=True)]
    gpu_shadows = [
        [flat(shadow, offset) for shadow, (offset, _) in zip(each, offsets, strict=True)] for each in shadows
    ]
    plan = plan_of(backends.BACKENDS[gpu_backend], gpu_shadows, gpu_lives)
    plan.update(UpdateArgs(weights, skip_nonfinite))
    for cpu, on_gpu in zip(chain(*cpu_shadows), chain(*gpu_shadows), strict=True):
        torch.testing.assert_close(on_gpu.cpu(), cpu, rtol=0, atol=0, equal_nan=True)
    assert plan.nonfinite_count() == (sum(int((~live.isfinite()).sum()) for live in lives) if skip_nonfinite else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_training_is_that_of_the_cpu(gpu_backend: str, dtype: torch.dtype) -> None:
    on_cpu = make_model(dtype)
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE)
    emas = [
        FastEMA(on_cpu, decay=[0.9, 0.99], decay_type="constant"),
        FastEMA(on_gpu, decay=[0.9, 0.99], decay_type="constant", backend=gpu_backend),
    ]
    for seed in range(10):
        for model, ema in zip((on_cpu, on_gpu), emas, strict=True):
            move(model, seed)
            ema.update()
    for which in (0, 1):
        assert equal(emas[0].shadow_state_dict(which=which), emas[1].shadow_state_dict(which=which))
    live = copy.deepcopy(on_gpu.state_dict())
    pointer = on_gpu[0].weight.data_ptr()
    with emas[1].swapped(which=1):
        assert on_gpu[0].weight.data_ptr() != pointer
    assert equal(live, on_gpu.state_dict()) and on_gpu[0].weight.data_ptr() == pointer


def test_an_update_is_one_launch_without_allocation_copy_or_wait(gpu_backend: str) -> None:
    if gpu_backend == "torch":
        pytest.skip("it has no kernels of its own")
    model = make_model().to(DEVICE)
    model.half_part = nn.Linear(5, 5).to(DEVICE).bfloat16()
    ema = FastEMA(model, backend=gpu_backend)
    ema.update()
    gpu.synchronize()
    before = allocations()
    with no_waiting():
        on_device = enqueued_by(ema.update)
    assert allocations() == before
    assert not any("memcpy" in name.lower() or "memset" in name.lower() for name in on_device), on_device
    most = 3 if gpu_backend == "triton" else 1  # Triton: one for each dtype pair, f32, f32 <- bf16 and copies
    assert 1 <= len(on_device) <= most, on_device


def test_a_capturable_update_is_two_launches() -> None:
    reason = native.why_unusable(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    ema = FastEMA(make_model().to(DEVICE), capturable=True, backend="native")
    found_inf = torch.zeros((), device=DEVICE)
    ema.update(found_inf=found_inf)
    on_device = enqueued_by(lambda: ema.update(found_inf=found_inf))
    assert len(on_device) == 2, on_device


@needs_cuda
@pytest.mark.parametrize("decay_type", ["constant", "threshold", "warmup", "exp"])
def test_a_captured_step_replays_with_the_right_decay(gpu_backend: str, decay_type: str) -> None:
    arguments: dict[str, Any] = {"decay": 0.99, "decay_type": decay_type, "total_steps": 20, "backend": gpu_backend}
    model = make_model().to(DEVICE)
    parameters = list(model.parameters())
    eager_model = copy.deepcopy(model)
    captured = FastEMA(model, capturable=True, **arguments)
    eager = FastEMA(eager_model, **arguments)
    change = torch.zeros((), device=DEVICE)
    found_inf = torch.zeros((), device=DEVICE)

    def step() -> None:
        torch._foreach_add_(parameters, change)
        captured.update(found_inf=found_inf)

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        state = copy.deepcopy(captured.state_dict())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        captured.load_state_dict(state)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
            with pytest.raises(RuntimeError, match="capture"):
                captured.apply_shadow()
        captured.load_state_dict(state)
        for number in range(1, 31):
            change.fill_(0.25 * number)
            found_inf.fill_(float(number % 5 == 0))
            graph.replay()
            torch._foreach_add_(list(eager_model.parameters()), 0.25 * number)
            if number % 5:
                eager.update()
    assert captured.num_updates == eager.num_updates == 24
    assert equal(captured.shadow_state_dict(), eager.shadow_state_dict())


def test_an_exchange_in_place_keeps_addresses_and_bits(gpu_backend: str) -> None:
    model = make_model().to(DEVICE)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=gpu_backend)
    move(model, 1)
    ema.update()
    live, average = copy.deepcopy(model.state_dict()), copy.deepcopy(ema.shadow_state_dict())
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    with ema.swapped(in_place=True):
        assert equal(model.state_dict(), average)
        assert [tensor.data_ptr() for tensor in model.state_dict().values()] == addresses
    assert equal(model.state_dict(), live) and equal(ema.shadow_state_dict(), average)


def test_it_runs_on_the_current_stream(gpu_backend: str) -> None:
    model = nn.Linear(4096, 4096).to(DEVICE)
    ema = FastEMA(model, decay=0.0, decay_type="constant", backend=gpu_backend)
    gpu.synchronize()
    side = new_stream()
    with on(side), torch.no_grad():
        sleep()  # the default stream would overtake this
        model.weight.fill_(3.0)
        ema.update()
    side.synchronize()
    assert bool((ema.shadow_state_dict()["weight"] == 3.0).all())


def test_found_inf_on_the_device_skips(gpu_backend: str) -> None:
    model = nn.Linear(3, 3).to(DEVICE)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=gpu_backend)
    before = copy.deepcopy(ema.shadow_state_dict())
    move(model, 1)
    ema.update(found_inf=torch.ones(1, device=DEVICE))
    assert equal(before, ema.shadow_state_dict())
    ema.update(found_inf=torch.zeros(1, device=DEVICE))
    assert not equal(before, ema.shadow_state_dict())


@needs_cuda
def test_more_elements_than_an_int_counts(gpu_backend: str) -> None:
    count = 2**31 + 1021
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * count:
        pytest.skip(f"needs {10 * count >> 30} GiB of free GPU memory, there are {free >> 30}")
    live = torch.ones(count, dtype=torch.bfloat16, device=DEVICE)
    ema = FastEMA([("w", live)], decay=0.75, decay_type="constant", backend=gpu_backend)
    live.fill_(2.0)
    live[-1] = 4.0
    ema.update()
    average = ema.shadow_state_dict()["w"]
    assert average[-1].item() == 1.75
    for part in average[:-1].split(2**28):
        assert bool((part == 1.25).all())


def test_a_model_over_two_devices(gpu_backend: str) -> None:
    if gpu.device_count() < 2:
        pytest.skip("one CUDA device")
    model = nn.Sequential(nn.Linear(3, 3).to(f"{DEVICE}:0"), nn.Linear(3, 3).to(f"{DEVICE}:1"))
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=gpu_backend)
    move(model, 1)
    ema.update()
    twin = copy.deepcopy(ema)
    assert equal(ema.shadow_state_dict(), twin.shadow_state_dict())


def test_a_shadow_in_host_memory(gpu_backend: str) -> None:
    model = make_model().to(DEVICE)
    ema = FastEMA(model, decay=0.5, decay_type="constant", device="cpu", backend=gpu_backend)
    move(model, 1)
    ema.update()
    assert ema.shadow_state_dict()["0.weight"].device.type == "cpu"
    live = copy.deepcopy(model.state_dict())
    with ema.swapped():
        assert torch.equal(model[0].weight.cpu(), ema.shadow_state_dict()["0.weight"])
    assert equal(model.state_dict(), live)

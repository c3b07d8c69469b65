"""FastEMA on the test accelerator: several devices, streams that are late on purpose, and memory that is given back.

What a CUDA device can show as well is in tests/backends/test_gpu.py, test_gpu_claims.py and tests/core/
test_offload_gpu.py, which run here too. This has what needs a stream that stops until the test opens it.
"""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import small_model, tensors_of
from cases.gpu import DEVICE, gpu, on
from fastema import FastEMA, backends
from fastema.backends import native
from fastema.checkpoint import load_checkpoint, save_checkpoint
from fastema.core import offload
from fastema.memory import streams

pytestmark = pytest.mark.gpu
HAS_KERNELS = native.why_unusable(DEVICE) is None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="this build of fastema._C has no kernels for it")
BACKENDS = ["native", "torch"] if HAS_KERNELS else ["torch"]
FIRST, SECOND = torch.device(DEVICE, 0), torch.device(DEVICE, 1)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


class Held:
    """A stream whose work waits; `open()` lets it go on."""

    def __init__(self, stream: torch.Stream) -> None:
        self.stream = stream
        self._gate = gpu.Gate(stream)

    def open(self) -> None:
        self._gate.open()


@pytest.fixture
def held() -> Iterator[Any]:
    """Return what holds a stream; all are let go in the end, so that a failed test ends."""
    all_held: list[Held] = []

    def hold(stream: torch.Stream) -> Held:
        all_held.append(Held(stream))
        return all_held[-1]

    yield hold
    for each in all_held:
        each.open()


def move(model: nn.Module, seed: int) -> None:
    """The same change on every device, enqueued."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors_of(model):
            change = torch.randn(tensor.shape, generator=generator)
            tensor.add_(change.to(tensor.device, tensor.dtype, non_blocking=True) if tensor.is_floating_point() else 1)


def averages(ema: FastEMA, which: int = 0) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in ema.shadow_state_dict(which=which).items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)


def pair(place: torch.device | str = FIRST, **arguments: Any) -> tuple[FastEMA, FastEMA, nn.Module, nn.Module]:
    """Return averages of equal models on the accelerator and the CPU."""
    on_cpu = small_model(arguments.pop("of", torch.float32))
    on_gpu = copy.deepcopy(on_cpu).to(place)
    here = {key: value for key, value in arguments.items() if key not in ("backend", "device")}
    return FastEMA(on_gpu, **arguments), FastEMA(on_cpu, **here), on_gpu, on_cpu


# ---- who gets it ----


def test_the_backend_is_the_one_that_has_kernels() -> None:
    model = small_model().to(DEVICE)
    assert FastEMA(model).backend_name == ("native" if HAS_KERNELS else "torch")
    names = {line.name: line for line in backends.report()}
    assert names[f"torch ({FIRST})"].usable and names[f"torch ({SECOND})"].usable
    assert names[f"native ({SECOND})"].usable == HAS_KERNELS
    assert streams.can_copy_to_pinned(SECOND)
    assert isinstance(offload.transfer_between(FIRST, torch.device("cpu")), offload.StreamTransfer)


@pytest.mark.skipif(HAS_KERNELS, reason="this build of fastema._C has kernels for it")
def test_without_kernels_it_is_said_once_and_pointers_still_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    model = small_model().to(DEVICE)
    with pytest.warns(UserWarning, match=f"torch backend on {DEVICE}:0, slower .*there are no kernels for {DEVICE}"):
        ema = FastEMA(model, decay=0.5)
    address, copies = model[0].weight.data_ptr(), gpu.tasks()
    with ema.swapped():
        assert model[0].weight.data_ptr() != address
        assert gpu.tasks() == copies, "nothing is copied"
    with pytest.raises(ValueError, match="capturable=True needs fastema's own kernels"):
        FastEMA(model, capturable=True)


# ---- values ----


@pytest.mark.parametrize("in_place", [False, True], ids=["by pointer", "in place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # the second is kept in two planes
@pytest.mark.parametrize("place", [FIRST, SECOND], ids=str)
def test_ten_steps_on_a_device_that_is_current_or_not(
    backend: str, place: torch.device, dtype: torch.dtype, in_place: bool
) -> None:
    ema, expected, model, twin = pair(place, of=dtype, decay=[0.9, 0.99], backend=backend)
    for seed in range(10):
        for each, its in ((ema, model), (expected, twin)):
            move(its, seed)
            with torch.no_grad():
                its[0].weight[0, 0] = float("nan") if seed == 3 else 1.0
            # A number on a device is read there, and its step counts.
            each.update(found_inf=torch.zeros((), device=its[0].weight.device))
    for which in (0, 1):
        live, average = copy.deepcopy(model.state_dict()), averages(ema, which)
        assert equal(average, averages(expected, which))
        in_model = {name: tensor.to(live[name].dtype) for name, tensor in average.items()}
        with ema.swapped(which=which, in_place=in_place):
            assert equal(dict(model.state_dict()), in_model)
        assert equal(dict(model.state_dict()), live)
    assert ema.nonfinite_count() == expected.nonfinite_count() == 1
    assert gpu.current_device() == 0


@needs_kernels
@pytest.mark.parametrize("place", [FIRST, SECOND], ids=str)
@pytest.mark.parametrize("decay_type", ["constant", "threshold", "exp"])
def test_capturable_has_the_bits_of_the_host(decay_type: str, place: torch.device) -> None:
    arguments: dict[str, Any] = {"decay": [0.9, 0.99], "decay_type": decay_type, "total_steps": 12, "update_every": 2}
    ema, expected, model, twin = pair(place, **arguments, capturable=True)
    for seed in range(20):
        move(model, seed)
        move(twin, seed)
        found_inf = float(seed % 5 == 4)
        ema.update(found_inf=torch.tensor(found_inf, device=place))
        expected.update(found_inf=torch.tensor(found_inf))
    assert ema.num_updates == expected.num_updates
    assert all(equal(averages(ema, which), averages(expected, which)) for which in (0, 1))


@pytest.mark.parametrize("place", [FIRST, SECOND], ids=str)
@pytest.mark.parametrize("shadow_device", [None, "cpu"], ids=["beside", "in host memory"])
def test_attached_to_an_optimizer(backend: str, place: torch.device, shadow_device: str | None) -> None:
    ema, expected, model, twin = pair(place, decay=0.8, device=shadow_device, backend=backend)
    for each, its in ((ema, model), (expected, twin)):
        optimizer = torch.optim.SGD(its.parameters(), lr=0.1, momentum=0.9)
        each.attach(optimizer)
        features = torch.ones(6, 3).to(its[0].weight.device)
        for step in range(12):
            optimizer.zero_grad()
            its(features * step).square().mean().backward()
            optimizer.step()
    assert ema.num_updates == 12 and equal(averages(ema), averages(expected))


def test_a_checkpoint_goes_on_where_it_was(backend: str, tmp_path: Path) -> None:
    ema, expected, model, twin = pair(decay=0.9, backend=backend)
    for seed in range(4):
        for each, its in ((ema, model), (expected, twin)):
            move(its, seed)
            each.update()
    save_checkpoint(tmp_path / "checkpoint.pt", net=model, ema=ema)
    other = small_model(seed=3).to(SECOND)
    resumed = FastEMA(other, decay=0.9, backend=backend)
    content = load_checkpoint(tmp_path / "checkpoint.pt")
    other.load_state_dict(content["net"])
    resumed.load_state_dict(content["ema"])
    for each, its in ((resumed, other), (expected, twin)):
        move(its, 9)
        each.update()
    assert resumed.num_updates == 5 and equal(averages(resumed), averages(expected))


def test_a_copy_and_a_pickle_have_their_own_memory(backend: str) -> None:
    ema, _, model, _ = pair(decay=0.5, backend=backend)
    move(model, 1)
    ema.update()
    file = io.BytesIO()
    torch.save({"model": model, "ema": ema}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    before = averages(loaded["ema"])
    assert equal(before, averages(ema))
    move(model, 2)
    ema.update()
    assert equal(averages(loaded["ema"]), before) and not equal(averages(ema), before)


def test_a_model_on_two_devices_and_the_host(backend: str) -> None:
    on_cpu = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
    model = copy.deepcopy(on_cpu)
    model[0].to(FIRST)
    model[1].to(SECOND)
    ema, expected = FastEMA(model, decay=0.9, backend=backend), FastEMA(on_cpu, decay=0.9)
    for seed in range(5):
        for each, its in ((ema, model), (expected, on_cpu)):
            move(its, seed)
            each.update()
    assert equal(averages(ema), averages(expected))
    for where in (FIRST, SECOND):
        before = averages(ema)
        move(model, 7)
        ema.update(found_inf=torch.ones((), device=where))
        assert equal(averages(ema), before)
    live = copy.deepcopy(model.state_dict())
    with ema.swapped():
        assert equal(dict(model.state_dict()), before)
    assert equal(dict(model.state_dict()), live)


# ---- streams that are late ----


def test_an_update_reads_what_was_written_before_and_not_what_is_written_after(backend: str, held: Any) -> None:
    ema, expected, model, twin = pair(decay=0.5, backend=backend)
    for each, its in ((ema, model), (expected, twin)):
        for tensor in its.parameters():
            tensor.data.fill_(2.0)
        each.update()
    gpu.synchronize()
    stream = held(torch.accelerator.current_stream())
    for tensor in model.parameters():
        tensor.data.fill_(4.0)
    ema.update()
    for tensor in model.parameters():
        tensor.data.fill_(8.0)
    assert not stream.stream.query(), "the host ran ahead"
    stream.open()
    for tensor in twin.parameters():
        tensor.data.fill_(4.0)
    expected.update()
    assert equal(averages(ema), averages(expected))


@pytest.mark.parametrize(("backend", "capturable"), [(each, False) for each in BACKENDS] + [("native", True)])
def test_dropped_while_its_update_waits(backend: str, capturable: bool, held: Any) -> None:
    """Built on one stream, updated on another that is late, then dropped: the update writes to nobody else's memory."""
    if not HAS_KERNELS and backend == "native":
        pytest.skip("this build of fastema._C has no kernels for it")
    ema, _, model, _ = pair(decay=0.5, backend=backend, capturable=capturable)
    side = torch.Stream(DEVICE)
    side.wait_stream(torch.accelerator.current_stream())
    gpu.synchronize()
    stream = held(side)
    with on(side):
        ema.update()
        ema.update()
    del ema
    gc.collect()
    others = [torch.full((1024,), 7, dtype=torch.uint8, device=DEVICE) for _ in range(200)]
    torch.accelerator.current_stream().synchronize()
    stream.open()
    side.synchronize()
    assert all(bool((other == 7).all()) for other in others)
    del model


def test_rebuilt_while_its_update_waits(backend: str, held: Any) -> None:
    ema, expected, model, twin = pair(decay=0.5, backend=backend)
    side = torch.Stream(DEVICE)
    for each, its in ((ema, model), (expected, twin)):
        move(its, 1)
        each.update()
    move(model, 2)
    side.wait_stream(torch.accelerator.current_stream())
    gpu.synchronize()
    stream = held(side)
    with on(side):
        ema.update()
    torch.accelerator.current_stream().wait_stream(side)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    move(model, 3)
    threading.Timer(0.1, stream.open).start()
    ema.update()  # builds a plan, and waits for the table of that alone
    others = [torch.full((1024,), 7, dtype=torch.uint8, device=DEVICE) for _ in range(200)]
    for seed in (2, 3):
        move(twin, seed)
        expected.update()
    assert equal(averages(ema), averages(expected))
    assert all(bool((other == 7).all()) for other in others)


@pytest.mark.parametrize("when", ["update", "swap"])
def test_a_swap_with_a_cast_on_a_late_stream(when: str, held: Any) -> None:
    """The scratch memory of bfloat16 weights is not given to others while a forward still reads it."""
    model = nn.Linear(64, 64).to(DEVICE, torch.bfloat16)
    ema = FastEMA(model, decay=0.0, decay_type="constant")
    features = torch.ones(2, 64, dtype=torch.bfloat16, device=DEVICE)
    with torch.no_grad():
        expected = model(features).clone()
        model.weight.zero_()
    if when == "update":
        ema.apply_shadow()
    side = torch.Stream(DEVICE)
    side.wait_stream(torch.accelerator.current_stream())
    gpu.synchronize()
    stream = held(side)
    with on(side), torch.no_grad():
        if when == "swap":
            ema.apply_shadow()
        output = model(features)
        ema.restore()
    others = [torch.full((64, 64), 7.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(16)]
    torch.accelerator.current_stream().synchronize()
    stream.open()
    side.synchronize()
    assert torch.equal(output, expected)
    assert all(bool((other == 7.0).all()) for other in others)
    assert not bool(model.weight.any())


# ---- a shadow in host memory ----


def plan_of(ema: FastEMA) -> Any:
    (plan,) = ema.engine.averages.plans.offloaded
    return plan


@pytest.mark.parametrize("place", [FIRST, SECOND], ids=str)
def test_what_is_being_copied_is_not_overwritten_and_the_host_runs_ahead(place: torch.device, held: Any) -> None:
    model = small_model().to(place)
    ema = FastEMA(model, decay=0.0, decay_type="constant", device="cpu")
    expected = copy.deepcopy(model.state_dict())
    gpu.synchronize(place.index)
    side = held(plan_of(ema)._transfer._stream)
    ema.update()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    assert not side.stream.query() and not torch.accelerator.current_stream(place).query()
    side.open()
    assert equal(averages(ema), expected)
    gpu.synchronize(place.index)
    assert all(bool((tensor == 7).all()) for tensor in model.state_dict().values())


def test_what_was_not_written_yet_is_not_copied(held: Any) -> None:
    model = small_model().to(DEVICE)
    ema = FastEMA(model, decay=0.0, decay_type="constant", device="cpu")
    gpu.synchronize()
    main = held(torch.accelerator.current_stream())
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(3)
    ema.update()
    assert plan_of(ema)._transfer._stream.query() is False
    main.open()
    assert all(bool((average == 3).all()) for name, average in averages(ema).items() if "weight" in name)


def test_several_updates_while_the_copy_is_late_each_count(held: Any) -> None:
    ema, expected, model, twin = pair(decay=[0.5, 0.75], device="cpu")
    for seed in range(6):
        side = held(plan_of(ema)._transfer._stream)
        timer = threading.Timer(0.02, side.open)
        timer.start()
        for each, its in ((ema, model), (expected, twin)):
            move(its, seed)
            each.update()
            move(its, seed + 100)
    assert all(equal(averages(ema, which), averages(expected, which)) for which in (0, 1))


def test_an_error_in_the_thread_comes_out_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ema, expected, model, twin = pair(decay=0.5, device="cpu")

    def broken(self: offload.StreamCopy) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(offload.StreamCopy, "wait", broken)
        ema.update()
        with pytest.raises(RuntimeError, match="the latest update is lost") as caught:
            ema.synchronize()
        assert isinstance(caught.value.__cause__, MemoryError)
    ema.synchronize()
    for its in (model, twin):
        move(its, 4)
    ema.counter._step = expected._step = 0
    ema.update()
    expected.update()
    assert equal(averages(ema), averages(expected))


def test_dropped_while_the_copy_is_late(held: Any) -> None:
    model = small_model().to(DEVICE)
    ema = FastEMA(model, decay=0.5, device="cpu")
    shadow = ema.state_dict()["shadow"]
    side = held(plan_of(ema)._transfer._stream)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(1.0)
    ema.update()
    future = plan_of(ema)._future
    del ema, model
    gc.collect()
    others = [torch.full((64,), 9.0, device=DEVICE) for _ in range(64)]
    side.open()
    future.result(timeout=60)
    assert all(bool(tensor.isfinite().all()) and float(tensor.abs().max()) < 10 for tensor in shadow.values())
    assert all(bool((other == 9).all()) for other in others)


@pytest.mark.parametrize("late", ["training", "copy"])
def test_found_inf_on_the_device_is_read_when_it_is_there(late: str, held: Any) -> None:
    model = small_model().to(DEVICE)
    ema = FastEMA(model, decay=0.5, decay_type="constant", device="cpu")
    before = averages(ema)
    found_inf = torch.zeros(1, device=DEVICE)
    gpu.synchronize()
    main = torch.accelerator.current_stream()
    stream = held(main if late == "training" else plan_of(ema)._transfer._stream)
    move_async = [parameter.data.add_(1.0) for parameter in model.parameters()]
    found_inf.fill_(1.0)
    ema.update(found_inf=found_inf)
    found_inf.zero_()
    stream.open()
    assert equal(averages(ema), before)
    ema.update(found_inf=found_inf)
    assert not equal(averages(ema), before)
    del move_async

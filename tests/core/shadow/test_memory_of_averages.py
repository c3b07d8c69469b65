"""Averages whose memory somebody else replaces, shares or takes for weights; and shadows of parts of storages."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastema import FastEMA
from fastema.integrations.timm import ModelEmaV3
from fastema.swa_utils import AveragedModel, get_ema_multi_avg_fn

pytestmark = pytest.mark.usefixtures("one_thread")


def shift(model: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


@pytest.mark.parametrize("state", ["state_dict", "shadow_state_dict"])
def test_the_average_goes_on_in_shared_memory(backend: str, state: str) -> None:
    model = nn.Linear(30, 30)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    tensors: dict[str, Any] = getattr(ema, state)()
    shared: Tensor = tensors.get("shadow", tensors)["weight"]
    shared.share_memory_()
    expected = shared.clone()
    for _ in range(50):
        shift(model)
        ema.update()
        expected = torch.lerp(expected, model.weight.detach(), 0.5)
    assert torch.equal(ema.shadow_state_dict()["weight"], expected)
    assert torch.equal(shared, expected), "who shares an average sees it go on"


def test_what_a_user_writes_to_a_shared_average_counts(backend: str) -> None:
    model = nn.Linear(3, 3)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    ema.update()
    shared = ema.state_dict()["shadow"]["weight"]
    shared.share_memory_()
    shared.fill_(7)
    ema.update()
    assert torch.equal(shared, torch.lerp(torch.full((3, 3), 7.0), model.weight.detach(), 0.5))
    assert torch.equal(ema.shadow_state_dict()["weight"], shared)


def test_an_averaged_model_goes_on_in_shared_memory() -> None:
    model = nn.Linear(30, 30)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    averaged.share_memory()
    expected = averaged.module.weight.detach().clone()
    for _ in range(50):
        shift(model)
        averaged.update_parameters(model)
        expected = torch.lerp(expected, model.weight.detach(), 0.5)
    assert torch.equal(averaged.module.weight, expected)


def test_memory_that_is_replaced_during_an_update_is_not_freed_under_it() -> None:
    """A queue's feeder thread moves a tensor to shared memory after put() has returned."""
    pytest.importorskip("fastema._C")
    model = nn.Linear(1000, 1000)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend="native")
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            ema.engine.averages.pairs[0].averages[0].view.share_memory_()

    thread = threading.Thread(target=move)
    thread.start()
    try:
        expected = ema.shadow_state_dict()["weight"].clone()
        for _ in range(30):
            shift(model)
            ema.update()
            expected = torch.lerp(expected, model.weight.detach(), 0.5)
    finally:
        stop.set()
        thread.join()
    assert torch.equal(ema.shadow_state_dict()["weight"], expected)


def test_two_storages_own_the_memory_of_a_shadow() -> None:
    from fastema.backends import native

    pytest.importorskip("fastema._C")
    tensor = torch.arange(5000.0)
    second = native.second_owner(tensor)
    assert second.data_ptr() == tensor.data_ptr() and second.untyped_storage()._cdata != tensor.untyped_storage()._cdata
    tensor.resize_(1_000_000)
    assert torch.equal(second.view(torch.float32), torch.arange(5000.0))
    del tensor
    assert torch.equal(second.view(torch.float32), torch.arange(5000.0))


def test_a_resized_average_is_refused(backend: str) -> None:
    model = nn.Linear(3, 3)
    ema = FastEMA(model, backend=backend)
    ema.state_dict()["shadow"]["weight"].resize_(1000)
    for call in (ema.update, ema.apply_shadow, ema.shadow_state_dict):
        with pytest.raises(RuntimeError, match="storage of an average was resized"):
            call()


def test_weights_that_are_their_own_average_are_refused(backend: str) -> None:
    model = nn.Linear(3, 3)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    model.load_state_dict(ema.shadow_state_dict(), assign=True)
    for call in (ema.update, ema.apply_shadow, ema.copy_to):
        with pytest.raises(RuntimeError, match=r"'weight', 'bias' .* memory of their own averages.*assign=True"):
            call()


def test_an_average_of_averages_is_not_swapped_while_the_first_is_updated(backend: str) -> None:
    model = nn.Linear(3, 3)
    first = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    averages = [(name, tensor) for name, tensor in first.shadow_state_dict().items()]
    second = FastEMA(averages, decay=0.5, decay_type="constant", backend=backend)
    shift(model)
    first.update()
    for in_place in (False, True):
        before = first.shadow_state_dict()["weight"].clone()
        with second.swapped(in_place=in_place), pytest.raises(RuntimeError, match="another FastEMA is applied"):
            first.update()
        assert torch.equal(first.shadow_state_dict()["weight"], before)
    with first.swapped(), pytest.raises(RuntimeError, match="another FastEMA is applied"):
        second.apply_shadow()


def test_timms_average_is_not_updated_while_its_module_holds_another_average() -> None:
    model = nn.Linear(3, 3)
    timm_ema = ModelEmaV3(model, decay=0.5)
    of_average = FastEMA(timm_ema.module, decay=0.5, decay_type="constant")
    with of_average.swapped(), pytest.raises(RuntimeError, match="another FastEMA is applied"):
        timm_ema.update(model)


# ---- named tensors ----


def test_a_swap_says_so_where_the_model_has_other_tensors_by_now(
    backend: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = nn.Linear(3, 3)
    ema = FastEMA(model.named_parameters(), decay=0.5, decay_type="constant", backend=backend)
    for _ in range(2):
        shift(model)
        ema.update()
        with ema.swapped():
            pass
    with ema.swapped():
        pass
    assert not recwarn.list
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    shift(model)
    ema.update()
    with pytest.warns(UserWarning, match="none of the named tensors .* Build FastEMA from the model"), ema.swapped():
        pass


# ---- parts of storages ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_of_a_large_storage_costs_a_shadow_of_the_slice(backend: str, dtype: torch.dtype) -> None:
    whole = torch.zeros(1_000_000, dtype=dtype)
    model = nn.Module()
    model.a, model.b = nn.Parameter(whole[1001:1501]), nn.Parameter(whole[1501:2001].view(20, 25).t())
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    storage_bytes = {tensor.untyped_storage().nbytes() for tensor in ema.state_dict()["shadow"].values()}
    assert max(storage_bytes) < 5000
    whole += 1
    whole[2001:] = 5
    ema.update()
    outside = whole.clone()
    with ema.swapped():
        assert torch.equal(model.a, torch.full((500,), 0.5, dtype=dtype))
        assert torch.equal(model.b, torch.full((25, 20), 0.5, dtype=dtype))
        assert torch.equal(whole[:1001], outside[:1001]) and torch.equal(whole[2001:], outside[2001:])
        model.a.data.fill_(3)
    assert torch.equal(whole, outside)
    assert torch.equal(ema.shadow_state_dict()["a"], torch.full((500,), 3.0))


def test_a_slice_whose_storage_was_resized_is_refused(backend: str) -> None:
    whole = torch.zeros(100_000)
    model = nn.Module()
    model.a = nn.Parameter(whole[100:200])
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    whole += 1
    ema.apply_shadow()
    size = whole.untyped_storage().nbytes()
    whole.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="in a storage of 0 bytes now"):
        ema.restore()
    whole.untyped_storage().resize_(size)
    ema.restore()
    assert torch.equal(model.a, torch.ones(100))


# ---- buffers that are assigned anew ----


class Tracker(nn.Module):
    """Replaces a buffer in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean = y.mean(0).detach()
        return y


def test_a_buffer_that_every_forward_replaces_rebuilds_the_shadow_once(backend: str) -> None:
    model, x = Tracker(), torch.randn(3, 2)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    shadows = []
    for _ in range(4):
        model(x)
        ema.update()
        shadows.append(ema.engine.averages)
    assert shadows[1] is shadows[2] is shadows[3]
    assert torch.equal(ema.shadow_state_dict()["mean"], model.mean)
    assert torch.equal(ema.state_dict()["shadow"]["mean"], model.mean)


def test_a_replaced_buffer_is_swapped_and_comes_back(backend: str) -> None:
    model, x = Tracker(), torch.randn(3, 2)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    for _ in range(2):
        shift(model)
        model(x)
        ema.update()
    copied = model.mean.clone()
    shift(model)
    model(x)
    trained, weight = model.mean, model.linear.weight.clone()
    with ema.swapped():
        assert torch.equal(model.mean, copied)
        model(x)
        assert not torch.equal(model.mean, copied)
    assert model.mean is trained and torch.equal(model.linear.weight, weight)


def test_a_replaced_buffer_is_not_copied_in_a_skipped_step(backend: str) -> None:
    model, x = Tracker(), torch.randn(3, 2)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    for _ in range(2):
        model(x)
        ema.update()
    copied = model.mean.clone()
    shift(model)
    model(x)
    ema.update(found_inf=torch.ones(()))
    assert torch.equal(ema.shadow_state_dict()["mean"], copied)

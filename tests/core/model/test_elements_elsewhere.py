"""Tensors whose elements are somewhere else are refused by name, whichever entry they come through."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

from fastema import FastEMA
from fastema.integrations.diffusers import EMAModel
from fastema.integrations.timm import ModelEmaV3
from fastema.swa_utils import AveragedModel, get_ema_multi_avg_fn

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def partitioned(model: nn.Module) -> nn.Module:
    """As DeepSpeed's ZeRO-3 leaves a model outside of a gathering."""
    for number, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape, p.ds_tensor, p.data = number, p.shape, p.data.flatten().clone(), torch.empty(0)
    return model


def offloaded(model: nn.Module) -> nn.Module:
    """As Accelerate's hooks leave the layers that they load for each forward."""
    model[1].to("meta")
    return model


def freed(model: nn.Module) -> nn.Module:
    model[1].weight.untyped_storage().resize_(0)
    return model


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("process") / "store"
    dist.init_process_group("gloo", f"file://{store}", world_size=1, rank=0)
    yield
    dist.destroy_process_group()


def flat(model: nn.Module) -> nn.Module:
    with pytest.warns():
        return FSDP1(model, device_id=torch.device("cpu")).module


def views_of_flat(model: nn.Module) -> nn.Module:
    with pytest.warns():
        return FSDP1(model, device_id=torch.device("cpu"), use_orig_params=True).module


HOLDERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "zero3": (partitioned, r"partitioned by DeepSpeed's ZeRO-3.*FastEMA\(engine\)"),
    "offloaded": (offloaded, "on the meta device: materialise.*without offloading"),
    "freed": (freed, "has no memory: its storage was freed"),
    "fsdp1": (flat, "fully_shard"),
    "fsdp1_original_parameters": (views_of_flat, "fully_shard"),
}
ENTRIES: dict[str, Callable[[nn.Module], Any]] = {
    "module": FastEMA,
    "inner_module": lambda model: FastEMA(nn.Sequential(model)),
    "named_tensors": lambda model: FastEMA(model.named_parameters()),
    "averaged_model": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "averaged_model_own_function": lambda model: AveragedModel(model, avg_fn=lambda a, b, n: a),
    "timm": ModelEmaV3,
    "diffusers": lambda model: EMAModel(model.parameters()),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
@pytest.mark.parametrize(("holder", "message"), HOLDERS.values(), ids=HOLDERS.keys())
def test_every_entry_refuses(
    holder: Callable[[nn.Module], nn.Module], message: str, entry: Callable[[nn.Module], Any]
) -> None:
    model = holder(net())
    with pytest.raises(ValueError, match=message):
        entry(model)


@pytest.mark.parametrize("holder", [partitioned, offloaded, freed])
def test_a_model_whose_elements_go_in_mid_run_is_refused(holder: Callable[[nn.Module], nn.Module]) -> None:
    for entry, update in (
        (FastEMA, lambda ema, model: ema.update()),
        (ModelEmaV3, lambda ema, model: ema.update(model)),
        (AveragedModel, lambda ema, model: ema.update_parameters(model)),
        (AveragedModel, lambda ema, model: ema.swapped(model).__enter__()),
        (lambda model: EMAModel(model.parameters()), lambda ema, model: ema.step(model.parameters())),
        (lambda model: EMAModel(model.parameters()), lambda ema, model: ema.copy_to(model.parameters())),
        (lambda model: EMAModel(model.parameters()), lambda ema, model: ema.store(model.parameters())),
    ):
        model = net()
        ema: Any = entry(model)
        holder(model)
        with pytest.raises((ValueError, RuntimeError), match=r"ZeRO-3|meta device|storage was freed"):
            update(ema, model)


@pytest.mark.parametrize("holder", [partitioned, offloaded, freed])
def test_nothing_is_copied_into_a_model_whose_elements_are_elsewhere(holder: Callable[[nn.Module], nn.Module]) -> None:
    ema = FastEMA(net())
    with pytest.raises(ValueError, match=r"ZeRO-3|meta device|storage was freed|has shape \(0,\)"):
        ema.copy_to(holder(net()))


def test_a_gathered_or_empty_parameter_is_one_like_any_other() -> None:
    model = net()
    for number, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape = number, p.shape
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    before = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    ema.update()
    with ema.swapped():
        torch.testing.assert_close(model[0].weight, before[0].weight + 0.5)

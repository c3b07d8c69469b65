"""States stay right: taken inside a swap, of modules whose hooks make tensors anew, and in checkpoints."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastema import FastEMA
from fastema.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def shift(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def clones(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_equal(got: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


# ---- inside a swap ----


@pytest.mark.parametrize("in_place", [False, True])
def test_a_state_taken_inside_the_block_is_right_after_it(backend: str, in_place: bool) -> None:
    model = nn.Linear(3, 2)
    ema = FastEMA(model, decay=[0.5, 0.9], decay_type="constant", backend=backend)
    shift(model)
    ema.update()
    expected = [clones(ema.shadow_state_dict(which)) for which in (0, 1)]
    with ema.swapped(in_place=in_place):
        states, shadows = ema.state_dict()["shadow"], [ema.shadow_state_dict(which) for which in (0, 1)]
        for which in (0, 1):
            assert_equal(states[which], expected[which])
            assert_equal(shadows[which], expected[which])
    for which in (0, 1):
        assert_equal(states[which], expected[which])
        assert_equal(shadows[which], expected[which])


# ---- modules whose state_dict() makes tensors anew ----


class Packed(nn.Module):
    """Its state has the packed weight in three slices, one clone and one cast."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head, self.norm = nn.Linear(4, 12, bias=False), nn.Linear(4, 2, bias=False), nn.LayerNorm(4)
        self.register_buffer("mask", torch.ones(3))
        self.register_state_dict_post_hook(self.unpack)

    @staticmethod
    def unpack(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        weight = state.pop(f"{prefix}qkv.weight")
        state[f"{prefix}q"], state[f"{prefix}k"], state[f"{prefix}v"] = weight.chunk(3)
        state[f"{prefix}head.weight"] = state[f"{prefix}head.weight"].clone()
        state[f"{prefix}norm.weight"] = state[f"{prefix}norm.weight"].double()


def test_what_a_state_dict_hook_makes_is_averaged(backend: str) -> None:
    model = Packed()
    before = clones(model.state_dict())
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    shift(model)
    ema.update()
    live = clones(model.state_dict())
    state = ema.shadow_state_dict()
    assert list(state) == list(live)
    for name, tensor in state.items():
        assert torch.allclose(tensor, (before[name] + live[name]) / 2), name
    kept = clones(state)
    shift(model)
    with ema.swapped():
        assert_equal(ema.shadow_state_dict(), kept)
    assert_equal(clones(ema.shadow_state_dict()), kept)


def test_what_cannot_be_taken_is_named() -> None:
    model = Packed()
    ema = FastEMA(model, decay=[0.5, 0.9], decay_type="constant")
    with ema.swapped(which=1), pytest.raises(RuntimeError, match=r"makes 'head\.weight', .*'q'.* anew"):
        ema.shadow_state_dict(which=0)


def test_a_skipped_weight_that_a_hook_clones_stays_live(backend: str) -> None:
    model = Packed()
    skip_head = lambda name, tensor, module: "skip" if name.startswith("head") else None  # noqa: E731
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend, policy=skip_head)
    shift(model)
    assert torch.equal(ema.shadow_state_dict()["head.weight"], model.head.weight)


# ---- checkpoints ----


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), Packed], ids=["plain", "hooks"])
def test_a_checkpoint_saved_inside_the_block_has_both_sides(tmp_path: Path, backend: str, make: Any) -> None:
    """A handler of a preemption signal saves whenever it is called."""
    model = make()
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    shift(model)
    ema.update()
    shift(model)
    save_checkpoint(tmp_path / "outside.pth", net=model, ema=ema)
    outside = load_checkpoint(tmp_path / "outside.pth")
    live = clones(model.state_dict())
    with ema.swapped():
        averaged = clones(model.state_dict())
        save_checkpoint(tmp_path / "inside.pth", net=model, ema=ema)
        assert ema.is_applied
        assert_equal(model.state_dict(), averaged)
    assert_equal(model.state_dict(), live)
    inside = load_checkpoint(tmp_path / "inside.pth")
    assert_equal(inside["net"], live)
    assert_equal(inside["net"], outside["net"])
    assert_equal(inside["ema_net"], outside["ema_net"])
    assert_equal(inside["ema"]["shadow"], outside["ema"]["shadow"])


def test_a_checkpoint_saved_inside_the_block_through_a_wrapper(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    wrapped = nn.DataParallel(model)
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    shift(model)
    live = clones(model.state_dict())
    with ema.swapped():
        save_checkpoint(tmp_path / "a.pth", net=wrapped, ema=ema)
    assert_equal(load_checkpoint(tmp_path / "a.pth")["net"], live)


@pytest.mark.parametrize("applied", [False, True])
def test_a_file_holds_each_average_once(tmp_path: Path, applied: bool) -> None:
    model = nn.Linear(300, 300)
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    if applied:
        ema.apply_shadow()
    save_checkpoint(tmp_path / "a.pth", net=model, ema=ema)
    weights = 300 * 301 * 4
    assert 2 * weights < (tmp_path / "a.pth").stat().st_size < 2.1 * weights
    if applied:
        ema.restore()


# ---- modules that hold their own average ----


class SelfAveraging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.ema = FastEMA(self, decay=0.5, decay_type="constant")


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file], ids=["deepcopy", "torch.save"])
def test_a_module_that_holds_its_own_average_can_be_copied(copied: Any) -> None:
    module = SelfAveraging()
    shift(module)
    module.ema.update()
    shift(module)
    twin = copied(module)
    assert twin.ema.num_updates == 1
    assert_equal(twin.ema.shadow_state_dict(), clones(module.ema.shadow_state_dict()))
    for each in (module, twin):
        shift(each)
        each.ema.update()
    assert_equal(twin.ema.shadow_state_dict(), clones(module.ema.shadow_state_dict()))
    with twin.ema.swapped():
        assert not torch.equal(twin.linear.weight, module.linear.weight)
    assert torch.equal(twin.linear.weight, module.linear.weight)


# ---- states that fit in part ----


def state_of(names: dict[str, Tensor]) -> dict[str, Any]:
    return {"step": 9000, "num_updates": 9000, "shadow": names}


@pytest.mark.parametrize("names", ["module.", "ema_model.module.", "none", "counters alone"])
def test_a_state_of_which_nothing_fits_is_refused_without_strict_too(names: str) -> None:
    """A prefix that is left on: nothing would be loaded, but the counters."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    foreign = {f"{names}{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    if names == "none":
        foreign = {}
    elif names == "counters alone":
        foreign = {"1.num_batches_tracked": torch.tensor(3)}
    ema = FastEMA(model, 0.9)
    before = clones(ema.state_dict()["shadow"])
    with pytest.raises(ValueError, match="none of its names is an average's here"):
        ema.load_state_dict(state_of(foreign), strict=False)
    assert ema.num_updates == ema.state_dict()["step"] == 0
    assert_equal(ema.state_dict()["shadow"], before)
    several = FastEMA(model, [0.9, 0.99])
    with pytest.raises(ValueError, match="none of its names is an average's here"):
        several.load_state_dict(state_of([several.state_dict()["shadow"][0], foreign]), strict=False)  # type: ignore


def test_parameters_that_a_state_lacks_are_named(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    ema = FastEMA(model, 0.9)
    parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    assert "1.running_mean" in ema.load_state_dict(state_of(parameters), strict=False).missing_keys
    assert not recwarn.list, "a list of parameters has no buffers, and a tied one once"
    del parameters["0.bias"]
    with pytest.warns(UserWarning, match=r"'0\.bias' not in the state"):
        ema.load_state_dict(state_of(parameters), strict=False)

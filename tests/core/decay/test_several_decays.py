"""Several decays in one read of the weights: each average is what a FastEMA of its own would keep."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from cases.plans import plan_of
from fastema import FastEMA
from fastema.backends import BACKENDS
from fastema.backends.contract import UpdateArgs

DECAYS = [0.5, 0.9, 0.99, 0.0, 1.0, 0.999, 0.7, 0.3, 0.95]  # more than one launch takes


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 4097)).to(dtype)


def train_a_bit(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
            else:
                tensor.add_(1)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_each_average_is_that_of_a_single_one(backend: str, count: int, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    several = FastEMA(model, decay=DECAYS[:count], decay_type="constant", backend=backend)
    singles = [FastEMA(model, decay=decay, decay_type="constant", backend=backend) for decay in DECAYS[:count]]
    for seed in range(5):
        train_a_bit(model, seed)
        for ema in (several, *singles):
            ema.update()
    for which, single in enumerate(singles):
        assert same(several.shadow_state_dict(which=which), single.shadow_state_dict())


def test_swapping_each_one_in(backend: str) -> None:
    model = make_model()
    ema = FastEMA(model, decay=(0.5, 0.9), decay_type="constant", backend=backend)
    train_a_bit(model, 1)
    ema.update()
    live = copy.deepcopy(model.state_dict())
    averages = [copy.deepcopy(ema.shadow_state_dict(which=which)) for which in (0, 1)]
    assert not same(averages[0], averages[1])
    for which in (1, 0, 1):
        for in_place in (False, True):
            with ema.swapped(which=which, in_place=in_place):
                assert same(model.state_dict(), averages[which])
                assert [same(ema.shadow_state_dict(which=each), averages[each]) for each in (0, 1)] == [True, True]
                assert same(ema.state_dict()["shadow"][1 - which], averages[1 - which])
            assert same(model.state_dict(), live)
    ema.copy_to(which=1)
    assert same(model.state_dict(), averages[1])


def test_numbers_come_as_tuples() -> None:
    ema = FastEMA(make_model(), decay=[0.9, 0.99], decay_type="linear", total_steps=10)
    assert ema.decay == (0.9, 0.99)
    assert ema.decay_at(5) == pytest.approx((0.45, 0.495))
    assert ema.window() == pytest.approx((10, 100))
    assert ema.lag(50) == pytest.approx((0.2, 2))
    one = FastEMA(make_model(), decay=[0.9], decay_type="constant")
    assert one.decay == (0.9,) and len(one.state_dict()["shadow"]) == 1


def test_state_resumes_all_of_them_exactly(backend: str) -> None:
    model = make_model()
    ema = FastEMA(model, decay=DECAYS, decay_type="threshold", backend=backend)
    for seed in range(3):
        train_a_bit(model, seed)
        ema.update()
    saved = copy.deepcopy({"net": model.state_dict(), "ema": ema.state_dict()})
    other = make_model()
    other.load_state_dict(saved["net"])
    resumed = FastEMA(other, decay=DECAYS, decay_type="threshold", backend=backend)
    resumed.load_state_dict(saved["ema"])
    for each, which_model in ((ema, model), (resumed, other)):
        train_a_bit(which_model, 9)
        each.update()
    for which in range(len(DECAYS)):
        assert same(ema.shadow_state_dict(which=which), resumed.shadow_state_dict(which=which))
    copied = pickle.loads(pickle.dumps(ema))
    assert same(copied.shadow_state_dict(which=8), ema.shadow_state_dict(which=8))


def test_an_element_is_counted_once_for_all(backend: str) -> None:
    model = nn.Linear(3, 1, bias=False)
    ema = FastEMA(model, decay=DECAYS, decay_type="constant", backend=backend)
    with torch.no_grad():
        model.weight[0, 1] = float("nan")
    ema.update()
    assert ema.nonfinite_count() == 1
    assert all(torch.isfinite(ema.shadow_state_dict(which=which)["weight"]).all() for which in range(9))


@pytest.mark.parametrize("which", [2, -1, True, "0"])
def test_which_must_exist(which: object) -> None:
    ema = FastEMA(make_model(), decay=[0.9, 0.99], decay_type="constant")
    for call in (ema.apply_shadow, ema.shadow_state_dict, ema.copy_to):
        with pytest.raises(ValueError, match="which must be"):
            call(which=which)  # type: ignore[arg-type]
    assert not ema.is_applied


def test_a_state_with_another_number_of_averages_is_refused() -> None:
    model = make_model()
    state = FastEMA(model, decay=[0.9, 0.99], decay_type="constant").state_dict()
    with pytest.raises(ValueError, match="the state has 2 averages, this FastEMA has 1"):
        FastEMA(model, decay=0.9, decay_type="constant").load_state_dict(state)


@pytest.mark.parametrize("decay", [[], [0.9, 1.5], [0.9, float("nan")], "0.9", [0.9, "x"]])
def test_bad_sequences_are_refused(decay: object) -> None:
    with pytest.raises(ValueError, match="decay must be"):
        FastEMA(make_model(), decay=decay, decay_type="constant")  # type: ignore[arg-type]


def test_a_plan_wants_one_dtype_and_as_many_weights_as_shadows(backend: str) -> None:
    live = torch.zeros(4)
    plan = plan_of(BACKENDS[backend], [[torch.zeros(4)], [torch.zeros(4)]], [live])
    with pytest.raises(ValueError):
        plan.update(UpdateArgs([0.5], True))

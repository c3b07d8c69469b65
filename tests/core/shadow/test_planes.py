"""bfloat16 models: the average is a float32 in two planes, of which the high one changes places with the weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import WEIGHTS, as_applied, bits, move, raw, small_model, train, values
from cases.plans import plan_of
from fastema import FastEMA, backends
from fastema.backends.contract import UpdateArgs
from fastema.core.engine import Engine
from fastema.memory import planes
from fastema.memory.atomic_steps import run_atomically

SIZES = (0, 1, 7, 255, 257, 4097, 40_000)


def average_of(model: nn.Module, backend: str, **arguments: Any) -> FastEMA:
    """An EMA whose average differs from the model."""
    ema = FastEMA(model, decay=0.9, decay_type="constant", backend=backend, **arguments)
    train(model, seed=1)
    ema.update()
    return ema


def plain(model: nn.Module, backend: str) -> FastEMA:
    """The same average as an ordinary float32."""
    ema = FastEMA(model, decay=0.9, decay_type="constant", backend=backend)
    ema.engine = Engine(model, backend=backend, may_split=False)
    return ema


def saved(ema: FastEMA) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in ema.state_dict()["shadow"].items()}


def same_but_nan(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for what a NaN holds beside being one."""
    nan = expected.isnan()
    return torch.equal(got.isnan(), nan) and raw(got[~nan]) == raw(expected[~nan])


@pytest.mark.parametrize("skip_nonfinite", [False, True], ids=["plain", "skipping"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_plan_over_planes_has_the_bits_of_a_plan_over_float32(
    backend: str, weight: float, skip_nonfinite: bool
) -> None:
    lives = [values(size, dtype=torch.bfloat16, seed=size) for size in SIZES]
    for live in lives[2:]:
        live[3], live[5] = float("nan"), float("-inf")
    expected = [[values(size, seed=k) for size in SIZES] for k in range(3)]
    for shadows in expected:
        for shadow in shadows[2:]:
            shadow[2], shadow[3], shadow[4] = float("inf"), float("-inf"), float("nan")
    pairs = [[planes.split(shadow) for shadow in shadows] for shadows in expected]
    highs, lows = ([[pair[i].clone() for pair in shadow] for shadow in pairs] for i in (0, 1))
    copies = [False] * (len(SIZES) - 1) + [True]
    plan = plan_of(backends.BACKENDS[backend], highs, lives, copies, (), lows)
    oracle = plan_of(backends.BACKENDS[backend], expected, lives, copies)
    for each in (plan, oracle):
        each.update(UpdateArgs([weight, weight / 2, weight / 3], skip_nonfinite))
    for high, low, shadow in zip(highs, lows, expected, strict=True):
        assert all(map(same_but_nan, map(planes.join, high, low), shadow))
    assert plan.nonfinite_count() == oracle.nonfinite_count() == ((2 + 3 * 2) * 4 if skip_nonfinite else 0)


@pytest.mark.parametrize("weight", [0.1, 0.9])
def test_every_high_plane_over_a_stale_low_one_is_the_number_that_was_written(backend: str, weight: float) -> None:
    """NaN comes from NaN alone, stays one, and never turns into a number: 65,536 patterns, as average and as weight."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    ones = torch.ones_like(every)
    for low in (-(2**15), -1, 0, 1, 2**15 - 1):
        high, live = torch.cat([every, ones]), torch.cat([ones, every])
        lows = torch.full((high.numel(),), low, dtype=torch.int16)
        expected = planes.join(high, lows)
        assert torch.equal(expected.isnan(), high.isnan())
        plan = plan_of(backends.BACKENDS[backend], [[high]], [live], lows=[[lows]])
        oracle = plan_of(backends.BACKENDS[backend], [[expected]], [live])
        for _ in range(3):
            plan.update(UpdateArgs([weight], False))
            oracle.update(UpdateArgs([weight], False))
            assert same_but_nan(planes.join(high, lows), expected)
            assert torch.equal(high.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_filled_planes_are_those_of_a_split(dtype: torch.dtype) -> None:
    whole = torch.cat(
        [values(997), torch.tensor([0.0, -0.0, float("inf"), -3.4e38, 3.4e38, float("nan"), -float("nan")])]
    )
    for given in (whole, whole[:12].view(3, 4).t(), whole[3], whole[:0], whole[:1].expand(5), whole[::3]):
        given = given.to(dtype)
        high, low = torch.empty(given.shape, dtype=torch.bfloat16), torch.empty(given.shape, dtype=torch.int16)
        run_atomically(planes.fill_steps(high, low, given))
        expected = planes.split(given.float())
        assert raw(high) == raw(expected[0]) and raw(low) == raw(expected[1])


def test_every_instruction_set_gives_the_same_planes() -> None:
    native = backends.native
    if native.why_unusable("cpu") is not None:
        pytest.skip("no extension")
    live, results = values(5000, dtype=torch.bfloat16, seed=1), set()
    for isa in (native._C.Isa.baseline, native._C.Isa.avx2, native._C.Isa.avx512):
        high, low = map(torch.clone, planes.split(values(5000)))
        plan = plan_of(native, [[high]], [live], lows=[[low]])
        plan.set_isa(isa)
        plan.update(UpdateArgs([0.1], True))
        results.add(raw(high) + raw(low))
    assert len(results) == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_a_swap_needs_no_memory_and_shows_the_nearest_bfloat16(backend: str, in_place: bool) -> None:
    model = small_model(torch.bfloat16)
    ema = average_of(model, backend)
    live, average = bits(model), ema.state_dict()["shadow"]
    for _ in range(2):
        with ema.swapped(in_place=in_place):
            for name, parameter in model.named_parameters():
                assert raw(parameter.detach()) == raw(as_applied(average[name], torch.bfloat16))
            assert saved(ema) == {name: raw(tensor) for name, tensor in average.items()}
        assert bits(model) == live
    assert all(not storage.swap_buffer(0).casts for storage in ema.engine.averages._storages)


def test_many_steps_have_the_bits_of_a_plain_float32_average(backend: str) -> None:
    model = small_model(torch.bfloat16)
    ema, other = average_of(model, backend), plain(model, backend)
    other.load_state_dict(ema.state_dict())
    for seed in range(20):
        train(model, seed)
        ema.update()
        other.update()
        with ema.swapped():
            pass
    assert saved(ema) == saved(other)
    assert [storage.lows for storage in other.engine.averages._storages] == [[]] * len(other.engine.averages._storages)


def test_states_copies_and_pickles_hold_every_bit(backend: str) -> None:
    model = small_model(torch.bfloat16)
    ema = average_of(model, backend)
    fresh = FastEMA(small_model(torch.bfloat16), decay=0.9, decay_type="constant", backend=backend)
    fresh.load_state_dict(ema.state_dict())
    for twin in (fresh, copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert saved(twin) == saved(ema)
    rounded = {
        name: as_applied(t, torch.bfloat16) for name, t in ema.state_dict()["shadow"].items() if t.is_floating_point()
    }
    fresh.load_state_dict({**ema.state_dict(), "shadow": {**ema.state_dict()["shadow"], **rounded}}, strict=False)
    for name, tensor in rounded.items():
        assert raw(fresh.state_dict()["shadow"][name]) == raw(tensor.float()), "a bfloat16 state leaves no low plane"


def test_a_rebuilt_shadow_goes_on_with_the_same_bits(backend: str) -> None:
    model = small_model(torch.bfloat16)
    ema = average_of(model, backend)
    before = saved(ema)
    model[0].weight.data = model[0].weight.data.clone()
    ema.copy_to(copy.deepcopy(model))
    assert saved(ema) == before


def test_a_copy_into_bfloat16_is_what_was_validated_and_into_float32_the_average(backend: str) -> None:
    model = small_model(torch.bfloat16)
    ema = average_of(model, backend)
    average, wide = ema.state_dict()["shadow"], copy.deepcopy(model).float()
    with ema.swapped():
        validated = bits(model)
    ema.copy_to(wide)
    ema.copy_to()
    assert bits(model) == validated
    assert all(raw(parameter.detach()) == raw(average[name]) for name, parameter in wide.named_parameters())


def test_what_is_written_in_the_block_is_written_to_the_average(backend: str) -> None:
    weight = nn.Parameter(values(9, dtype=torch.bfloat16))
    ema = FastEMA([("w", weight)], decay=0.9, decay_type="constant", backend=backend)
    move([weight], seed=1)
    ema.update()
    with ema.swapped(), torch.no_grad():
        weight[:4] = torch.tensor([0.0, -0.0, float("inf"), 3.0])
    average = ema.state_dict()["shadow"]["w"]
    assert torch.equal(average[:2].abs() < 1e-38, torch.tensor([True, True]))
    assert not average.isnan().any() and abs(average[3] - 3.0) <= 2**-7  # half a bfloat16's unit in the last place


@pytest.mark.parametrize("in_place", [False, True])
def test_statistics_that_a_forward_writes_in_the_block_stay_in_the_average(backend: str, in_place: bool) -> None:
    """BatchNorm raises no version counter, so that only the high plane knows of it."""
    model = small_model(torch.bfloat16)
    ema = average_of(model, backend)
    live, norm = bits(model), model[1]
    with ema.swapped(in_place=in_place):
        model.train()(values(64, 3, dtype=torch.bfloat16) * 5 + 7)
        written = bits(norm)
        means = norm.running_mean.float(), norm.running_var.float()  # type: ignore[operator,union-attr]
    assert bits(model) == live
    average = ema.state_dict()["shadow"]
    for name, expected in zip(("1.running_mean", "1.running_var"), means, strict=True):
        torch.testing.assert_close(average[name], expected, rtol=2**-8, atol=0)  # half a unit in the last place
    with ema.swapped():
        assert bits(norm) == written
    ema.set_decay(1.0)
    ema.update()
    with ema.swapped():
        assert bits(norm)["running_mean"] == written["running_mean"], "an update goes on from what was written"


def test_only_float32_averages_of_bfloat16_are_split(backend: str) -> None:
    def has_planes(live: torch.dtype, **arguments: Any) -> bool:
        ema = FastEMA([("w", values(9, dtype=live))], decay=0.5, backend=backend, **arguments)
        return bool(ema.engine.averages._storages[0].lows)

    assert has_planes(torch.bfloat16) and has_planes(torch.bfloat16, dtype=torch.float32)
    assert not has_planes(torch.float32) and not has_planes(torch.float16)
    assert not has_planes(torch.bfloat16, dtype=torch.float64) and not has_planes(torch.bfloat16, dtype=torch.bfloat16)

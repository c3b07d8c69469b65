"""AveragedModel.swapped puts the average into the live model, and both come back bit for bit."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn

from cases import Recorder, bits, small_model, tensors_of, train, values
from fastema import FastEMA
from fastema.swa_utils import AveragedModel, get_ema_multi_avg_fn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def chosen_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEMA_BACKEND", backend)


def averaged_of(model: nn.Module, **arguments: Any) -> AveragedModel:
    """Return an average that differs from the model."""
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), **arguments)
    for seed in (1, 2):
        averaged.update_parameters(model)
        train(model, seed)
    return averaged


@pytest.mark.parametrize("use_buffers", [False, True])
def test_average_and_weights_change_places_and_come_back(use_buffers: bool) -> None:
    model = small_model()
    averaged = averaged_of(model, use_buffers=use_buffers)
    live, average = bits(model), bits(averaged.module)
    assert not set(live.values()) & set(average.values())
    for _ in range(3):
        with averaged.swapped(model) as given:
            assert given is model
            assert bits(model) == average
            assert bits(averaged.module) == live
        assert bits(model) == live
        assert bits(averaged.module) == average


@pytest.mark.pointers
def test_pointers_move_and_no_byte_does() -> None:
    model = small_model()
    averaged = averaged_of(model)
    with averaged.swapped(model):
        pass
    lives, averages = ([tensor.data_ptr() for tensor in tensors_of(each)] for each in (model, averaged.module))
    with Recorder() as recorder, averaged.swapped(model):
        assert [tensor.data_ptr() for tensor in tensors_of(model)] == averages
        assert [tensor.data_ptr() for tensor in tensors_of(averaged.module)] == lives
    assert [tensor.data_ptr() for tensor in tensors_of(model)] == lives
    assert recorder.seen == []


def test_aliases_follow() -> None:
    model = small_model()
    averaged = averaged_of(model)
    views = [model[0].weight.detach(), model.state_dict()["0.weight"], model[0].weight.data.view(-1)]
    average = averaged.module[0].weight.detach().clone()
    with averaged.swapped(model):
        for view in views:
            assert torch.equal(view.reshape(5, 3), average)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_restored_after_an_exception(error: type[BaseException]) -> None:
    model = small_model()
    averaged = averaged_of(model)
    live, average = bits(model), bits(averaged.module)
    with pytest.raises(error), averaged.swapped(model):
        assert bits(model) == average
        raise error
    assert bits(model) == live
    assert bits(averaged.module) == average
    averaged.update_parameters(model)


def test_restored_when_a_generator_is_abandoned_in_the_block() -> None:
    model = small_model()
    averaged = averaged_of(model)
    live = bits(model)

    def validation() -> Iterator[int]:
        with averaged.swapped(model):
            yield 1
            yield 2

    steps = validation()
    next(steps)
    assert bits(model) != live
    del steps
    gc.collect()
    assert bits(model) == live


def test_what_would_take_one_for_the_other_is_refused() -> None:
    model, other = small_model(), nn.ModuleDict()
    averaged = averaged_of(model)
    other["averaged"] = averaged
    state = averaged.state_dict()
    live, average = bits(model), bits(averaged.module)
    refused = {
        "update_parameters": lambda: averaged.update_parameters(model),
        "swapped": lambda: averaged.swapped(model).__enter__(),
        "state_dict": averaged.state_dict,
        "state_dict()": other.state_dict,
        "load_state_dict": lambda: averaged.load_state_dict(state),
        "load_state_dict()": lambda: other.load_state_dict({f"averaged.{key}": state[key] for key in state}),
        "pickling": lambda: pickle.dumps(averaged),
        "copying": lambda: copy.deepcopy(averaged),
    }
    with averaged.swapped(model):
        for what, call in refused.items():
            with pytest.raises(RuntimeError, match=what.strip("()") + ".*leave the block first"):
                call()
        assert bits(model) == average
    assert (bits(model), bits(averaged.module)) == (live, average)
    averaged.load_state_dict(state)


def test_a_second_average_of_the_model_is_refused_meanwhile() -> None:
    model = small_model()
    first, second = averaged_of(model), averaged_of(model)
    live, kept = bits(model), bits(second)
    with first.swapped(model):
        with pytest.raises(RuntimeError, match="another AveragedModel is swapped into the same model"):
            second.update_parameters(model)
        with pytest.raises(RuntimeError, match="another AveragedModel"), second.swapped(model):
            pass
    assert bits(model) == live
    assert bits(second) == kept
    with second.swapped(model):
        assert bits(model) == bits_without_prefix(kept)


def bits_without_prefix(state: dict[str, bytes]) -> dict[str, bytes]:
    return {key.removeprefix("module."): value for key, value in state.items() if key != "n_averaged"}


def test_a_backward_across_the_swap_raises_inside_and_works_after() -> None:
    model = nn.Linear(3, 2)
    averaged = averaged_of(model)
    x = values(4, 3).requires_grad_()
    loss = model(x).square().sum()
    expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
    with averaged.swapped(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_training_goes_on_exactly_after_a_block() -> None:
    results = []
    for validate in (False, True):
        model = small_model()
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(5):
            optimizer.zero_grad()
            model(values(8, 3, seed=step)).square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
            if validate:
                with averaged.swapped(model), torch.no_grad():
                    model.eval()(values(8, 3, seed=step))
                model.train()
        results.append((bits(model), bits(averaged)))
    assert results[0] == results[1]


def test_the_plan_outlives_a_swap() -> None:
    model = small_model()
    averaged = averaged_of(model)
    pairs = averaged._pairs
    with averaged.swapped(model):
        pass
    averaged.update_parameters(model)
    assert averaged._pairs is pairs


@pytest.mark.parametrize("live", [torch.bfloat16, torch.float64])
def test_another_dtype_is_cast_into_scratch_memory(live: torch.dtype) -> None:
    model = small_model().to(live)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.module.float()
    for seed in (1, 2):
        averaged.update_parameters(model)
        train(model, seed)
    before, average = bits(model), bits(averaged.module)
    expected = bits(copy.deepcopy(averaged.module).to(live))
    for _ in range(2):
        with averaged.swapped(model):
            assert bits(model) == expected
            assert bits(averaged.module)["0.weight"] == average["0.weight"]
        assert bits(model) == before
        assert bits(averaged.module) == average


def test_slices_of_one_buffer_leave_the_rest_of_it_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    buffer = values(100)
    for begin, parameter in zip((5, 20, 30, 40), model.parameters(), strict=True):
        piece = buffer[begin : begin + parameter.numel()].view(parameter.shape)
        parameter.data = piece.copy_(parameter.detach())
    averaged = averaged_of(model)
    before, live, average = buffer.clone(), bits(model), bits(averaged.module)
    with averaged.swapped(model):
        assert bits(model) == average
        assert buffer[0] == before[0]  # unmanaged bytes are there
        assert torch.equal(buffer[5:11], averaged.module[0].weight.detach().flatten())
        buffer[0] = 7.0
    assert bits(model) == live
    before[0] = 7.0  # what is not the average's was written for good
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("begin", [0, 5])
@pytest.mark.parametrize("both", [False, True])
def test_an_average_in_a_larger_buffer_leaves_the_rest_of_it_alone(begin: int, both: bool) -> None:
    model = nn.Linear(3, 2)
    averaged = averaged_of(model)
    buffers = []
    for module in (averaged.module, model)[: 1 + both]:
        buffer = values(20)
        module.weight.data = buffer[begin : begin + 6].view(2, 3).copy_(module.weight.detach())
        buffers.append((buffer, buffer[-1].item(), buffer.data_ptr()))
    live, average = bits(model), bits(averaged.module)
    with averaged.swapped(model):
        assert bits(model) == average
        for buffer, last, _ in buffers:
            assert buffer[-1] == last
        assert buffers[0][0].data_ptr() == buffers[0][2]  # what is not the model's does not move
    assert (bits(model), bits(averaged.module)) == (live, average)


def test_averages_that_share_memory() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    averaged = averaged_of(model)
    averaged.module[1].weight.data = averaged.module[0].weight.data
    live, average = bits(model), bits(averaged.module)
    with averaged.swapped(model):
        assert bits(model) == average
    assert (bits(model), bits(averaged.module)) == (live, average)


@pytest.mark.pointers
def test_channels_last_weights_are_exchanged_in_their_layout() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    averaged = averaged_of(model)
    average, live = bits(averaged.module), bits(model)
    address = averaged.module.weight.data_ptr()
    with averaged.swapped(model):
        assert model.weight.data_ptr() == address
        assert bits(model) == average
    model.to(memory_format=torch.contiguous_format)  # now they differ, and scratch memory is needed
    with averaged.swapped(model):
        assert model.weight.data_ptr() != address
        assert bits(model) == average
    assert bits(model) == live


def test_tied_recurrent_and_empty_tensors() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "in": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    model.register_buffer("nothing", torch.empty(0, 3))
    model["out"].weight = model["in"].weight
    averaged = averaged_of(model)
    live, average = bits(model), bits(averaged.module)
    x = values(5, 2, 4)
    expected = averaged.module["rnn"](x)[0]
    with averaged.swapped(model):
        assert model["out"].weight is model["in"].weight
        assert bits(model) == average
        assert torch.equal(model["rnn"](x)[0], expected)
    assert bits(model) == live


def test_statistics_written_in_the_block_are_the_averages() -> None:
    model = small_model()
    averaged = averaged_of(model)
    live = bits(model)
    before = averaged.module[1].running_mean.clone()
    with averaged.swapped(model):
        model.train()(values(8, 3))
    assert bits(model) == live
    assert not torch.equal(averaged.module[1].running_mean, before)


def test_a_users_function_swaps_too() -> None:
    model = small_model()
    averaged = AveragedModel(model, avg_fn=lambda one, other, count: one + count * 0)
    averaged.update_parameters(model)
    train(model, 1)
    average = bits(averaged.module)
    with averaged.swapped(model):
        assert bits(model) == average


def test_a_model_that_does_not_fit_is_refused_and_unchanged() -> None:
    model = small_model()
    averaged = averaged_of(model)
    for other, message in (
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "shapes"),
        (nn.Linear(3, 5), "other buffers"),
        (nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), "it has 7 tensors, the average has 9"),
    ):
        before, average = bits(other), bits(averaged)
        with pytest.raises(ValueError, match=message), averaged.swapped(other):
            pass
        assert (bits(other), bits(averaged)) == (before, average)
    with pytest.raises(ValueError, match="no memory"), averaged.swapped(small_model().to("meta")):
        pass
    averaged.update_parameters(model)  # nothing is left behind


def test_under_inference_mode() -> None:
    model = small_model()
    averaged = averaged_of(model)
    live, average = bits(model), bits(averaged.module)
    with torch.inference_mode(), averaged.swapped(model):
        assert bits(model) == average
    assert bits(model) == live
    averaged.update_parameters(model)


def test_an_averaged_model_and_a_fastema_of_one_model_do_not_mix(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is in the model, the other neither averages nor exchanges those weights."""
    monkeypatch.setenv("FASTEMA_BACKEND", backend)
    model = torch.nn.Linear(3, 2)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    with torch.no_grad():
        model.weight.add_(1.0)
    live = model.weight.detach().clone()
    with ema.swapped():
        with pytest.raises(RuntimeError, match="another FastEMA is applied to the same model"):
            averaged.update_parameters(model)
        with pytest.raises(RuntimeError, match="another FastEMA is applied"), averaged.swapped(model):
            pass
    with averaged.swapped(model):
        for call in (ema.update, ema.apply_shadow):
            with pytest.raises(RuntimeError, match="another AveragedModel is swapped into the same model"):
                call()
    assert torch.equal(model.weight, live)
    averaged.update_parameters(model)
    ema.update()


def test_frozen_weights_are_refused() -> None:
    """Inductor's freezing makes constants of the weights: the exchange would not reach them."""
    model = torch.nn.Linear(3, 2)
    averaged = AveragedModel(model)
    compiled = torch.compile(model)
    with (
        inductor_config.patch(freezing=True),
        pytest.raises(RuntimeError, match="freezing"),
        averaged.swapped(compiled),
    ):
        pass
    assert averaged._swap is None

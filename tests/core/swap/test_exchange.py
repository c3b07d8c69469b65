"""The exchange: pointers change places and come back, everything that refers to a weight follows, nothing is mixed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Recorder, as_applied, bits, raw, small_model, tensors_of, train, values
from fastema import FastEMA

pytestmark = pytest.mark.usefixtures("one_thread")
NONFINITE_COUNT = torch.ops.aten._local_scalar_dense.default  # the torch backend reads its nonfinite_count()


def averaged(model: nn.Module, backend: str, **arguments: Any) -> FastEMA:
    """An EMA whose average differs from the model."""
    ema = FastEMA(model, decay=0.5, backend=backend, **arguments)
    train(model, seed=1)
    ema.update()
    train(model, seed=2)
    return ema


def pointers(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@pytest.fixture(params=[False, True], ids=["pointers", "in_place"])
def in_place(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def model() -> nn.Sequential:
    return small_model()


@pytest.fixture
def ema(model: nn.Sequential, backend: str) -> FastEMA:
    return averaged(model, backend)


# ---- pointers ----


@pytest.mark.pointers
def test_pointers_change_places(model: nn.Sequential, ema: FastEMA) -> None:
    shadow = ema.state_dict()["shadow"]
    names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    tensors, shadows = tensors_of(model), [shadow[name] for name in names]
    live_before, shadow_before = pointers(tensors), pointers(shadows)
    assert not set(live_before) & set(shadow_before)
    ema.apply_shadow()
    assert pointers(tensors) == shadow_before
    assert pointers(shadows) == live_before
    ema.restore()
    assert pointers(tensors) == live_before
    assert pointers(shadows) == shadow_before


def test_in_place_leaves_every_address(model: nn.Sequential, ema: FastEMA) -> None:
    tensors = tensors_of(model) + list(ema.state_dict()["shadow"].values())
    expected, before = bits_of_average(ema), pointers(tensors)
    with ema.swapped(in_place=True):
        assert pointers(tensors) == before
        assert bits(model) == expected
    assert pointers(tensors) == before


@pytest.mark.pointers
def test_an_exchange_copies_nothing_and_allocates_nothing(model: nn.Sequential, ema: FastEMA) -> None:
    with Recorder(NONFINITE_COUNT) as first:
        ema.apply_shadow()
        ema.restore()
    assert not [name for name in first.seen if "empty" not in name and "set_" not in name and "detach" not in name]
    with Recorder(NONFINITE_COUNT) as second:
        ema.apply_shadow()
        ema.restore()
    assert second.seen == []


@pytest.mark.pointers
def test_the_allocator_sees_nothing_of_an_exchange(ema: FastEMA) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ema.apply_shadow()
        ema.restore()
    assert sum(abs(event.self_cpu_memory_usage) for event in profile.events() or []) == 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as witness:
        torch.ones(1000).clone()
    assert sum(abs(event.self_cpu_memory_usage) for event in witness.events() or []) > 0  # it would have seen it


def test_in_place_allocates_nothing_natively(model: nn.Sequential) -> None:
    pytest.importorskip("fastema._C")
    ema = averaged(model, "native")
    ema.apply_shadow(in_place=True)
    ema.restore()
    with Recorder(NONFINITE_COUNT) as recorder:
        ema.apply_shadow(in_place=True)
        ema.restore()
    assert recorder.seen == []


# ---- what comes in, and what comes back ----


def bits_of_average(ema: FastEMA) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in ema.state_dict()["shadow"].items()}


def test_the_average_is_in_and_the_live_weights_come_back_bit_for_bit(
    model: nn.Sequential, ema: FastEMA, in_place: bool
) -> None:
    with torch.no_grad():
        model[0].weight[0, 0], model[0].weight[0, 1] = float("nan"), -0.0
    live, average = bits(model), bits_of_average(ema)
    assert live != average
    for _ in range(3):
        ema.apply_shadow(in_place)
        assert ema.is_applied
        assert bits(model) == average
        ema.restore()
        assert not ema.is_applied
        assert bits(model) == live
        assert bits_of_average(ema) == average


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_restored_after_an_exception(
    model: nn.Sequential, ema: FastEMA, in_place: bool, error: type[BaseException]
) -> None:
    live, average = bits(model), bits_of_average(ema)
    with pytest.raises(error), ema.swapped(in_place):
        assert bits(model) == average
        raise error
    assert bits(model) == live
    assert bits_of_average(ema) == average
    assert not ema.is_applied


def test_restored_when_a_generator_is_abandoned_in_the_block(model: nn.Sequential, ema: FastEMA) -> None:
    live = bits(model)

    def validation() -> Iterator[int]:
        with ema.swapped():
            yield 1
            yield 2

    steps = validation()
    next(steps)
    assert bits(model) != live
    del steps
    gc.collect()
    assert bits(model) == live


def test_restore_inside_the_block_is_fine(model: nn.Sequential, ema: FastEMA) -> None:
    live = bits(model)
    with ema.swapped() as given:
        assert given is ema
        ema.restore()
        assert bits(model) == live
    assert bits(model) == live


def test_training_goes_on_exactly_after_a_block(backend: str, in_place: bool) -> None:
    """A run with validations between the steps is the run without, bit for bit."""
    results = []
    for validate in (False, True):
        model = small_model()
        ema = FastEMA(model, decay=0.9, decay_type="constant", backend=backend)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(5):
            optimizer.zero_grad()
            model(values(8, 3, seed=step)).square().mean().backward()
            optimizer.step()
            ema.update()
            if validate:
                with ema.swapped(in_place), torch.no_grad():
                    model.eval()(values(8, 3, seed=step))
                model.train()
        results.append((bits(model), bits_of_average(ema)))
    assert results[0] == results[1]


# ---- who follows ----


def test_aliases_and_views_follow(model: nn.Sequential, ema: FastEMA, in_place: bool) -> None:
    weight = model[0].weight
    aliases: list[Tensor] = [weight.detach(), weight.data, weight.view(-1), weight[1:3, ::2], weight.t()]
    slices: list[Any] = [weight, weight, weight.detach().view(-1), None, None]
    reference = model.state_dict()["0.weight"]
    average = ema.state_dict()["shadow"]["0.weight"].clone()
    with ema.swapped(in_place):
        assert torch.equal(reference, average)
        for alias, whole in zip(aliases[:3], slices[:3], strict=True):
            assert torch.equal(alias, whole.detach())
            assert raw(alias) == raw(average)
        assert torch.equal(aliases[3], average[1:3, ::2])
        assert torch.equal(aliases[4], average.t())


def test_identity_and_everything_attached_is_untouched(model: nn.Sequential, ema: FastEMA, in_place: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    calls: list[str] = []
    model[0].weight.register_hook(lambda grad: calls.append("tensor hook"))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulate hook"))
    model.register_forward_hook(lambda *_: calls.append("forward hook"))
    model[0].bias.requires_grad_(False)
    model[3].weight.marker = "mine"  # type: ignore[union-attr]
    model(values(8, 3)).sum().backward()
    optimizer.step()
    calls.clear()

    identities = [id(tensor) for tensor in tensors_of(model)]
    gradients = [parameter.grad for parameter in model.parameters()]
    gradient_bits = [None if grad is None else raw(grad) for grad in gradients]
    state = copy.deepcopy(optimizer.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]

    def check() -> None:
        assert [id(tensor) for tensor in tensors_of(model)] == identities
        assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), gradients, strict=True))
        assert [None if grad is None else raw(grad) for grad in gradients] == gradient_bits
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.is_leaf for parameter in model.parameters())
        assert model[3].weight.marker == "mine"  # type: ignore[union-attr]
        now = optimizer.state_dict()
        assert now["param_groups"] == state["param_groups"]
        for index, entry in state["state"].items():
            assert all(torch.equal(now["state"][index][key], value) for key, value in entry.items())

    with ema.swapped(in_place):
        check()
    check()
    model(values(8, 3)).sum().backward()
    assert calls == ["forward hook", "tensor hook", "accumulate hook"]


def test_bytes_that_nothing_manages_are_carried_along(backend: str) -> None:
    """The rest of a storage is the live one's throughout, also when it is written during the swap."""
    room = torch.arange(10.0)
    weight = nn.Parameter(room[3:7])
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", backend=backend)
    with torch.no_grad():
        weight.add_(10)
    ema.update()
    for round_ in range(2):
        rest = room[:3].tolist() + room[7:].tolist()
        with ema.swapped():
            assert weight.tolist() == [8.0, 9.0, 10.0, 11.0]
            assert room[3:7].tolist() == weight.tolist(), "an alias did not follow"
            assert room[:3].tolist() + room[7:].tolist() == rest
            room[0], room[9] = 100.0 + round_, 200.0 + round_
        assert weight.tolist() == [13.0, 14.0, 15.0, 16.0]
        assert room[0] == 100.0 + round_
        assert room[9] == 200.0 + round_
    room[1] = -5.0  # written outside too
    with ema.swapped():
        assert room[1] == -5.0
    with ema.swapped(in_place=True):
        assert room.tolist() == [101.0, -5.0, 2.0, 8.0, 9.0, 10.0, 11.0, 7.0, 8.0, 201.0]
    assert room.tolist() == [101.0, -5.0, 2.0, 13.0, 14.0, 15.0, 16.0, 7.0, 8.0, 201.0]


# ---- autograd ----


def small_loss(model: nn.Module) -> Tensor:
    return model(values(8, 3, seed=5)).square().sum()


def test_backward_inside_through_a_graph_from_before_raises(model: nn.Sequential, ema: FastEMA, in_place: bool) -> None:
    loss = small_loss(model)
    with ema.swapped(in_place), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_from_before_works_after_the_block(backend: str, in_place: bool) -> None:
    gradients = []
    for swap in (False, True):
        model = small_model()
        ema = averaged(model, backend)
        loss = small_loss(model)
        if swap:
            for _ in range(2):
                with ema.swapped(in_place), torch.no_grad():
                    model.eval()(values(8, 3))
            model.train()
        loss.backward()
        gradients.append([raw(parameter.grad) for parameter in model.parameters()])
    assert gradients[0] == gradients[1]


def test_a_graph_from_before_works_after_the_block_for_slices_of_one_buffer(backend: str, in_place: bool) -> None:
    """Slices of one buffer share one version counter: it must come back as it was, however many share it."""
    buffer = values(30)
    weights = [nn.Parameter(buffer[begin : begin + 5]) for begin in range(0, 30, 5)]
    ema = FastEMA(
        [(str(index), weight) for index, weight in enumerate(weights)],
        decay=0.5,
        decay_type="constant",
        backend=backend,
    )
    loss = sum((weight.square().sum() for weight in weights), torch.zeros(()))
    versions = [weight._version for weight in weights]
    for _ in range(3):
        with ema.swapped(in_place):
            assert all(weight._version != version for weight, version in zip(weights, versions, strict=True))
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward(retain_graph=True)
        assert [weight._version for weight in weights] == versions
    loss.backward()
    assert all(torch.equal(weight.grad, 2 * weight.detach()) for weight in weights)  # type: ignore[arg-type]


def test_a_graph_from_inside_raises_outside(model: nn.Sequential, ema: FastEMA, in_place: bool) -> None:
    with ema.swapped(in_place):
        loss = small_loss(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_from_inside_raises_after_any_number_of_steps(backend: str, in_place: bool) -> None:
    """A version counter that came back and then counted on must not arrive at the number seen inside."""
    weight = nn.Parameter(values(5))  # nothing else is in the graph whose version could tell
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", backend=backend)
    for _ in range(3):
        with ema.swapped(in_place):
            losses = [weight.square().sum() for _ in range(50)]
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            with torch.no_grad():
                weight.add_(0.0)


def test_a_graph_from_one_block_raises_in_the_next(backend: str, in_place: bool) -> None:
    """Between the two the average moved on, and the live weight, whose counter is all autograd sees, did not."""
    weight = nn.Parameter(values(5))
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", backend=backend)
    with torch.no_grad():
        weight.add_(1.0)
    with ema.swapped(in_place):
        loss = weight.square().sum()
    ema.update()
    with ema.swapped(in_place), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_forward_and_backward_inside_one_block_use_the_average(
    model: nn.Sequential, ema: FastEMA, in_place: bool
) -> None:
    twin = small_model()
    twin.load_state_dict(ema.shadow_state_dict())
    small_loss(twin).backward()
    with ema.swapped(in_place):
        small_loss(model).backward()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)  # type: ignore[arg-type]


def test_a_graph_through_the_average_raises_after_an_update(backend: str) -> None:
    """A student that learns from the average as a teacher, and updates it before the backward."""
    model = nn.Linear(3, 2)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    features = values(4, 3).requires_grad_()
    out = torch.func.functional_call(model, ema.shadow_state_dict(), (features,))
    train(model)
    ema.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- states while applied ----


def test_states_are_right_while_applied(model: nn.Sequential, ema: FastEMA, in_place: bool) -> None:
    state, plain = bits_of_average(ema), {name: raw(t) for name, t in ema.shadow_state_dict().items()}
    with ema.swapped(in_place):
        assert bits_of_average(ema) == state
        assert {name: raw(t) for name, t in ema.shadow_state_dict().items()} == plain
        twin = small_model(seed=9)
        twin.load_state_dict(ema.shadow_state_dict())
        assert bits(twin) == bits(model)
    assert bits_of_average(ema) == state


def test_a_state_dict_taken_before_shows_the_swap(model: nn.Sequential, ema: FastEMA) -> None:
    """Documented: `model.state_dict()` holds references, and they follow."""
    taken, average = model.state_dict(), ema.state_dict()["shadow"]["0.weight"].clone()
    with ema.swapped():
        assert torch.equal(taken["0.weight"], average)


def test_what_is_skipped_stays_live_in_both_states(backend: str) -> None:
    model = small_model()
    ema = averaged(model, backend, policy=lambda name, *_: "skip" if name == "0.bias" else None)
    live = raw(model[0].bias)
    assert "0.bias" not in ema.state_dict()["shadow"]
    assert raw(ema.shadow_state_dict()["0.bias"]) == live
    with ema.swapped():
        assert raw(model[0].bias) == live
        assert raw(ema.shadow_state_dict()["0.bias"]) == live


# ---- wrong order, one FastEMA ----


def misuses(ema: FastEMA, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], Any]]:
    """Return the calls that are refused while weights are applied, by what their errors name."""
    return {
        "update()": ema.update,
        "apply_shadow()": ema.apply_shadow,
        "swapped()": lambda: ema.swapped().__enter__(),
        "copy_to()": ema.copy_to,
        "load_state_dict()": lambda: ema.load_state_dict(state),
        "optimizer.step()": optimizer.step,
        "copying": lambda: copy.deepcopy(ema),
    }


def test_every_misuse_while_applied_raises_and_changes_nothing(
    model: nn.Sequential, ema: FastEMA, in_place: bool
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    handle = ema.attach(optimizer)
    live, average, state = bits(model), bits_of_average(ema), ema.state_dict()
    ema.apply_shadow(in_place)
    for what, misuse in misuses(ema, state, optimizer).items():
        with pytest.raises(RuntimeError) as error:
            misuse()
        assert what in str(error.value)
        assert "while the EMA weights are applied" in str(error.value)
        assert "restore()" in str(error.value)
        assert bits(model) == average
        assert ema.is_applied
    assert ema.num_updates == 1
    ema.restore()
    assert bits(model) == live
    assert bits_of_average(ema) == average
    handle.remove()


def test_restore_without_apply_raises(model: nn.Sequential, ema: FastEMA) -> None:
    live = bits(model)
    with pytest.raises(RuntimeError, match=r"restore\(\) without apply_shadow\(\)"):
        ema.restore()
    ema.apply_shadow()
    ema.restore()
    with pytest.raises(RuntimeError, match=r"restore\(\) without apply_shadow\(\)"):
        ema.restore()
    assert bits(model) == live


def test_a_nested_block_raises_and_the_outer_one_restores(model: nn.Sequential, ema: FastEMA) -> None:
    live, average = bits(model), bits_of_average(ema)
    with ema.swapped():
        with pytest.raises(RuntimeError, match=r"swapped\(\) while the EMA weights are applied"), ema.swapped():
            pytest.fail("the block was entered")
        assert bits(model) == average, "the inner block restored what the outer one had applied"
    assert bits(model) == live


# ---- two FastEMA of one model ----


@pytest.fixture
def other(model: nn.Sequential, ema: FastEMA, backend: str) -> FastEMA:
    """A second EMA of the same model, with another average."""
    return averaged(model, backend)


def test_two_emas_one_after_the_other(model: nn.Sequential, ema: FastEMA, other: FastEMA, in_place: bool) -> None:
    live, first, second = bits(model), bits_of_average(ema), bits_of_average(other)
    assert first != second
    for _ in range(2):
        with ema.swapped(in_place):
            assert bits(model) == first
        with other.swapped(in_place):
            assert bits(model) == second
    assert bits(model) == live
    train(model, seed=7)
    ema.update()
    other.update()
    assert bits_of_average(ema) != first
    assert bits_of_average(other) != second


def test_a_second_ema_is_refused_while_the_first_is_applied(
    model: nn.Sequential, ema: FastEMA, other: FastEMA, in_place: bool
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    handle = other.attach(optimizer)
    live, first, second, state = bits(model), bits_of_average(ema), bits_of_average(other), other.state_dict()
    ema.apply_shadow(in_place)
    for what, misuse in misuses(other, state, optimizer).items():
        with pytest.raises(RuntimeError) as error:
            misuse()
        assert what in str(error.value)
        assert "another FastEMA is applied to the same model" in str(error.value)
        assert bits(model) == first
    with pytest.raises(RuntimeError, match=r"restore\(\) without apply_shadow\(\)"):
        other.restore()
    assert bits(model) == first
    assert bits_of_average(other) == second, "its state is its own, also now"
    ema.restore()
    assert bits(model) == live
    assert bits_of_average(ema) == first
    assert bits_of_average(other) == second
    handle.remove()


def test_a_second_ema_is_not_built_on_applied_weights(model: nn.Sequential, ema: FastEMA, in_place: bool) -> None:
    """It would start as a copy of the first one's average."""
    with (
        ema.swapped(in_place),
        pytest.raises(RuntimeError, match="another FastEMA is applied to the same model"),
    ):
        FastEMA(model)
    FastEMA(model)


def test_emas_of_parts_of_a_model_do_not_disturb_each_other(backend: str) -> None:
    model = small_model()
    first, last = averaged(model[0], backend), averaged(model[3], backend)
    live, a, b = bits(model), bits_of_average(first), bits_of_average(last)
    with first.swapped():
        with last.swapped():
            assert bits(model[0]) == a
            assert bits(model[3]) == b
        assert bits(model[0]) == a
        last.update()
    assert bits(model) == live


def test_a_forgotten_ema_does_not_block_the_next(backend: str) -> None:
    model = small_model()
    forgotten = averaged(model, backend)
    forgotten.apply_shadow()
    del forgotten
    gc.collect()
    FastEMA(model, backend=backend).update()


# ---- other dtypes ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_with_a_float32_shadow(backend: str, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    ema = averaged(model, backend)
    shadow = ema.state_dict()["shadow"]
    assert shadow["0.weight"].dtype == torch.float32
    live, average, addresses = bits(model), bits_of_average(ema), pointers(tensors_of(model))
    for _ in range(2):
        with ema.swapped():
            for name, parameter in model.named_parameters():
                assert parameter.dtype == dtype
                assert torch.equal(parameter, as_applied(shadow[name], dtype))
            assert model.eval()(values(4, 3, dtype=dtype)).dtype == dtype
            assert bits_of_average(ema) == average
        assert bits(model) == live, "restore() is exact: the live weights were never cast"
        assert pointers(tensors_of(model)) == addresses
        assert bits_of_average(ema) == average
        train(model, seed=8)
        ema.update()
        live, average, shadow = bits(model), bits_of_average(ema), ema.state_dict()["shadow"]


@pytest.mark.pointers
def test_a_numpy_array_taken_inside_outlives_the_block(backend: str) -> None:
    """numpy() hands out the address itself: the scratch memory behind it must not be freed, nor restore() raise."""
    model = nn.Linear(64, 3).to(torch.float16)
    ema = averaged(model, backend)
    live = bits(model)
    for _ in range(2):
        with ema.swapped():
            array = model.weight.detach().numpy()
            expected = array.copy()
        _churn = [torch.full((64 * 3,), 7.0, dtype=torch.float16) for _ in range(50)]
        assert (array == expected).all()
        assert bits(model) == live


@pytest.mark.pointers
def test_scratch_memory_is_freed_by_restore(backend: str) -> None:
    model = nn.Linear(64, 64).to(torch.bfloat16)
    ema = averaged(model, backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ema.apply_shadow()
        ema.restore()
    assert sum(event.self_cpu_memory_usage for event in profile.events() or []) <= 0


def test_in_place_is_refused_where_it_could_not_be_undone(backend: str) -> None:
    model = small_model(torch.float16)
    ema = averaged(model, backend)
    live, average = bits(model), bits_of_average(ema)
    with pytest.raises(ValueError, match=r"in_place=True .* differ in dtype or device") as error:
        ema.apply_shadow(in_place=True)
    assert "apply_shadow() without it" in str(error.value)
    assert not ema.is_applied
    with pytest.raises(ValueError, match="in_place=True"), ema.swapped(in_place=True):
        pytest.fail("the block was entered")
    assert bits(model) == live
    assert bits_of_average(ema) == average
    ema.update()
    with ema.swapped():
        assert bits(model) != live
    assert bits(model) == live


def test_in_place_works_for_16_bit_weights_with_a_16_bit_shadow(backend: str) -> None:
    model = small_model(torch.bfloat16)
    ema = averaged(model, backend, dtype=torch.bfloat16)
    live, average = bits(model), bits_of_average(ema)
    with ema.swapped(in_place=True):
        assert bits(model) == average
    assert bits(model) == live


def test_graphs_notice_the_exchange_of_16_bit_weights_too(backend: str) -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    ema = averaged(model, backend)
    features = values(4, 3, dtype=torch.bfloat16).requires_grad_()
    loss = model(features).sum()
    with ema.swapped():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)
        inside = model(features).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


# ---- who else looks at the weights ----


def test_swapped_under_inference_mode_and_no_grad(model: nn.Sequential, ema: FastEMA, in_place: bool) -> None:
    live, average = bits(model), bits_of_average(ema)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), ema.swapped(in_place):
            assert bits(model) == average
        assert bits(model) == live
    small_loss(model).backward()


def test_both_orders_of_both_kinds_of_exchange(model: nn.Sequential, ema: FastEMA) -> None:
    live, average = bits(model), bits_of_average(ema)
    for kind in (False, True, True, False, False, True):
        with ema.swapped(kind):
            assert bits(model) == average
        assert bits(model) == live
        assert bits_of_average(ema) == average

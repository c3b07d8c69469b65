"""fastema.swa_utils is torch.optim.swa_utils: the same values, errors, attributes and checkpoints, from one launch."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import itertools
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils as theirs

from cases import Recorder, bits, raw, small_model, tensors_of, train, values
from fastema import averaging_functions as functions
from fastema import swa_utils as ours
from fastema.backends import native
from fastema.core.counters import CounterTensor

pytestmark = pytest.mark.usefixtures("one_thread")

needs_fma = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch rounds once more without FMA"
)
needs_native = pytest.mark.skipif(native.why_unusable("cpu") is not None, reason="without fastema._C torch does it")


@pytest.fixture(autouse=True)
def chosen_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the backend where a test asks for one."""
    if "backend" in request.fixturenames:
        monkeypatch.setenv("FASTEMA_BACKEND", request.getfixturevalue("backend"))


def conv_bn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3, bias=False))


def conv_bn_without_counter() -> nn.Module:
    model = conv_bn()
    model[1].num_batches_tracked = None  # type: ignore[index]
    return model


def lstm() -> nn.Module:
    return nn.ModuleDict({"rnn": nn.LSTM(3, 5, num_layers=2, bidirectional=True), "head": nn.Linear(10, 3)})


def transformer() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(11, 12), nn.TransformerEncoderLayer(12, 3, 17, batch_first=True), nn.Linear(12, 4)
    )


def move(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor in tensors_of(model):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype), alpha=0.1)
            else:
                tensor.add_(1)


def states_differ(first: nn.Module, second: nn.Module) -> list[str]:
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    return [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])]


def fast(averaged: ours.AveragedModel) -> bool:
    """Return whether the last update took the plan."""
    return averaged._pairs is not None and averaged._pairs._update is not None


# ---- values ----


@pytest.mark.slow
@needs_fma
@pytest.mark.parametrize("net", [conv_bn, conv_bn_without_counter, lstm, transformer])
def test_a_thousand_updates_have_torchs_bits(net: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = net()
    runs: list[tuple[str, bool, nn.Module, list[ours.AveragedModel]]] = []
    for name, use_buffers in itertools.product(("get_ema_multi_avg_fn", "get_swa_multi_avg_fn"), (False, True)):
        if net is conv_bn and use_buffers and "swa" in name:
            continue  # torch raises
        arguments = [0.99] if "ema" in name else []
        functions = [getattr(module, name)(*arguments) for module in (theirs, ours, theirs)]
        reference = theirs.AveragedModel(model, multi_avg_fn=functions[0], use_buffers=use_buffers)
        mine = [ours.AveragedModel(model, multi_avg_fn=function, use_buffers=use_buffers) for function in functions[1:]]
        runs.append((name, use_buffers, reference, mine))
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        move(model, generator)
        for _, _, reference, mine in runs:
            for averaged in (reference, *mine):
                averaged.update_parameters(model)  # type: ignore[operator]
    for name, use_buffers, reference, mine in runs:
        frozen_by_torch = ["module.1.num_batches_tracked"] if net is conv_bn and use_buffers else []
        for averaged in mine:
            assert fast(averaged)
            assert states_differ(reference, averaged) == frozen_by_torch, (name, use_buffers)
            assert averaged.n_averaged == 1000


@needs_fma
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["get_ema_multi_avg_fn", "get_swa_multi_avg_fn"])
def test_other_dtypes_have_torchs_bits(name: str, dtype: torch.dtype) -> None:
    model = nn.Linear(33, 7).to(dtype)
    pair = [module.AveragedModel(model, multi_avg_fn=getattr(module, name)()) for module in (theirs, ours)]
    for step in range(20):
        train(model, step)
        for averaged in pair:
            averaged.update_parameters(model)
    assert states_differ(*pair) == []
    assert fast(pair[1])


@needs_fma
def test_complex_parameters_have_torchs_bits() -> None:
    model = nn.ParameterList([nn.Parameter(values(5, 3, dtype=torch.complex64)), nn.Parameter(values(4))])
    pair = [module.AveragedModel(model, multi_avg_fn=module.get_ema_multi_avg_fn(0.9)) for module in (theirs, ours)]
    for step in range(10):
        train(model, step)
        for averaged in pair:
            averaged.update_parameters(model)
    assert states_differ(*pair) == []


@pytest.mark.parametrize("decay", [0, 0.25, 0.5, 0.999, 1, 1.0])
def test_every_decay_on_every_backend(backend: str, decay: float) -> None:
    model = small_model()
    pair = [module.AveragedModel(model, multi_avg_fn=module.get_ema_multi_avg_fn(decay)) for module in (theirs, ours)]
    for step in range(5):
        train(model, step)
        for averaged in pair:
            averaged.update_parameters(model)
    for key, expected in pair[0].state_dict().items():
        torch.testing.assert_close(pair[1].state_dict()[key], expected, rtol=1e-6, atol=1e-5)
    assert fast(pair[1])


@pytest.mark.parametrize("name", ["get_ema_avg_fn", "get_swa_avg_fn", None])
def test_functions_of_one_parameter_differ_by_rounding_alone(name: str | None) -> None:
    """One update from the same average differs by two units in the last place of the larger operand at most."""
    model = nn.Linear(1000, 7)
    pair = [module.AveragedModel(model, avg_fn=getattr(module, name)() if name else None) for module in (theirs, ours)]
    for step in range(30):
        train(model, step)
        before = [parameter.detach().clone() for parameter in pair[0].parameters()]
        pair[1].load_state_dict(pair[0].state_dict())
        for averaged in pair:
            averaged.update_parameters(model)
        for old, expected, got, live in zip(before, *(p.parameters() for p in pair), model.parameters(), strict=True):
            bound = 2 * torch.finfo(torch.float32).eps * torch.maximum(old.abs(), live.detach().abs())
            assert bool(((got - expected).abs() <= bound).all())
    assert fast(pair[1])


def test_the_default_is_nearer_to_the_exact_average_than_it_need_be() -> None:
    """After 1,000 updates the error against float64 is within float32's rounding, as torch's own is."""
    model = nn.Linear(50, 20)
    averaged, exact = ours.AveragedModel(model), theirs.AveragedModel(model.double())
    model.float()
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        move(model, generator)
        averaged.update_parameters(model)
        exact.update_parameters(model)
    for got, expected in zip(averaged.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_default_is_exact_in_float64() -> None:
    """The weight 1 / (n + 1) must not be rounded to float32 where torch divides in float64."""
    model = nn.Linear(5, 3).double()
    pair = [module.AveragedModel(model) for module in (theirs, ours)]
    for step in range(7):
        train(model, step)
        for averaged in pair:
            averaged.update_parameters(model)
    for got, expected in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_the_first_update_copies_and_so_does_one_after_the_counter_was_reset() -> None:
    model = small_model()
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.9))
    train(model, 1)
    with torch.no_grad():
        model[0].weight[0, 0], model[0].weight[0, 1], model[0].bias[0] = -0.0, float("inf"), float("nan")
    averaged.update_parameters(model)
    assert bits(averaged.module) == bits(model)
    assert averaged.n_averaged == 1
    with torch.no_grad():
        model[0].weight[0, 1], model[0].bias[0] = 1.0, 1.0
    averaged.update_parameters(model)
    assert bits(averaged.module) != bits(model)
    averaged.n_averaged.zero_()
    averaged.update_parameters(model)
    assert bits(averaged.module) == bits(model)
    assert averaged.n_averaged == 1


def test_nan_propagates(backend: str) -> None:
    model = small_model()
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    with torch.no_grad():
        model[0].weight[1, 1] = float("nan")
    averaged.update_parameters(model)
    assert averaged.module[0].weight.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decay_0_copies_also_over_nan(backend: str, dtype: torch.dtype) -> None:
    """Where torch's lerp keeps the NaN for ever; of another dtype than the weights too."""
    for average_dtype in (dtype, torch.float32):
        model = small_model(dtype)
        averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.0))
        averaged.update_parameters(model)
        averaged.module.to(average_dtype)
        with torch.no_grad():
            averaged.module[0].weight[0, 0], averaged.module[0].weight[0, 1] = float("nan"), float("inf")
            model[0].weight[0, 2] = -0.0
        averaged.update_parameters(model)
        for got, live in zip(averaged.module.parameters(), model.parameters(), strict=True):
            assert raw(got) == raw(live.to(average_dtype))


def test_buffers_are_copied_every_time_or_averaged() -> None:
    model = conv_bn_without_counter()
    both = [
        ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
        for use_buffers in (False, True)
    ]
    for averaged in both:
        averaged.update_parameters(model)
    first = model[1].running_mean.clone()  # type: ignore[index]
    train(model, 3)
    for averaged in both:
        averaged.update_parameters(model)
    now = model[1].running_mean  # type: ignore[index]
    assert torch.equal(both[0].module[1].running_mean, now)
    torch.testing.assert_close(both[1].module[1].running_mean, (first + now) / 2)


@pytest.mark.parametrize("name", ["get_ema_multi_avg_fn", "get_swa_multi_avg_fn", "get_ema_avg_fn"])
def test_integer_buffers_are_copied_where_torch_freezes_them_or_raises(name: str, backend: str) -> None:
    model = conv_bn()
    averaged = ours.AveragedModel(
        model, **{name.removeprefix("get_ema_").removeprefix("get_swa_"): getattr(ours, name)()}, use_buffers=True
    )
    for step in range(4):
        train(model, step)
        averaged.update_parameters(model)
    assert averaged.module[1].num_batches_tracked == model[1].num_batches_tracked == 4  # type: ignore[index]


@pytest.mark.parametrize("name", ["get_ema_multi_avg_fn", "get_swa_multi_avg_fn"])
def test_bfloat16_weights_and_a_float32_average(name: str, backend: str) -> None:
    model = small_model().to(torch.bfloat16)
    averaged = ours.AveragedModel(model, multi_avg_fn=getattr(ours, name)())
    averaged.module.float()
    exact = theirs.AveragedModel(small_model(), multi_avg_fn=getattr(theirs, name)())
    for step in range(20):
        train(model, step)
        averaged.update_parameters(model)
        exact.update_parameters(copy.deepcopy(model).float())
    assert averaged.module[0].weight.dtype == torch.float32
    for got, expected in zip(averaged.module.parameters(), exact.module.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert fast(averaged)


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: conv.to(memory_format=torch.channels_last),
        lambda conv: setattr(conv.weight, "data", conv.weight.data.transpose(0, 1).contiguous().transpose(0, 1)),
        lambda conv: setattr(conv.weight, "data", torch.randn(4, 4, 3, 6)[..., ::2]),
        lambda conv: setattr(conv.weight, "data", torch.randn(4, 1, 3, 3).expand(4, 4, 3, 3)),
    ],
    ids=["channels_last", "transposed", "every_other", "expanded"],
)
@pytest.mark.parametrize("before", [False, True])
def test_layouts(change: Callable[[nn.Conv2d], Any], before: bool) -> None:
    """The live weights alone have another layout, or both sides have it."""
    conv = nn.Conv2d(4, 4, 3)
    if before:
        change(conv)
    pair = [module.AveragedModel(conv, multi_avg_fn=module.get_ema_multi_avg_fn(0.5)) for module in (theirs, ours)]
    if not before:
        change(conv)
    for step in range(3):
        conv.bias.data.add_(1.0)
        conv.weight.data = conv.weight.data * 1.5 if step else conv.weight.data
        for averaged in pair:
            averaged.update_parameters(conv)
    for got, expected in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()


def test_tied_weights_are_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module[1].weight, before + 0.1)


def test_averaged_buffers_that_overlap_are_torchs_business() -> None:
    model = nn.Module()
    model.register_buffer("whole", values(6))
    model.register_buffer("front", model.whole[:3])
    pair = [
        module.AveragedModel(model, multi_avg_fn=module.get_ema_multi_avg_fn(0.5), use_buffers=True)
        for module in (theirs, ours)
    ]
    for _ in range(3):
        model.whole.mul_(1.5)
        for averaged in pair:
            averaged.update_parameters(model)
    assert states_differ(*pair) == []
    assert not fast(pair[1])  # threads would race


def test_a_shared_module_is_averaged_with_itself() -> None:
    """A frozen teacher that deepcopy does not copy stays exactly as it is."""

    class Shared(nn.Linear):
        def __deepcopy__(self, memo: Any) -> nn.Module:
            return self

    model = nn.Sequential(Shared(33, 3), nn.Linear(3, 2))
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.999))
    before = bits(model[0])
    for _ in range(10):
        averaged.update_parameters(model)
    assert bits(model[0]) == before
    assert fast(averaged)
    with averaged.swapped(model):
        assert bits(model[0]) == before


# ---- what runs, and when it is built anew ----


@needs_native
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("source", [ours, theirs])
@pytest.mark.parametrize("name", [*sorted(functions.TORCH_FACTORIES), None])
def test_one_launch_and_no_copy(name: str | None, source: Any, use_buffers: bool) -> None:
    model = conv_bn()
    arguments = {"multi_avg_fn" if "multi" in name else "avg_fn": getattr(source, name)()} if name else {}
    averaged = ours.AveragedModel(model, **arguments, use_buffers=use_buffers)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    with Recorder() as recorder:
        averaged.update_parameters(model)
    on_the_host = ["lift_fresh", "reciprocal", "mul", "_local_scalar_dense"]  # the weight of SWA, and the counter
    others = [name for name in recorder.seen if name.split(".")[1] not in on_the_host]
    assert others == ["aten.add_.Tensor"]


@needs_native
def test_the_average_follows_replaced_and_moved_tensors() -> None:
    model = small_model()
    pair = [module.AveragedModel(model, multi_avg_fn=module.get_ema_multi_avg_fn(0.5)) for module in (theirs, ours)]

    def update() -> None:
        train(model, 5)
        for averaged in pair:
            averaged.update_parameters(model)
        assert states_differ(*pair) == []

    update()
    update()
    first = pair[1]._pairs
    update()
    assert pair[1]._pairs is first  # nothing changed: the plan stays
    model[0].weight.data = model[0].weight.data.clone()
    update()
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    update()
    model[0] = nn.Linear(3, 5)
    update()
    for averaged in pair:
        averaged.module[0].weight = nn.Parameter(averaged.module[0].weight.detach() * 2)
    update()
    for averaged in pair:
        averaged.multi_avg_fn = ours.get_ema_multi_avg_fn(0.9)
    update()
    for averaged in pair:
        averaged.multi_avg_fn = None
        averaged.avg_fn = lambda one, other, count: one * 0 + count
    update()
    assert torch.equal(pair[1].module[0].bias, torch.full((5,), 8.0))


def test_another_model_may_follow() -> None:
    first, second = small_model(seed=1), small_model(seed=2)
    pair = [module.AveragedModel(first) for module in (theirs, ours)]
    for model in (first, second, first, second, second):
        for averaged in pair:
            averaged.update_parameters(model)
    for got, expected in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_live_model_is_not_kept_alive() -> None:
    model = small_model()
    averaged = ours.AveragedModel(model)
    for _ in range(2):
        averaged.update_parameters(model)
    assert fast(averaged)
    weights = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert weights() is None
    assert averaged._pairs is None
    gone = weakref.ref(averaged)
    del averaged
    assert gone() is None  # and no cycle keeps the average


def test_updates_are_seen_by_autograd() -> None:
    model = nn.Linear(3, 2)
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    loss = averaged(torch.ones(1, 3, requires_grad=True)).square().sum()
    averaged.update_parameters(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- the counter ----


def test_the_counter_is_torchs() -> None:
    averaged = ours.AveragedModel(nn.Linear(2, 2))
    assert averaged.n_averaged.dtype == torch.int64
    assert averaged.n_averaged.shape == ()
    assert averaged.n_averaged.device.type == "cpu"
    counter = averaged.n_averaged
    for _ in range(3):
        averaged.update_parameters(averaged.module)
    assert averaged.n_averaged is counter
    assert counter == 3


@pytest.mark.parametrize("write", ["fill_", "data", "assign", "load", "load_assign"])
def test_a_written_counter_counts(write: str) -> None:
    model = small_model()
    pair = [module.AveragedModel(model, multi_avg_fn=module.get_swa_multi_avg_fn()) for module in (theirs, ours)]
    for step in range(6):
        if step == 3:
            for averaged in pair:
                if write == "fill_":
                    averaged.n_averaged.fill_(100)
                elif write == "data":
                    averaged.n_averaged.data.fill_(100)
                elif write == "assign":
                    averaged.n_averaged = torch.tensor(100)
                else:
                    state = {key: value.clone() for key, value in averaged.state_dict().items()}
                    state["n_averaged"].fill_(100)
                    averaged.load_state_dict(state, assign=write == "load_assign")
        train(model, step)
        for averaged in pair:
            averaged.update_parameters(model)
    assert pair[1].n_averaged == 103
    for got, expected in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_counter_on_a_device_is_read_once() -> None:
    counter, tensor = CounterTensor(), torch.tensor(4)
    assert counter.remembered(tensor) == 4
    with Recorder() as recorder:
        for expected in range(5, 10):
            counter.increase(tensor)
            assert counter.remembered(tensor) == expected
    assert set(recorder.seen) == {"aten.add_.Tensor"}
    assert tensor.item() == 9
    tensor.fill_(2)
    assert counter.remembered(tensor) == 2
    counter.increase(tensor)
    tensor.data = torch.tensor(50)
    assert counter.remembered(tensor) == 50
    other = torch.tensor(7)
    assert counter.remembered(other) == 7
    counter.increase(tensor)  # not the one that was read
    assert counter.remembered(tensor) == 51


# ---- functions ----


def test_the_users_function_is_called_as_torch_calls_it() -> None:
    def record(into: list[Any]) -> Callable[..., None]:
        def multi(averaged: Any, current: Any, count: Any) -> None:
            into.append((type(averaged), len(averaged), averaged[0].dtype, type(current), type(count), count.clone()))
            for one, other in zip(averaged, current, strict=True):
                one.copy_(one + other)

        return multi

    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).double(), nn.BatchNorm1d(2))
    calls: list[list[Any]] = [[], []]
    pair = [
        module.AveragedModel(model, multi_avg_fn=record(into), use_buffers=True)
        for module, into in zip((theirs, ours), calls, strict=True)
    ]
    for step in range(3):
        train(model, step)
        for averaged in pair:
            averaged.update_parameters(model)
    assert calls[0] == calls[1]
    assert len(calls[1]) == 2 * 3  # two updates; float32, float64, int64
    assert states_differ(*pair) == ["module.2.num_batches_tracked"]  # which is copied afterwards


def test_the_users_function_of_one_parameter_gets_a_tensor_counter() -> None:
    counts: list[Any] = []

    def average(averaged: Tensor, current: Tensor, count: Any) -> Tensor:
        counts.append(count)
        return current

    model = nn.Linear(2, 2)
    averaged = ours.AveragedModel(model, avg_fn=average)
    for _ in range(2):
        averaged.update_parameters(model)
    assert [type(count) for count in counts] == [Tensor, Tensor]
    assert averaged.avg_fn is average


@pytest.mark.parametrize("decay", [0.9, 1, 0])
def test_torchs_functions_are_recognised(decay: float) -> None:
    for name in functions.TORCH_FACTORIES:
        arguments = [decay] if "ema" in name else []
        for module in (theirs, ours):
            known = functions.recognise(getattr(module, name)(*arguments))
            assert known is not None
            assert known.factory == name
            assert known.decay == (decay if arguments else None)


def test_what_only_looks_like_torchs_is_the_users() -> None:
    torchs = theirs.get_ema_multi_avg_fn(0.9)

    def wrapped(*args: Any) -> Any:
        return torchs(*args)

    wrapped.__wrapped__ = torchs  # type: ignore[attr-defined]
    users = (wrapped, torch.inference_mode()(torchs), lambda *args: torchs(*args), torchs.__wrapped__, len, None, 3)
    assert [functions.recognise(function) for function in users] == [None] * 7
    assert functions.recognise(theirs.get_ema_avg_fn(torch.tensor(0.9))) is None  # it may be on a GPU


@pytest.mark.parametrize("name", ["get_ema_multi_avg_fn", "get_ema_avg_fn"])
@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_out_of_range(name: str, decay: float) -> None:
    messages = []
    for module in (theirs, ours):
        with pytest.raises(ValueError) as error:
            getattr(module, name)(decay)
        messages.append(str(error.value))
    assert messages[0] == messages[1] == f"Invalid decay value {decay} provided. Please provide a value in [0,1] range."


@pytest.mark.parametrize("count", [3, torch.tensor(3)])
@pytest.mark.parametrize("name", sorted(functions.TORCH_FACTORIES))
def test_functions_called_directly(name: str, count: Any) -> None:
    results = []
    for module in (theirs, ours):
        function = getattr(module, name)()
        one, other = values(5, seed=1), values(5, seed=2)
        if "multi" in name:
            assert function([one], [other], count) is None
            results.append(one)
        else:
            results.append(function(one, other, count))
    assert torch.equal(*results)


def test_names_signatures_and_defaults() -> None:
    assert set(theirs.__all__) | {"patch", "unpatch"} == set(ours.__all__)
    for name in theirs.__all__:
        first, second = (inspect.signature(getattr(module, name)).parameters for module in (theirs, ours))
        assert [(p.name, p.default, p.kind) for p in first.values()] == [
            (p.name, p.default, p.kind) for p in second.values()
        ]
    for name in functions.TORCH_FACTORIES:
        first, second = (getattr(module, name)() for module in (theirs, ours))
        assert inspect.signature(first) == inspect.signature(second)
        assert first.__name__ == second.__name__
    assert issubclass(ours.AveragedModel, theirs.AveragedModel)
    assert ours.SWALR is theirs.SWALR


# ---- the model as an object ----


def test_attributes_and_keys() -> None:
    function = theirs.get_ema_multi_avg_fn(0.9)
    model = conv_bn()
    pair = [module.AveragedModel(model, None, None, function, True) for module in (theirs, ours)]
    for averaged in pair:
        assert averaged.multi_avg_fn is function
        assert averaged.avg_fn is None
        assert averaged.use_buffers is True
        assert averaged.module is not model
    assert list(pair[0].state_dict()) == list(pair[1].state_dict())
    assert next(iter(pair[1].state_dict())) == "n_averaged"
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(pair[1].eval()(x), model.eval()(x))
    assert not vars(pair[1]).keys() - vars(pair[0]).keys()


def test_both_functions() -> None:
    for module in (theirs, ours):
        with pytest.raises(AssertionError, match=r"^Only one of avg_fn and multi_avg_fn should be provided$"):
            module.AveragedModel(nn.Linear(2, 2), avg_fn=len, multi_avg_fn=len)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_models_that_do_not_fit_behave_as_in_torch(use_buffers: bool) -> None:
    """Other shapes, fewer or more tensors give the same error with the same message, or the same values."""
    others = [nn.Sequential(nn.Linear(3, 5)), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(1, 1)]
    for other, updates in itertools.product(others, (0, 2)):
        outcomes = []
        for module in (theirs, ours):
            model = small_model()
            averaged = module.AveragedModel(model, avg_fn=module.get_ema_avg_fn(), use_buffers=use_buffers)
            for _ in range(updates):
                averaged.update_parameters(model)
            try:
                averaged.update_parameters(other)
                outcomes.append((None, "", averaged))
            except Exception as error:
                outcomes.append((type(error), str(error), averaged))
        assert outcomes[0][:2] == outcomes[1][:2]
        if outcomes[0][0] is not None or updates == 0:
            first, second = (averaged.state_dict() for _, _, averaged in outcomes)
            for key in first:
                torch.testing.assert_close(first[key], second[key])


@pytest.mark.parametrize("source", [ours, theirs])
@pytest.mark.parametrize("name", [*sorted(functions.TORCH_FACTORIES), None])
def test_pickle_and_deepcopy(name: str | None, source: Any) -> None:
    model = small_model()
    arguments = {"multi_avg_fn" if "multi" in name else "avg_fn": getattr(source, name)()} if name else {}
    averaged = ours.AveragedModel(model, **arguments)
    for step in range(3):
        train(model, step)
        averaged.update_parameters(model)
    clones = [copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged))]
    train(model, 9)
    before = bits(averaged)
    for clone in clones:
        assert bits(clone) == before
        clone.update_parameters(model)
    assert bits(averaged) == before
    averaged.update_parameters(model)
    for clone in clones:
        assert type(clone) is ours.AveragedModel
        assert bits(clone) == bits(averaged)
        assert fast(clone)


def test_torch_save_of_the_whole_model() -> None:
    averaged = ours.AveragedModel(small_model(), multi_avg_fn=ours.get_ema_multi_avg_fn(0.75))
    file = io.BytesIO()
    torch.save(averaged, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert bits(loaded) == bits(averaged)
    assert loaded.multi_avg_fn.decay == 0.75


@needs_fma
def test_checkpoints_go_both_ways() -> None:
    model = small_model()
    function = ours.get_ema_multi_avg_fn(0.9)
    for first_module, second_module in ((theirs, ours), (ours, theirs)):
        first = first_module.AveragedModel(model, multi_avg_fn=function)
        for step in range(3):
            train(model, step)
            first.update_parameters(model)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = second_module.AveragedModel(small_model(seed=5), multi_avg_fn=function)
        result = second.load_state_dict(torch.load(file, weights_only=True))
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        train(model, 9)
        first.update_parameters(model)
        second.update_parameters(model)
        assert states_differ(first, second) == []


def test_a_subclass_with_parameters_of_its_own_behaves_as_in_torch() -> None:
    outcomes = []
    for module in (theirs, ours):

        class Sub(module.AveragedModel):  # type: ignore[name-defined,misc]
            def __init__(self, model: nn.Module) -> None:
                super().__init__(model)
                self.scale = nn.Parameter(torch.zeros(3, 2))

        model = nn.Linear(2, 3)
        torch.nn.init.constant_(model.weight, 2.0)
        averaged = Sub(model)
        try:
            averaged.update_parameters(model)
            outcomes.append([parameter.tolist() for parameter in averaged.parameters()])
        except RuntimeError as error:
            outcomes.append([str(error)])
    assert outcomes[0] == outcomes[1]


# ---- models that are not plain ----


def test_a_compiled_model_keeps_its_keys() -> None:
    plain = small_model()
    model = torch.compile(plain, backend="eager")
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.5))
    assert "module._orig_mod.0.weight" in averaged.state_dict()
    averaged.update_parameters(model)
    before = plain[0].weight.detach().clone()
    with torch.no_grad():
        plain[0].weight.add_(1.0)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module._orig_mod[0].weight, before + 0.5)
    assert fast(averaged)
    x = values(4, 3)
    live = model.eval()(x)
    with averaged.swapped(model):
        inside = model(x)
    assert not torch.equal(inside, live)
    assert torch.equal(inside, averaged.eval()(x))
    assert torch.equal(model(x), live)


def test_update_inside_a_compiled_function() -> None:
    model = nn.Linear(3, 2)
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    before = model.bias.detach().clone()
    with torch.no_grad():
        model.bias.add_(1.0)
    torch.compile(averaged.update_parameters, backend="eager")(model)
    torch.testing.assert_close(averaged.module.bias, before + 0.5)
    assert averaged.n_averaged == 2


def test_parametrized_models() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    )
    pair = [module.AveragedModel(model, avg_fn=module.get_ema_avg_fn(0.5)) for module in (theirs, ours)]
    for _ in range(3):
        model(values(2, 4)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.01)
        for averaged in pair:
            averaged.update_parameters(model)
    for key, expected in pair[0].state_dict().items():
        torch.testing.assert_close(pair[1].state_dict()[key], expected)
    assert fast(pair[1])
    x = values(2, 4)
    live, average = model.eval()(x), pair[1].eval()(x)
    with pair[1].swapped(model):
        assert torch.equal(model(x), average)
    assert torch.equal(model(x), live)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_cannot_be_copied_names_the_way_out() -> None:
    model = nn.utils.weight_norm(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match=r"Linear cannot be deep-copied.*fastema.FastEMA.*parametrizations") as error:
        ours.AveragedModel(model)
    assert "deepcopy protocol" in str(error.value.__cause__)


def test_an_error_after_the_copy_is_torchs() -> None:
    messages = []
    for module in (theirs, ours):
        with pytest.raises(RuntimeError) as error:
            module.AveragedModel(nn.Linear(2, 2), device="nowhere")
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_an_expanded_buffer_is_torchs_error() -> None:
    messages = []
    for module in (theirs, ours):
        model = nn.Linear(2, 2)
        model.register_buffer("mask", torch.zeros(1).expand(4))
        averaged = module.AveragedModel(model)
        with pytest.raises(RuntimeError) as error:
            averaged.update_parameters(model)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_use_buffers_may_change() -> None:
    model = conv_bn_without_counter()
    pair = [module.AveragedModel(model, multi_avg_fn=module.get_ema_multi_avg_fn(0.5)) for module in (theirs, ours)]
    for step in range(6):
        train(model, step)
        for averaged in pair:
            averaged.use_buffers = step % 4 > 1
            averaged.update_parameters(model)
        for got, expected in zip(pair[1].buffers(), pair[0].buffers(), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_torchs_business() -> None:
    model = torch.jit.script(nn.Linear(3, 2))
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    with torch.no_grad():
        model.bias.add_(1.0)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module.bias, model.bias - 0.5)
    with pytest.raises(ValueError, match="ordinary module"), averaged.swapped(model):
        pass


def test_modules_with_a_walk_of_their_own_fall_back_to_torch() -> None:
    """Their walks may change without a trace in their slots."""

    class Chooser(nn.Linear):
        chosen = ("weight",)

        def parameters(self, recurse: bool = True) -> Any:
            return (getattr(self, name) for name in self.chosen)

    model = nn.Sequential(nn.Linear(1, 1)), Chooser(3, 2)
    averaged = ours.AveragedModel(model[1])
    other = nn.Linear(3, 2)
    for _ in range(2):
        averaged.update_parameters(other)
    assert not fast(averaged)
    assert torch.equal(averaged.module.weight, other.weight)


def test_the_average_may_be_built_under_inference_mode() -> None:
    model = small_model()
    with torch.inference_mode():
        averaged = ours.AveragedModel(model)
        averaged.update_parameters(model)
    train(model, 1)
    averaged.update_parameters(model)
    assert averaged.n_averaged == 2
    with torch.inference_mode():
        averaged.update_parameters(model)
    averaged.update_parameters(model)
    assert averaged.n_averaged == 4
    assert fast(averaged)


@pytest.mark.slow
def test_the_interpreter_ends_quietly() -> None:
    code = (
        "import torch, fastema.swa_utils as s; m = torch.nn.Linear(2, 2); a = s.AveragedModel(m)\n"
        "for _ in range(2): a.update_parameters(m)\n"
        "with a.swapped(m): pass\n"
    )
    command = [sys.executable, "-W", "ignore:fastema runs its torch backend", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_importing_changes_nothing_in_torch() -> None:
    code = (
        "import torch.optim.swa_utils as t; before = dict(vars(t)); import fastema.swa_utils\n"
        "assert dict(vars(t)) == before; assert t.AveragedModel is not fastema.swa_utils.AveragedModel"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("argument", ["avg_fn", "multi_avg_fn"])
def test_integers_are_copied_whatever_the_function(argument: str) -> None:
    """torch rounds down what a user's function makes of position ids, counters and masks."""
    functions = {
        "avg_fn": lambda averaged, current, count: 0.9999 * averaged + (1 - 0.9999) * current,
        "multi_avg_fn": lambda averaged, current, count: [
            a.copy_(0.9999 * a + (1 - 0.9999) * c) for a, c in zip(averaged, current, strict=True)
        ],
    }
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("ids", torch.arange(2048))
    model.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    averaged = ours.AveragedModel(model, use_buffers=True, **{argument: functions[argument]})  # type: ignore[arg-type]
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.add_(1)
            model[1].running_mean.add_(1)
        averaged.update_parameters(model)
    assert torch.equal(averaged.module.ids, torch.arange(2048)) and averaged.module.mask.all()
    assert 0 < (model[1].running_mean - averaged.module[1].running_mean).min() < 2.1, "floats are the function's"

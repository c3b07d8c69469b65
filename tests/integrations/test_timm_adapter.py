"""`fastema.integrations.timm.ModelEmaV3` against timm's own: the same random run, the same bits."""

from __future__ import annotations

import copy
import doctest
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastema.integrations.timm
from cases import as_applied, bits, raw, small_model, tensors_of, train, values
from cases.peers import package
from fastema.integrations.timm import ModelEmaV3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def original() -> Any:
    """Return timm's class."""
    return package("timm.utils").ModelEmaV3


class _Recurrent(nn.Module):
    """A model with flat RNN weights, a 0-dim parameter and a buffer outside the state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, num_layers=2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("table", torch.arange(5.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x + self.table)[0] * self.scale


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (_convolutional, (2, 3, 6, 6)),
    "recurrent": (_Recurrent, (4, 2, 5)),
    "transformer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 3, 16)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "not foreach": {"foreach": False},
    "warm-up": {"use_warmup": True, "warmup_gamma": 2.0, "warmup_power": 0.75},
    "least decay": {"use_warmup": True, "min_decay": 0.6},
    "start later": {"update_after_step": 7},
    "buffers copied": {"exclude_buffers": True},
}


def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name][0]()


def state_bits(module: nn.Module) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in module.state_dict().items()}


# ---- held to the original ----


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_over_a_run(original: Any, name: str, options: dict[str, Any]) -> None:
    model = made(name)
    theirs, ours = original(model, 0.95, **options), ModelEmaV3(model, 0.95, **options)
    for step in range(60):
        train(model, seed=step)
        for ema in (theirs, ours):
            ema.update(model, step=step if step % 3 else None)
        assert bits(ours.module) == bits(theirs.module), f"step {step}"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    inputs = values(*MODELS[name][1])
    assert raw(ours(inputs)) == raw(theirs(inputs))
    assert bits(ours.module) != bits(model)


def test_the_same_bits_over_a_thousand_steps(original: Any) -> None:
    model = nn.Sequential(nn.Linear(33, 17), nn.BatchNorm1d(17))
    theirs, ours = original(model, 0.999), ModelEmaV3(model, 0.999)
    for step in range(1000):
        train(model, seed=step)
        theirs.update(model)
        ours.update(model)
    assert state_bits(ours) == state_bits(theirs)


def test_a_real_model(original: Any) -> None:
    model = package("timm").create_model("edgenext_xx_small", num_classes=10)
    theirs, ours = original(model, 0.9), ModelEmaV3(model, 0.9)
    for step in range(3):
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.mul_(1 + 0.01 * (step + 1))
        theirs.update(model, step)
        ours.update(model, step)
    assert state_bits(ours) == state_bits(theirs)


def test_the_decay_is_the_same(original: Any) -> None:
    model = nn.Linear(2, 1)
    for options in (*OPTIONS.values(), {"use_warmup": True, "min_decay": 0.3, "update_after_step": 4}):
        theirs, ours = original(model, 0.9, **options), ModelEmaV3(model, 0.9, **options)
        assert [ours.get_decay(step) for step in (None, *range(40))] == [
            theirs.get_decay(step) for step in (None, *range(40))
        ]


def test_the_decay_may_be_changed_on_the_way(original: Any) -> None:
    model = small_model()
    theirs, ours = original(model, 0.9), ModelEmaV3(model, 0.9)
    for decay in (0.9, 0.5, 0.0, 1.0, 0.99):
        train(model)
        for ema in (theirs, ours):
            ema.decay = decay
            ema.update(model)
        assert state_bits(ours) == state_bits(theirs)
    ours.decay = 1.5
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        ours.update(model)


def test_the_constructor_takes_the_same_arguments(original: Any) -> None:
    theirs, ours = (inspect.signature(each.__init__).parameters for each in (original, ModelEmaV3))
    assert list(theirs) == list(ours)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind


def test_states_go_both_ways(original: Any) -> None:
    model = small_model()
    theirs, ours = original(model, 0.9), ModelEmaV3(model, 0.9)
    for step in range(4):
        train(model, seed=step)
        theirs.update(model)
    ours.load_state_dict(theirs.state_dict())
    back = original(model, 0.9)
    back.load_state_dict(ours.state_dict())
    for step in range(4):
        train(model, seed=9 + step)
        for ema in (theirs, ours, back):
            ema.update(model)
    assert state_bits(ours) == state_bits(theirs) == state_bits(back)


def test_nan_spreads_as_in_the_original_and_set_starts_over(original: Any) -> None:
    model = small_model()
    theirs, ours = original(model, 0.9), ModelEmaV3(model, 0.9)
    clean = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")  # type: ignore[index]
    for ema in (theirs, ours):
        ema.update(model)
    assert ours.module[0].weight.isnan().sum() == theirs.module[0].weight.isnan().sum() == 1  # type: ignore[index]
    model.load_state_dict(clean)
    train(model)
    for ema in (theirs, ours):
        ema.set(model)
    assert state_bits(ours) == state_bits(theirs)
    assert bits(ours.module) == bits(model)
    train(model)
    ours.update(model)
    theirs.update(model)
    assert state_bits(ours) == state_bits(theirs), "set() took the average out of the plan"


@pytest.mark.parametrize("exclude_buffers", [False, True])
def test_buffers_outside_the_state_as_in_the_original(original: Any, exclude_buffers: bool) -> None:
    model = made("recurrent")
    assert isinstance(model, _Recurrent)
    emas = [kind(model, 0.9, exclude_buffers=exclude_buffers) for kind in (original, ModelEmaV3)]
    model.table.fill_(7.0)
    for ema in emas:
        ema.update(model)
    tables = [ema.module.table.tolist() for ema in emas]
    assert tables[0] == tables[1] == ([7.0] * 5 if exclude_buffers else [0.0, 1.0, 2.0, 3.0, 4.0])


def test_another_model_is_averaged_as_in_the_original(original: Any) -> None:
    first, second = small_model(), small_model(seed=5)
    theirs, ours = original(first, 0.9), ModelEmaV3(first, 0.9)
    for model in (first, second, second, first):
        train(model)
        theirs.update(model)
        ours.update(model)
        assert state_bits(ours) == state_bits(theirs)


def test_a_wider_average(original: Any) -> None:
    """timm multiplies and adds where dtypes differ, and rounds once more: not the same bits."""
    model = nn.ModuleList([small_model(), made("recurrent")])
    theirs, ours = original(model, 0.9, dtype=torch.float64), ModelEmaV3(model, 0.9, dtype=torch.float64)
    for step in range(20):
        train(model, seed=step)
        theirs.update(model)
        ours.update(model)
    dtypes = [[tensor.dtype for tensor in tensors_of(ema.module)] for ema in (theirs, ours)]
    assert dtypes[0] == dtypes[1]
    assert torch.float32 not in dtypes[1]
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13)


def test_a_float64_module_goes_on_with_float32_weights(original: Any) -> None:
    model = small_model()
    theirs, ours = original(model, 0.9), ModelEmaV3(model, 0.9)
    for step in range(6):
        if step == 3:
            theirs.to(torch.float64)
            ours.to(torch.float64)
        train(model, seed=step)
        theirs.update(model)
        ours.update(model)
    assert ours.module[0].weight.dtype == torch.float64  # type: ignore[index]
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


# ---- the module ----


def test_the_module_is_the_shadow_and_in_eval_mode() -> None:
    model = small_model().train()
    ema = ModelEmaV3(model, 0.5)
    addresses = {tensor.data_ptr() for tensor in tensors_of(ema.module)}
    assert ema._external is not None
    assert addresses == {average.data_ptr() for average in ema._external.averages().values()}, "memory of its own"
    assert not addresses & {tensor.data_ptr() for tensor in tensors_of(model)}
    assert not any(part.training for part in ema.module.modules())
    assert all(part.training for part in model.modules())
    assert not any(parameter is other for parameter in ema.parameters() for other in model.parameters())


def test_the_module_stays_bound_whatever_happens_to_its_tensors() -> None:
    """Tensors that were replaced are the average from then on, and the next update finds them."""
    model = small_model()
    ema, expected = ModelEmaV3(model, 0.5), copy.deepcopy(model).double()

    def replace() -> None:
        state = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
        ema.load_state_dict(state, assign=True)

    def move() -> None:
        for tensor in tensors_of(ema.module):
            tensor.data = tensor.data.clone()

    def move_the_live_weights() -> None:
        for tensor in tensors_of(model):
            tensor.data = tensor.data.clone()

    held = ema.module
    for step, change in enumerate((lambda: None, replace, move, move_the_live_weights)):
        change()
        train(model, seed=step)
        ema.update(model)
        with torch.no_grad():
            for average, live in zip(tensors_of(expected), tensors_of(model), strict=True):
                average.lerp_(live.double(), 0.5) if average.is_floating_point() else average.copy_(live)
        for average, wanted in zip(tensors_of(ema.module), tensors_of(expected), strict=True):
            torch.testing.assert_close(average.double(), wanted.double(), rtol=1e-6, atol=1e-6)
    assert ema.module is held


def test_a_graph_through_the_module_notices_an_update() -> None:
    model = nn.Linear(3, 2)
    ema = ModelEmaV3(model, 0.5)
    loss = ema.module.weight.square().sum()  # type: ignore[operator,union-attr]
    train(model)
    ema.update(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_wrapper_needs_no_new_plan() -> None:
    model = small_model()
    ema = ModelEmaV3(model, 0.5)
    bound = ema._external
    for wrapper in (nn.DataParallel(model), torch.compile(model), nn.ModuleList([model])):
        train(model)
        before = bits(ema.module)
        ema.update(wrapper)  # type: ignore[arg-type]
        assert bits(ema.module) != before
        assert ema._external is bound


def test_a_compiled_model_keeps_its_names(original: Any) -> None:
    model = torch.compile(small_model())
    theirs, ours = original(model, 0.5), ModelEmaV3(model, 0.5)  # type: ignore[arg-type]
    train(model)  # type: ignore[arg-type]
    for ema in (theirs, ours):
        ema.update(model)
    assert state_bits(ours) == state_bits(theirs)
    assert "module._orig_mod.0.weight" in ours.state_dict()


def test_tied_weights_are_averaged_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    nn.init.zeros_(model["a"].weight)  # type: ignore[arg-type]
    ema = ModelEmaV3(model, 0.9)
    nn.init.ones_(model["a"].weight)  # type: ignore[arg-type]
    ema.update(model)
    torch.testing.assert_close(ema.module["b"].weight, torch.full((3, 3), 0.1))  # type: ignore[index]
    assert ema.module["a"].weight is ema.module["b"].weight  # type: ignore[index]


@pytest.mark.parametrize("exclude_buffers", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_sixteen_bits_are_averaged_in_float32_and_the_module_runs_in_its_dtype(
    exclude_buffers: bool, dtype: torch.dtype | None
) -> None:
    model = small_model(torch.bfloat16)
    ema = ModelEmaV3(model, 0.999, exclude_buffers=exclude_buffers, dtype=dtype)
    exact = model[0].weight.detach().double()  # type: ignore[operator,union-attr]
    with torch.no_grad():
        model[0].weight.mul_(1.5)  # type: ignore[operator]
        model[1].running_mean.fill_(0.25)  # type: ignore[operator,union-attr]
    held = ema.module[0].weight  # type: ignore[index]
    for _ in range(50):
        ema.update(model)
        exact = 0.999 * exact + 0.001 * model[0].weight.double()  # type: ignore[operator,union-attr]
    assert ema.module[0].weight is held  # type: ignore[index]
    expected = dtype or torch.bfloat16
    floats = [tensor for tensor in tensors_of(ema.module) if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {expected}
    assert ema(values(2, 3).to(expected)).dtype == expected
    # One rounding, of the result; an average that moves in 16 bits stands still or rounds at every step.
    torch.testing.assert_close(
        held.double(), exact, rtol=torch.finfo(expected).eps / 2 if expected.itemsize == 2 else 1e-5, atol=1e-6
    )
    mean = ema.module[1].running_mean  # type: ignore[index]
    torch.testing.assert_close(
        mean.float(), torch.full((5,), 0.25 if exclude_buffers else 0.25 * (1 - 0.999**50)), rtol=4e-3, atol=1e-5
    )


def exact_values(ema: ModelEmaV3) -> dict[str, Tensor]:
    """Return the float32 averages of a bfloat16 model's EMA."""
    assert ema._external is not None
    return ema._external.averages()


def started(seed: int = 0) -> tuple[nn.Module, ModelEmaV3]:
    """Return a bfloat16 model and its EMA, whose averages have bits beyond bfloat16."""
    model = small_model(torch.bfloat16, seed=seed)
    ema = ModelEmaV3(model, 0.5)
    for step in range(3):
        train(model, seed=step)
        ema.update(model)
    assert any(bool(average.bfloat16().ne(average).any()) for average in exact_values(ema).values())
    return model, ema


def test_a_bfloat16_module_has_the_high_planes_and_no_memory_of_its_own() -> None:
    _, ema = started()
    assert ema._external is not None
    weights, lows = ema._external.weights(), ema._external.lows()
    for name, tensor in ema.module.state_dict().items():
        assert tensor.data_ptr() == weights[name].data_ptr()
        assert (name in lows) == (tensor.dtype == torch.bfloat16)
        if name in lows:
            assert raw(tensor) == raw(as_applied(exact_values(ema)[name], torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_loaded_state_counts_in_full(dtype: torch.dtype) -> None:
    _, ema = started()
    state = {
        f"module.{name}": average.to(dtype) if average.is_floating_point() else average
        for name, average in exact_values(ema).items()
    }
    model, other = started(seed=1)
    other.load_state_dict(state)
    floats = {name.removeprefix("module."): value.float() for name, value in state.items() if value.is_floating_point()}
    for name, value in floats.items():
        assert raw(other.module.state_dict()[name]) == raw(as_applied(value, torch.bfloat16))
    other.decay = 1.0  # keeps what was loaded
    other.update(model)
    assert {name: raw(exact_values(other)[name]) for name in floats} == {n: raw(v) for n, v in floats.items()}


@pytest.mark.parametrize("write", ["into module", "in place", "set", "into a copy"])
def test_what_is_written_to_the_module_is_the_average(write: str) -> None:
    model, ema = started()
    if write == "into module":
        ema.module.load_state_dict(small_model(torch.bfloat16, seed=5).state_dict())
    elif write == "in place":
        with torch.no_grad():
            for tensor in tensors_of(ema.module):
                if tensor.is_floating_point():
                    tensor.mul_(3)
    elif write == "set":
        ema.set(small_model(torch.bfloat16, seed=5))
    else:
        ema = copy.deepcopy(ema)
        ema.load_state_dict(
            {f"module.{name}": tensor for name, tensor in small_model(torch.bfloat16).state_dict().items()}
        )
    written = {name: tensor.clone() for name, tensor in ema.module.state_dict().items()}
    ema.decay = 1.0
    ema.update(model)
    for name, average in exact_values(ema).items():
        if average.is_floating_point():
            assert raw(average) == raw(written[name].float()), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_written_to_a_copy_is_the_average(dtype: torch.dtype, copied: Any) -> None:
    model = nn.Linear(3, 3, bias=False).to(dtype)
    ema = copied(ModelEmaV3(model, 0.5))
    ema.set(nn.Linear(3, 3, bias=False).to(dtype))
    written = ema.module.weight.clone()
    ema.decay = 1.0
    ema.update(model)
    assert torch.equal(ema.module.weight, written)
    assert torch.equal(exact_values(ema)["weight"], written.float())


def test_statistics_that_a_forward_writes_into_the_module_stay() -> None:
    """BatchNorm raises no version counter: the low plane is stale, and less than half of a unit in the last place."""
    model, ema = started()
    ema.module.train()
    ema(values(64, 3, dtype=torch.bfloat16) * 5 + 7)
    norm = ema.module[1]  # type: ignore[index]
    written = norm.running_mean.clone(), norm.running_var.clone()  # type: ignore[union-attr]
    ema.decay = 1.0
    ema.update(model)
    for tensor, was in zip((norm.running_mean, norm.running_var), written, strict=True):
        torch.testing.assert_close(tensor, was, rtol=2**-8, atol=0)
        assert not torch.equal(was, torch.zeros_like(was))
    assert not any(average.isnan().any() for average in exact_values(ema).values())


def test_a_module_made_float32_goes_on_from_what_it_shows() -> None:
    model, ema = started()
    ema.float()
    shown = {name: tensor.clone() for name, tensor in ema.module.state_dict().items()}
    ema.decay = 1.0
    ema.update(model)
    assert {name: raw(tensor) for name, tensor in ema.module.state_dict().items()} == {
        name: raw(shown[name]) if tensor.is_floating_point() else raw(tensor)
        for name, tensor in ema.module.state_dict().items()
    }
    assert ema.module[0].weight.dtype == torch.float32  # type: ignore[index]


def test_a_rebuilt_plan_and_a_copy_keep_the_unrounded_average() -> None:
    model = small_model(torch.bfloat16)
    ema, other, copied = (ModelEmaV3(model, 0.999) for _ in range(3))
    with torch.no_grad():
        model[0].weight.mul_(1.5)  # type: ignore[operator]
    for step in range(20):
        ema.update(model)
        other.update(copy.deepcopy(model))  # another model each time
        copied.update(model)
        copied = copy.deepcopy(copied) if step % 2 else pickle.loads(pickle.dumps(copied))
    ema.update(model)
    copied.update(model)
    other.update(model)
    expected = {name: raw(average) for name, average in exact_values(ema).items()}
    for each in (other, copied):
        assert {name: raw(average) for name, average in exact_values(each).items()} == expected


def test_copies_hold_the_average_and_not_the_model() -> None:
    model = small_model()
    ema = ModelEmaV3(model, 0.5)
    train(model)
    ema.update(model)
    for copied in (copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))):
        other = copied(ema)
        assert other._external is None
        assert bits(other.module) == bits(ema.module)
        before = bits(ema.module)
        train(model)
        other.update(model)
        assert bits(ema.module) == before, "they share memory"
        ema.update(model)
        assert bits(other.module) == bits(ema.module)


def test_a_model_of_another_structure_is_refused() -> None:
    ema = ModelEmaV3(small_model(), 0.5)
    before = bits(ema.module)
    with pytest.raises(ValueError, match=r"not built like the averaged one: it has 2 .* the average has 9"):
        ema.update(nn.Linear(3, 2))
    other = small_model()
    other[0] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(5, 4\), expected \(5, 3\)"):
        ema.update(other)
    assert bits(ema.module) == before


def test_examples() -> None:
    result = doctest.testmod(fastema.integrations.timm, extraglobs={"torch": torch})
    assert result.attempted >= 5
    assert result.failed == 0

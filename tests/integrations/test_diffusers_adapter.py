"""`fastema.integrations.diffusers.EMAModel` against diffusers' own, on the same random run."""

from __future__ import annotations

import copy
import doctest
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastema.integrations.diffusers
from cases import bits, move, raw, small_model, train, values
from fastema import FastEMA, SwapError
from fastema.integrations.diffusers import EMAModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def original() -> Any:
    """Return diffusers' class."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.training_utils import EMAModel as Original

    return Original


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "warm-up": {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75},
    "least decay": {"min_decay": 0.6},
    "start later": {"update_after_step": 7},
    "no warm-up": {"decay": 0.9, "min_decay": 0.9},
}


def a_list(seed: int = 0) -> list[nn.Parameter]:
    """Return parameters of many layouts; the last but one needs no gradient."""
    shapes = [(33, 17), (1,), (), (5, 3, 3, 3), (0, 4), (257,), (16,)]
    parameters = [nn.Parameter(values(*shape, seed=seed + at)) for at, shape in enumerate(shapes)]
    parameters.append(nn.Parameter(values(9, 4, seed=seed).t()))
    parameters[-2].requires_grad_(False)
    return parameters


def of(ema: Any) -> list[bytes]:
    return [raw(average) for average in ema.shadow_params]


def largest(tensors: Iterable[Tensor]) -> list[float]:
    return [tensor.abs().max().item() if tensor.numel() else 0.0 for tensor in tensors]


def furthest(first: Any, second: Any, scales: list[float]) -> float:
    """Return how far they differ, in units of the last place of the largest values that the averages went through."""
    differences = largest(mine - other for mine, other in zip(first.shadow_params, second.shadow_params, strict=True))
    eps = torch.finfo(torch.float32).eps
    return max(difference / (eps * scale) for difference, scale in zip(differences, scales, strict=True) if scale)


# ---- held to the original ----


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_numbers_over_a_run(original: Any, options: dict[str, Any], foreach: bool) -> None:
    parameters = a_list()
    theirs, ours = (kind(parameters, foreach=foreach, **options) for kind in (original, EMAModel))
    start, scales = of(ours), largest(parameters)
    assert start == of(theirs)
    for step in range(80):
        move(parameters, seed=step)
        scales = list(map(max, scales, largest(parameters)))
        theirs.step(parameters)
        ours.step(iter(parameters))
        assert ours.cur_decay_value == theirs.cur_decay_value
        assert ours.optimization_step == theirs.optimization_step
        assert furthest(ours, theirs, scales) < 4, f"step {step}"
        if ours.cur_decay_value == 0:
            assert of(ours) == [raw(parameter) for parameter in parameters]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert of(ours) != start
    assert raw(ours.shadow_params[-2]) == raw(theirs.shadow_params[-2]) == raw(parameters[-2]), "needs no gradient"


def test_the_same_bits_as_foreach_once_warmed_up(original: Any) -> None:
    """Ours is computed from the live end, if 1 - decay is 0.5 or more."""
    parameters = a_list()
    theirs, ours = original(parameters, foreach=True), EMAModel(parameters, foreach=True)
    ours.optimization_step = theirs.optimization_step = 9
    for step in range(1000):
        move(parameters, seed=step)
        theirs.step(parameters)
        ours.step(parameters)
        assert ours.cur_decay_value > 0.5
        assert of(ours) == of(theirs), f"step {step}"


def test_the_decay_is_the_same(original: Any) -> None:
    parameters = a_list()
    for options in OPTIONS.values():
        theirs, ours = original(parameters, **options), EMAModel(parameters, **options)
        assert [ours.get_decay(step) for step in range(40)] == [theirs.get_decay(step) for step in range(40)]


def test_the_constructor_takes_the_same_arguments(original: Any) -> None:
    theirs, ours = (inspect.signature(each.__init__).parameters for each in (original, EMAModel))
    assert {name: (each.kind, each.default) for name, each in ours.items()} == {
        name: (each.kind, each.default) for name, each in theirs.items()
    }
    public = {name for name in vars(original) if not name.startswith("_")}
    assert public <= {name for name in dir(EMAModel) if not name.startswith("_")}


def test_states_go_both_ways(original: Any) -> None:
    parameters = a_list()
    theirs, ours = original(parameters, decay=0.9, foreach=True), EMAModel(parameters)
    theirs.optimization_step = 100
    for step in range(3):
        move(parameters, seed=step)
        theirs.step(parameters)
    ours.load_state_dict(theirs.state_dict())
    assert (ours.decay, ours.optimization_step) == (0.9, 103)
    back = original(parameters, foreach=True)
    back.load_state_dict(ours.state_dict())
    for step in range(3):
        move(parameters, seed=9 + step)
        for ema in (theirs, ours, back):
            ema.step(parameters)
    assert of(ours) == of(theirs) == of(back)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert of(back) == of(ours)


@pytest.mark.parametrize(
    "state",
    [
        {"decay": 1.5},
        {"min_decay": 1},
        {"optimization_step": 1.0},
        {"update_after_step": "3"},
        {"use_ema_warmup": 1},
        {"inv_gamma": None},
        {"power": "2/3"},
        {"shadow_params": (torch.ones(1),)},
        {"shadow_params": [1.0]},
    ],
    ids=str,
)
def test_bad_states_are_refused_in_the_same_words(original: Any, state: dict[str, Any]) -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    theirs, ours = original(parameters), EMAModel(parameters)
    with pytest.raises(ValueError) as expected:
        theirs.load_state_dict(state)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError) as got:
        ours.load_state_dict({"optimization_step": 7, **state})
    assert str(got.value) == str(expected.value)
    assert ours.state_dict() == before, "something was changed"


def test_store_copy_to_and_restore(original: Any) -> None:
    parameters, twins = a_list(), a_list()
    theirs, ours = original(twins, decay=0.5), EMAModel(parameters, decay=0.5)
    for step in range(3):
        for ema, each in ((theirs, twins), (ours, parameters)):
            move(each, seed=step)
            ema.step(each)
    trained, average, scales = [raw(each) for each in parameters], of(ours), largest(parameters)
    with pytest.raises(RuntimeError, match=r"no `store\(\)`ed weights"):
        ours.restore(parameters)
    ours.store(parameters)
    ours.copy_to(parameters)
    assert [raw(each) for each in parameters] == average == of(ours)
    move(parameters, seed=5)
    assert of(ours) == average, "the average shares memory with the weights"
    ours.restore(parameters)
    assert [raw(each) for each in parameters] == trained
    assert ours.temp_stored_params is None
    for ema, each in ((theirs, twins), (ours, parameters)):
        move(each, seed=7)
        ema.step(each)
    assert furthest(ours, theirs, scales) < 4


def test_store_and_restore_leave_a_recorded_graph_valid() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    ema = EMAModel([weight])
    loss = weight.square().sum()
    ema.store([weight])
    ema.copy_to([weight])
    ema.restore([weight])
    loss.backward()
    assert weight.grad is not None and weight.grad.item() == 6.0


def test_the_usual_script() -> None:
    """The average starts from one model, and steps with another: in diffusers' examples they are loaded twice."""
    start, model = small_model(), small_model()
    ema = EMAModel(start.parameters(), decay=0.5, min_decay=0.5)
    del start
    ema.to(torch.device("cpu"))
    expected = FastEMA(model, 0.5, decay_type="constant", buffers="skip")
    for step in range(4):
        train(model, seed=step)
        ema.step(model.parameters())
        expected.update(found_inf=None) if step else expected.load_state_dict(
            {"step": 0, "num_updates": 0, "shadow": {name: each.detach() for name, each in model.named_parameters()}}
        )
    shadow = expected.shadow_state_dict()
    assert of(ema) == [raw(shadow[name]) for name, _ in model.named_parameters()]


def test_parameters_that_come_to_need_a_gradient(original: Any) -> None:
    parameters = a_list()
    theirs, ours = (kind(parameters, foreach=True, min_decay=0.75, decay=0.75) for kind in (original, EMAModel))
    ours.optimization_step = theirs.optimization_step = 50
    for frozen in ([6], [], [0, 6], list(range(len(parameters))), [3]):
        for at, parameter in enumerate(parameters):
            parameter.requires_grad_(at not in frozen)
        theirs.foreach = len(frozen) < len(parameters)  # its foreach raises where nothing needs a gradient
        for step in range(2):
            move(parameters, seed=step)
            theirs.step(parameters)
            ours.step(parameters)
        assert of(ours) == of(theirs), f"frozen: {frozen}"


def test_a_parameter_given_twice_is_averaged_once_in_both_places(original: Any) -> None:
    first, second = a_list()[:2]
    parameters = [first, second, first]
    theirs, ours = (kind(parameters, foreach=True, min_decay=0.75) for kind in (original, EMAModel))
    ours.optimization_step = theirs.optimization_step = 50
    for step in range(3):
        move(parameters, seed=step)
        theirs.step(parameters)
        ours.step(parameters)
    assert of(ours) == of(theirs)
    assert of(ours)[0] == of(ours)[2]


# ---- what the plan must notice ----


def test_the_plan_is_kept_while_nothing_changes() -> None:
    model = small_model()
    ema = EMAModel(model.parameters(), decay=0.5)
    ema.step(model.parameters())
    bound, averages = ema._external, list(ema.shadow_params)
    for _ in range(3):
        train(model)
        ema.step(model.parameters())
        ema.step()
    assert ema._external is bound is not None
    assert all(now is before for now, before in zip(ema.shadow_params, averages, strict=True))


def test_averages_and_weights_that_were_replaced() -> None:
    model = small_model()
    ema = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    ema.step(model.parameters())
    expected = [average.double() for average in ema.shadow_params]

    def replace_the_list() -> None:
        ema.shadow_params = [average.clone() for average in ema.shadow_params]

    def replace_one() -> None:
        ema.shadow_params[0] = ema.shadow_params[0].clone()

    def move_the_weights() -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    def other_parameters() -> None:
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())

    for change in (lambda: None, replace_the_list, replace_one, move_the_weights, other_parameters):
        change()
        train(model)
        ema.step(model.parameters())
        expected = [
            torch.lerp(old, live.detach().double(), 0.5) for old, live in zip(expected, model.parameters(), strict=True)
        ]
        for average, wanted in zip(ema.shadow_params, expected, strict=True):
            torch.testing.assert_close(average.double(), wanted, rtol=1e-6, atol=1e-6)


def test_to_converts_and_the_average_goes_on_in_it() -> None:
    parameters = a_list()
    ema = EMAModel(parameters, decay=0.5, min_decay=0.5)
    ema.step(parameters)
    ema.to(dtype=torch.float64)
    before = ema.shadow_params[0].clone()
    move(parameters, seed=1)
    ema.step(parameters)
    assert ema.shadow_params[0].dtype == torch.float64
    assert raw(ema.shadow_params[0]) == raw(torch.lerp(before, parameters[0].detach().double(), 0.5))


def test_sixteen_bits_are_averaged_in_float32() -> None:
    parameters = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    ema = EMAModel(parameters, decay=0.999, min_decay=0.999)
    assert ema.shadow_params[0].dtype == torch.float32
    ema.step(parameters)
    with torch.no_grad():
        parameters[0].fill_(2.0)
    ema.step(parameters)
    torch.testing.assert_close(ema.shadow_params[0], torch.full((4,), 1.001))
    ema.load_state_dict({"shadow_params": [torch.ones(4, dtype=torch.bfloat16)]})  # as diffusers has it
    ema.step(parameters)
    torch.testing.assert_close(ema.shadow_params[0], torch.full((4,), 1.001))
    ema.copy_to(parameters)
    assert parameters[0].tolist() == [1.0] * 4


def test_other_parameters_than_the_averages_are_refused() -> None:
    parameters = a_list()
    ema = EMAModel(parameters)
    with pytest.raises(ValueError, match="got 3 parameters, the average has 8"):
        ema.step(parameters[:3])
    with pytest.raises(ValueError, match=r"'parameter 0' has shape \(\), expected \(33, 17\)"):
        ema.step([parameters[2], *parameters[1:]])
    with pytest.raises(ValueError, match="pass them"):
        EMAModel(parameters).step()
    parameters[3].ds_id = 7  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="ZeRO-3"):
        ema.step(parameters)
    assert ema.optimization_step == 0


# ---- swapped() ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_moves_no_weights_and_puts_them_back(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    ema = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    for step in range(3):
        train(model, seed=step)
        ema.step(model.parameters())
    live, average, state = bits(model), of(ema), copy.deepcopy(ema.state_dict())
    with ema.swapped(model.parameters()):
        inside = [raw(parameter) for parameter in model.parameters()]
        assert inside == [raw(each.to(dtype)) for each in state["shadow_params"]]
        assert of(ema) == average, "state_dict() must be right inside, too"
        for refused in (ema.step, ema.copy_to, ema.to, ema.pin_memory, lambda: ema.load_state_dict({})):
            with pytest.raises(RuntimeError, match="while the averages are swapped in"):
                refused()  # type: ignore[operator]
        with pytest.raises(RuntimeError, match="while the averages are swapped in"), ema.swapped():
            pass
    assert bits(model) == live
    assert of(ema) == average
    train(model)
    ema.step(model.parameters())
    assert of(ema) != average


def test_swapped_restores_after_an_exception() -> None:
    model = small_model()
    ema = EMAModel(model.parameters(), decay=0.5)
    live = bits(model)
    train(model)
    trained = bits(model)
    assert trained != live
    with pytest.raises(ZeroDivisionError), ema.swapped(model.parameters()):
        assert bits(model) != trained
        raise ZeroDivisionError
    assert bits(model) == trained


def test_restore_ends_a_swap_that_a_swap_error_left_open() -> None:
    parameters = a_list()
    ema = EMAModel(parameters, decay=0.5)
    move(parameters, seed=1)
    trained, average, shape = [raw(each) for each in parameters], of(ema), parameters[0].shape
    with pytest.raises(SwapError, match=r"undo the change and call restore\(\)"), ema.swapped(parameters):
        parameters[0].data = parameters[0].data.flatten()
    with pytest.raises(RuntimeError, match=r"call restore\(\)"):
        ema.step(parameters)
    parameters[0].data = parameters[0].data.view(shape)
    ema.restore()
    assert [raw(each) for each in parameters] == trained
    assert of(ema) == average
    ema.step(parameters)


# ---- copies, files, deprecated arguments ----


def test_copies_hold_the_averages_and_not_the_model() -> None:
    parameters = a_list()
    ema = EMAModel(parameters, decay=0.5)
    for _ in range(2):
        move(parameters, seed=1)
        ema.step(parameters)
    for copied in (copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))):
        other = copied(ema)
        assert other._external is None and not other._lives
        assert of(other) == of(ema)
        before = of(ema)
        move(parameters, seed=2)
        other.step(parameters)
        assert of(ema) == before, "they share memory"
        ema.step(parameters)
        assert of(other) == of(ema)


def test_saved_models_go_both_ways(original: Any, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=4,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    more = {"model_cls": UNet2DModel, "model_config": model.config}
    theirs, ours = (kind(model.parameters(), foreach=True, min_decay=0.75, **more) for kind in (original, EMAModel))
    for ema in (theirs, ours):
        ema.optimization_step = 50
    move(model.parameters(), seed=1)
    for name, ema in (("theirs", theirs), ("ours", ours)):
        ema.step(model.parameters())
        ema.save_pretrained(tmp_path / name)
    assert of(ours) == of(theirs)
    for kind, folder in ((original, "ours"), (EMAModel, "theirs"), (EMAModel, "ours")):
        loaded = kind.from_pretrained(tmp_path / folder, UNet2DModel)
        assert of(loaded) == of(ours)
        assert (loaded.optimization_step, loaded.min_decay) == (51, 0.75)
    with pytest.raises(ValueError, match="`model_cls` was defined"):
        EMAModel(model.parameters()).save_pretrained(tmp_path)


def test_deprecated_arguments(original: Any) -> None:
    model = small_model()
    for kind in (original, EMAModel):
        with pytest.warns(FutureWarning, match="deprecated"):
            ema = kind(model, max_value=0.5, min_value=0.25, device="cpu")
        assert (ema.decay, ema.min_decay, ema.use_ema_warmup) == (0.5, 0.25, True)
        assert len(ema.shadow_params) == 6
        with pytest.warns(FutureWarning, match="deprecated"):
            ema.step(model)
        assert ema.optimization_step == 1
    with pytest.raises(TypeError, match="does not take the arguments: decai"):
        EMAModel(model.parameters(), decai=0.9)


def test_shadow_params_stay_tied_from_before_the_first_step() -> None:
    parameters = [torch.ones(3, requires_grad=True), torch.ones(2, dtype=torch.bfloat16, requires_grad=True)]
    ema = EMAModel(parameters, decay=0.5, min_decay=0.5)
    state, (held, wide) = ema.state_dict()["shadow_params"], ema.shadow_params
    for value in (3.0, 5.0):
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(value)
        ema.step(parameters)
        with ema.swapped():
            assert state[0] is held and torch.equal(held, ema.state_dict()["shadow_params"][0])
    assert held.tolist() == [4.0] * 3 and wide.tolist() == [4.0] * 2  # the first step copies
    assert state is ema.shadow_params and state[0] is held
    assert parameters[0].tolist() == [5.0] * 3


def test_an_inference_tensor_is_no_average() -> None:
    """Averages built under inference_mode are updated outside of it."""
    parameters = a_list()
    with torch.inference_mode():
        ema = EMAModel(parameters, decay=0.5)
    move(parameters, seed=1)
    ema.step(parameters)
    assert of(ema) == [raw(parameter) for parameter in parameters]


def test_neither_framework_is_imported() -> None:
    code = (
        "import sys, fastema.integrations.timm, fastema.integrations.diffusers\n"
        "print(sorted({'timm', 'diffusers', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_examples() -> None:
    result = doctest.testmod(fastema.integrations.diffusers, extraglobs={"torch": torch})
    assert result.attempted >= 4
    assert result.failed == 0


def test_tensors_that_are_no_parameters() -> None:
    weight: Tensor = torch.ones(3)
    ema = EMAModel([weight], min_decay=0.5, decay=0.5)
    weight.fill_(3.0)
    ema.step([weight])
    assert ema.shadow_params[0].tolist() == [3.0] * 3
    weight.fill_(5.0)
    ema.step([weight])
    assert ema.shadow_params[0].tolist() == [5.0] * 3, "a tensor that needs no gradient is copied"


def test_other_parameters_in_the_model_at_the_end_of_a_swap_are_an_error() -> None:
    """As torchao's quantize_ leaves them: the averages are of tensors, and the model keeps what was put into it."""
    model = nn.Linear(3, 2)
    ema = EMAModel(model.parameters(), decay=0.9, min_decay=0.9)
    for _ in range(2):
        ema.step(model.parameters())
        with torch.no_grad():
            model.weight.add_(1.0)
    trained, weight = model.weight.detach().clone(), model.weight
    with pytest.raises(SwapError, match="the Linear has other parameters than") as caught, ema.swapped():
        model.weight = nn.Parameter(model.weight.detach().clone())
    assert torch.equal(caught.value.live["0"], trained)
    assert torch.equal(weight, trained), "the averaged tensors themselves have their trained values again"
    with ema.swapped(list(model.parameters())):
        model.weight = weight
    with pytest.raises(ZeroDivisionError), ema.swapped():
        raise ZeroDivisionError
    copy.deepcopy(ema).step(model.parameters())

"""FastEMA's own behaviour: counters, options, attach, copies of itself, and models that change under it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import bits, raw, small_model, tensors_of, train, values
from cases.reference import ReferenceEMA
from fastema import FastEMA

pytestmark = pytest.mark.usefixtures("one_thread")


def averages(ema: FastEMA) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in ema.state_dict()["shadow"].items()}


def one(value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value]))


def add(parameter: Tensor, amount: float) -> None:
    with torch.no_grad():
        parameter.add_(amount)


def value_of(ema: FastEMA, name: str = "w") -> float:
    return ema.state_dict()["shadow"][name].item()


# ---- counting ----


def test_the_first_update_is_an_ordinary_one(backend: str) -> None:
    weight = one()
    ema = FastEMA([("w", weight)], decay=0.75, decay_type="constant", backend=backend)
    add(weight, 1.0)
    ema.update()
    assert value_of(ema) == 0.25


def test_counters(backend: str) -> None:
    ema = FastEMA([("w", one())], backend=backend)
    assert ema.num_updates == 0
    for count in (1, 2, 3):
        ema.update()
        assert ema.num_updates == count
        assert ema.state_dict()["step"] == count


def test_a_step_that_is_given_sets_the_position_in_the_schedule(backend: str) -> None:
    weight = one()
    ema = FastEMA([("w", weight)], decay=0.9, decay_type="linear", total_steps=10, backend=backend)
    add(weight, 1.0)
    ema.update(step=5)  # decay 0.45
    assert value_of(ema) == pytest.approx(0.55)
    assert ema.state_dict()["step"] == 5
    ema.update()  # step 6: decay 0.54
    assert value_of(ema) == pytest.approx(0.55 * 0.54 + 0.46)
    assert ema.num_updates == 2


def test_update_every(backend: str) -> None:
    weight = one()
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", update_every=3, backend=backend)
    seen = []
    for _ in range(7):
        add(weight, 1.0)
        ema.update()
        seen.append(value_of(ema))
    assert seen == [0.0, 0.0, 1.5, 1.5, 1.5, 3.75, 3.75]
    assert ema.num_updates == 2
    assert ema.state_dict()["step"] == 7


def test_update_after_step(backend: str) -> None:
    weight = one()
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", update_after_step=2, backend=backend)
    seen = []
    for _ in range(4):
        add(weight, 1.0)
        ema.update()
        seen.append(value_of(ema))
    assert seen == [1.0, 2.0, 2.5, 3.25], "up to the step it follows exactly, then it averages"
    assert [ema.decay_at(step) for step in (1, 2, 3)] == [0.0, 0.0, 0.5]


def test_found_inf_skips_the_step_and_the_count(backend: str) -> None:
    weight = one()
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", backend=backend)
    add(weight, 1.0)
    ema.update(found_inf=torch.tensor(1.0))
    assert value_of(ema) == 0.0
    assert ema.num_updates == 0
    ema.update(found_inf=torch.tensor(0.0))
    assert value_of(ema) == 0.5
    assert ema.num_updates == 1


def test_decay_0_follows_and_decay_1_stays(backend: str) -> None:
    first, last = small_model(), small_model()
    follow, stay = (
        FastEMA(first, decay=0.0, decay_type="constant", backend=backend),
        FastEMA(last, decay=1.0, decay_type="constant", backend=backend, buffers="average"),
    )
    before = averages(stay)
    for seed in (1, 2):
        train(first, seed)
        train(last, seed)
        follow.update()
        stay.update()
    assert averages(follow) == bits(first)
    after = averages(stay)
    assert {n: b for n, b in after.items() if "num_batches" not in n} == {
        n: b for n, b in before.items() if "num_batches" not in n
    }


# ---- numbers ----


def test_window_and_lag() -> None:
    ema = FastEMA([("w", one())], decay=0.999, decay_type="constant")
    assert ema.window() == pytest.approx(1000.0)
    assert ema.lag(updates_per_epoch=250) == pytest.approx(4.0)
    assert FastEMA([("w", one())], decay=0.0, decay_type="constant").window() == 1.0
    assert FastEMA([("w", one())], decay=1.0, decay_type="constant").window() == float("inf")


def test_from_params() -> None:
    parameters = {"decay": 0.9999, "decay_type": "exp", "beta": 10}
    ema = FastEMA.from_params(small_model(), parameters, total_steps=100)
    plain = FastEMA(small_model(), 0.9999, decay_type="exp", total_steps=100, beta=10)
    assert [ema.decay_at(step) for step in range(1, 101)] == [plain.decay_at(step) for step in range(1, 101)]
    assert ema.decay == 0.9999
    assert parameters == {"decay": 0.9999, "decay_type": "exp", "beta": 10}


@pytest.mark.parametrize(
    ("recipe", "decay_type"),
    [
        ({"decay": 0.9997, "decay_type": "threshold", "beta": 15}, "threshold"),
        ({"decay": 0.9997, "decay_type": "constant", "beta": 15, "exp_activation": True}, "constant"),
        ({"decay": 0.9997, "exp_activation": False, "beta": 15}, "constant"),
        ({"decay": 0.9997, "exp_activation": True}, "exp"),
        ({"decay": None, "decay_type": None, "beta": 10}, "exp"),
        ({}, "exp"),
    ],
)
def test_recipes_of_super_gradients_load(recipe: dict[str, Any], decay_type: str) -> None:
    ema = FastEMA.from_params(small_model(), recipe, total_steps=100)
    assert ema.decay == recipe.get("decay") or ema.decay == 0.9999
    beta = {"beta": recipe.get("beta", 15)} if decay_type == "exp" else {}
    plain = FastEMA(small_model(), ema.decay, decay_type=decay_type, total_steps=100, **beta)
    assert [ema.decay_at(step) for step in (1, 10, 50)] == [plain.decay_at(step) for step in (1, 10, 50)]


def test_repr_says_what_it_is(backend: str) -> None:
    ema = FastEMA(small_model(), decay=0.99, decay_type="threshold", backend=backend)
    ema.update()
    for part in ("FastEMA(", "0.99", "threshold", "num_updates=1", backend):
        assert part in repr(ema)


def test_synchronize_has_nothing_to_wait_for(backend: str) -> None:
    FastEMA(small_model(), backend=backend).synchronize()


def test_backend_name(backend: str) -> None:
    assert FastEMA(small_model(), backend=backend).backend_name == backend


# ---- what is averaged, copied, skipped ----


class Buffers(nn.Module):
    """Every kind of buffer; `mask` is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("mask", torch.zeros(2), persistent=False)


@pytest.mark.parametrize(
    ("buffers", "statistics", "others"),
    [("auto", 0.5, 1.0), ("average", 0.5, 0.5), ("copy", 1.0, 1.0), ("skip", None, None)],
)
def test_buffers(backend: str, buffers: Any, statistics: float | None, others: float | None) -> None:
    """Every float goes from 0 to 1: averaged is 0.5, copied is 1."""
    model = Buffers()
    floats = [t for t in tensors_of(model) if t.is_floating_point()]
    with torch.no_grad():
        for tensor in floats:
            tensor.zero_()
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend, buffers=buffers)
    with torch.no_grad():
        for tensor in floats:
            tensor.fill_(1)
        model.steps.fill_(7)
        model.flag.fill_(True)
    ema.update()
    shadow = ema.shadow_state_dict()
    with ema.swapped():
        applied = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert applied["weight"].tolist() == [0.5] * 3
    for name in ("norm.running_mean", "norm.running_var"):
        assert applied[name].tolist() == [1.0 if statistics is None else statistics] * 3
    assert applied["table"].tolist() == [1.0 if others is None else others] * 3
    assert applied["mask"].tolist() == [1.0 if others is None else others] * 2
    assert applied["steps"].item() == 7
    assert applied["flag"].item() is True
    assert all(torch.equal(shadow[name], applied[name]) for name in shadow)
    assert "mask" not in shadow
    saved = ema.state_dict()["shadow"]
    if buffers == "skip":
        assert set(saved) == {name for name, _ in model.named_parameters()}
    else:
        assert ("mask" in saved) == (buffers == "average"), "a copy of what the model does not save is not saved"


def test_policy_decides_and_sees_name_tensor_and_module(backend: str) -> None:
    model = small_model()
    seen: dict[str, tuple[Tensor, nn.Module | None]] = {}

    def policy(name: str, tensor: Tensor, module: nn.Module | None) -> Any:
        seen[name] = (tensor, module)
        return {"0.weight": "copy", "0.bias": "skip", "1.running_mean": "copy", "1.num_batches_tracked": "skip"}.get(
            name
        )

    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend, policy=policy)
    assert seen["0.weight"] == (model[0].weight, model[0])
    assert seen["1.running_mean"][1] is model[1]
    assert set(seen) == set(bits(model))
    before = copy.deepcopy(ema.state_dict()["shadow"])
    train(model)
    ema.update()
    shadow = ema.state_dict()["shadow"]
    assert "0.bias" not in shadow
    assert "1.num_batches_tracked" not in shadow
    assert torch.equal(shadow["0.weight"], model[0].weight)
    assert torch.equal(shadow["1.running_mean"], model[1].running_mean)
    assert torch.equal(shadow["3.bias"], torch.lerp(before["3.bias"], model[3].bias.detach(), 0.5))


def test_a_policy_gets_no_module_for_named_tensors(backend: str) -> None:
    seen = []
    FastEMA([("w", one())], backend=backend, policy=lambda *arguments: seen.append(arguments[2]))
    assert seen == [None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_the_shadow(backend: str, dtype: torch.dtype) -> None:
    model = small_model()
    ema = FastEMA(model, decay=0.9, decay_type="constant", dtype=dtype, backend=backend)
    shadow = ema.state_dict()["shadow"]
    names = [name for name in shadow if "num_batches" not in name]
    assert {shadow[name].dtype for name in names} == {dtype}
    live = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    reference = ReferenceEMA({n: t.to(dtype) for n, t in live.items()}, dict.fromkeys(names, dtype))
    for seed in range(5):
        train(model, seed)
        ema.update()
        reference.update(live, 0.9)
    reference.check(shadow)
    for tensor in ema.shadow_state_dict().values():
        assert tensor.dtype in (dtype, torch.int64)


def test_device_cpu_is_where_it_is(backend: str) -> None:
    for device in ("cpu", torch.device("cpu"), None):
        ema = FastEMA(small_model(), device=device, backend=backend)
        assert ema.state_dict()["shadow"]["0.weight"].device.type == "cpu"
        assert ema.backend_name == backend


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_is_nobodys_business(backend: str, device: str) -> None:
    model = small_model()
    with torch.device(device):
        ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
        train_values = [torch.ones(tensor.shape, device="cpu") for tensor in model.parameters()]
        with torch.no_grad():
            for parameter, ones in zip(model.parameters(), train_values, strict=True):
                parameter.copy_(ones)
        ema.update()
        live = bits(model)
        with ema.swapped():
            assert bits(model) != live
    assert bits(model) == live


# ---- numbers that are not finite ----


def test_nonfinite_skip_counts_and_warns_once(backend: str) -> None:
    model = nn.Linear(3, 2)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    before = copy.deepcopy(ema.state_dict()["shadow"])
    assert ema.nonfinite_count() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.update()
        with ema.swapped():
            pass
    with torch.no_grad():
        model.weight[0, 0], model.weight[1, 1], model.bias[0] = float("nan"), float("inf"), float("-inf")
    ema.update()
    ema.update()
    assert ema.nonfinite_count() == 6
    with pytest.warns(UserWarning, match="6 elements kept their average so far because the live weight was NaN"):
        shadow = ema.state_dict()["shadow"]
    assert all(tensor.isfinite().all() for tensor in shadow.values())
    assert shadow["weight"][0, 0] == before["weight"][0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        ema.update()
        ema.state_dict()
        ema.apply_shadow()
        ema.restore()
    assert ema.nonfinite_count() == 9
    with torch.no_grad():
        model.weight.fill_(1)
        model.bias.fill_(1)
    for _ in range(60):
        ema.update()
    assert torch.equal(shadow["weight"], torch.ones(2, 3)), "the average recovers when the weights do"


def test_the_swap_warns_too(backend: str) -> None:
    weight = one(float("inf"))
    ema = FastEMA([("w", weight)], backend=backend)
    ema.update()
    with pytest.warns(UserWarning, match="1 elements kept their average"):
        ema.apply_shadow()
    ema.restore()


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", BAD)
def test_a_loaded_average_that_is_not_finite_takes_the_live_value_and_is_said(
    backend: str, bad: float, dtype: torch.dtype
) -> None:
    model = nn.Linear(4, 2).to(dtype)
    ema = FastEMA(model, decay=0.9, decay_type="constant", backend=backend)
    state = copy.deepcopy(ema.state_dict())
    state["shadow"]["weight"][0, 0] = bad
    ema.load_state_dict(state)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    average = ema.shadow_state_dict()["weight"]
    assert average[0, 0] == model.weight[0, 0] and average[0, 1] != model.weight[0, 1]
    assert ema.nonfinite_count() == 1
    with pytest.warns(UserWarning, match="1 elements .* or took the live weight because the average was"):
        ema.apply_shadow()
    ema.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.update()
        ema.state_dict()
    assert ema.nonfinite_count() == 1


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"update_after_step": 3},
        {"decay": 0.0, "decay_type": "constant"},
        *({"decay_type": name} for name in ("warmup", "debiased")),
        {"decay_type": "power", "sigma_rel": 0.1},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
@pytest.mark.filterwarnings("ignore:.*took the live weight because the average was")
def test_an_average_built_before_the_weights_were_initialised_is_what_the_first_copy_makes_it(
    backend: str, arguments: dict[str, Any], nonfinite: Any
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(4, 2, dtype=dtype)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([*BAD, -0.0] * 2).view(2, 4))
        ema = FastEMA(model, **{"decay": 0.9, **arguments}, nonfinite=nonfinite, backend=backend)
        nn.init.normal_(model.weight)
        with torch.no_grad():
            model.weight[0, 0] = -0.0
        ema.update()
        with ema.swapped():
            applied = bits(model)
        assert applied == bits(model)


def test_nonfinite_propagate(backend: str) -> None:
    weight = one()
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", nonfinite="propagate", backend=backend)
    add(weight, float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.update()
        assert ema.state_dict()["shadow"]["w"].isnan().all()
    assert ema.nonfinite_count() == 0


def test_the_count_survives_a_rebuild_and_a_copy(backend: str) -> None:
    model = nn.Linear(2, 2)
    ema = FastEMA(model, backend=backend)
    with torch.no_grad():
        model.bias.fill_(float("nan"))
    ema.update()
    model.weight.data = model.weight.data.clone()
    ema.update()
    assert ema.nonfinite_count() == 4
    assert copy.deepcopy(ema).nonfinite_count() == 4


# ---- attach ----


def test_attach_updates_after_every_step_until_removed(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached, called = (
        FastEMA(model, decay=0.9, decay_type="constant", backend=backend),
        FastEMA(model, decay=0.9, decay_type="constant", backend=backend),
    )
    handle = attached.attach(optimizer)
    for step in range(4):
        model(values(5, 3, seed=step)).square().mean().backward()
        optimizer.step()
        called.update()
        assert averages(attached) == averages(called), "it must see the weights after the step"
    handle.remove()
    optimizer.step()
    assert attached.num_updates == 4


def test_attach_counts_a_closure_once(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    ema = FastEMA(model, backend=backend)
    ema.attach(optimizer)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = model(values(5, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert calls > 1
    assert ema.num_updates == 1


def test_attach_does_not_count_a_step_that_raised(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = FastEMA(model, backend=backend)
    ema.attach(optimizer)

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert ema.num_updates == 0


def test_attach_refuses_a_step_while_applied(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = FastEMA(model, backend=backend)
    ema.attach(optimizer)
    model(values(5, 3)).sum().backward()
    live, average = bits(model), averages(ema)
    with ema.swapped():
        with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) while the EMA weights are applied"):
            optimizer.step()
        assert bits(model) == average, "the optimizer stepped in the average"
    assert bits(model) == live
    optimizer.step()
    assert ema.num_updates == 1


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_attach_does_not_count_a_step_that_the_gradient_scaler_skipped(backend: str, fused: bool) -> None:
    """The scaler leaves step() of a plain optimizer out; a fused one it calls, with found_inf as an attribute."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    ema.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, False, True):
        updates, average, live = ema.num_updates, averages(ema), bits(model)
        optimizer.zero_grad()
        scaler.scale(model(values(5, 3)).square().sum()).backward()
        if overflow:
            model.weight.grad[0, 0] = float("inf")  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        assert (bits(model) == live) == overflow
        assert ema.num_updates == updates + (not overflow)
        assert (averages(ema) == average) == overflow


# ---- copy_to ----


def test_copy_to_makes_the_average_the_model(backend: str) -> None:
    model = small_model()
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model)
    ema.update()
    train(model)
    average, addresses = averages(ema), [tensor.data_ptr() for tensor in tensors_of(model)]
    ema.copy_to()
    assert bits(model) == average
    assert [tensor.data_ptr() for tensor in tensors_of(model)] == addresses
    train(model)
    assert averages(ema) == average, "the model and the average share memory"


def test_copy_to_another_model(backend: str) -> None:
    model, other = small_model(), small_model(torch.float64, seed=5)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model)
    ema.update()
    live = bits(model)
    ema.copy_to(other)
    assert bits(model) == live
    for name, tensor in ema.state_dict()["shadow"].items():
        assert torch.equal(other.state_dict()[name], tensor.to(other.state_dict()[name].dtype))


def test_copy_to_named_tensors(backend: str) -> None:
    weight = one()
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", backend=backend)
    add(weight, 1.0)
    ema.update()
    ema.copy_to()
    assert weight.item() == 0.5


def test_copy_to_works_on_frozen_and_training_parameters(backend: str) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model)
    ema.copy_to()
    assert bits(model) == averages(ema)
    assert model.weight.is_leaf


# ---- copies of a FastEMA ----


def worked(backend: str) -> tuple[nn.Module, FastEMA]:
    model = small_model()
    ema = FastEMA(model, decay=0.9, decay_type="threshold", update_every=2, backend=backend)
    for seed in range(5):
        train(model, seed)
        ema.update()
    return model, ema


def goes_on_like(copied: FastEMA, its_model: nn.Module, ema: FastEMA, model: nn.Module) -> bool:
    for seed in (7, 8, 9):
        train(model, seed)
        train(its_model, seed)
        ema.update()
        copied.update()
    return averages(copied) == averages(ema) and copied.state_dict()["step"] == ema.state_dict()["step"]


def test_deepcopy_together_with_the_model(backend: str) -> None:
    model, ema = worked(backend)
    for order in ((model, ema), (ema, model)):
        copies = copy.deepcopy(order)
        copied_model = next(part for part in copies if isinstance(part, nn.Module))
        copied = next(part for part in copies if isinstance(part, FastEMA))
        assert averages(copied) == averages(ema)
        average = averages(ema)
        train(copied_model)
        copied.update()
        copied.update()
        assert averages(ema) == average, "the copy wrote into the original"
        with copied.swapped():
            assert bits(copied_model) == averages(copied)
    model, ema = worked(backend)
    copied_model, copied = copy.deepcopy((model, ema))
    assert goes_on_like(copied, copied_model, ema, model)


def test_deepcopy_alone_brings_its_own_model(backend: str) -> None:
    model, ema = worked(backend)
    copied = copy.deepcopy(ema)
    average, live = averages(ema), bits(model)
    assert averages(copied) == average
    assert copied.num_updates == ema.num_updates
    with copied.swapped():
        assert bits(model) == live, "the copy is applied to the original's model"
    train(model)
    for _ in range(4):
        copied.update()
    assert averages(ema) == average


def test_pickle_together_with_the_model(backend: str) -> None:
    model, ema = worked(backend)
    loaded_model, loaded = pickle.loads(pickle.dumps((model, ema)))
    assert goes_on_like(loaded, loaded_model, ema, model)


def test_a_pickle_of_0_2_0_loads(backend: str) -> None:
    model, ema = worked(backend)
    state = ema.__getstate__()
    del state["averaged"]  # the release has all but this
    state["config"]["_source"] = loaded_model = copy.deepcopy(model)
    loaded = FastEMA.__new__(FastEMA)
    loaded.__setstate__(state)
    assert goes_on_like(loaded, loaded_model, ema, model)


def test_torch_save_of_the_whole_object(backend: str) -> None:
    model, ema = worked(backend)
    file = io.BytesIO()
    torch.save({"model": model, "ema": ema}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert goes_on_like(loaded["ema"], loaded["model"], ema, model)


def test_a_copy_of_named_tensors(backend: str) -> None:
    weight = one()
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", backend=backend)
    add(weight, 1.0)
    ema.update()
    copied = copy.deepcopy(ema)
    copied.update()
    assert (value_of(copied), value_of(ema)) == (0.75, 0.5)


# ---- states ----


def test_state_goes_through_torch_save_with_weights_only(backend: str) -> None:
    _, ema = worked(backend)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin = FastEMA(small_model(seed=3), decay=0.9, decay_type="threshold", backend=backend)
    result = twin.load_state_dict(state)
    assert result.missing_keys == result.unexpected_keys == []
    assert averages(twin) == averages(ema)
    assert twin.num_updates == ema.num_updates


def test_load_state_dict_copies_values(backend: str) -> None:
    _, ema = worked(backend)
    state = ema.state_dict()
    twin_model = small_model(seed=3)
    twin = FastEMA(twin_model, decay=0.9, decay_type="threshold", backend=backend)
    twin.load_state_dict(state)
    average = averages(ema)
    train(twin_model)
    twin.update()
    assert averages(ema) == average


def test_load_state_dict_not_strict_takes_what_fits(backend: str) -> None:
    _, ema = worked(backend)
    state = ema.state_dict()
    shadow = dict(state["shadow"])
    del shadow["0.bias"]
    shadow["alien"] = torch.zeros(3)
    shadow["0.weight"] = shadow["0.weight"].double()
    twin = FastEMA(small_model(seed=3), decay=0.9, decay_type="threshold", backend=backend)
    before = twin.state_dict()["shadow"]["0.bias"].clone()
    result = twin.load_state_dict({**state, "shadow": shadow}, strict=False)
    assert result.missing_keys == ["0.bias"]
    assert result.unexpected_keys == ["alien"]
    got = twin.state_dict()["shadow"]
    assert torch.equal(got["0.bias"], before)
    assert torch.equal(got["0.weight"], state["shadow"]["0.weight"])


def test_load_state_dict_warns_about_another_decay(backend: str) -> None:
    _, ema = worked(backend)
    twin = FastEMA(small_model(), decay=0.5, decay_type="constant", backend=backend)
    with pytest.warns(UserWarning) as seen:
        twin.load_state_dict(ema.state_dict())
    text = " ".join(str(warning.message) for warning in seen)
    assert "decay=0.9" in text
    assert "decay_type='threshold'" in text
    assert twin.decay == 0.9, "the state keeps its own"
    assert [twin.decay_at(step) for step in (1, 500)] == [2 / 11, 0.9]


def test_shadow_state_dict_loads_into_the_model(backend: str) -> None:
    model, ema = worked(backend)
    model.register_module("tied", model[0])
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model)
    ema.update()
    state = ema.shadow_state_dict()
    assert list(state) == list(model.state_dict())
    twin = small_model(seed=9)
    twin.register_module("tied", twin[0])
    twin.load_state_dict(state)
    with ema.swapped():
        assert bits(twin) == bits(model)


def test_shadow_state_dict_of_named_tensors(backend: str) -> None:
    ema = FastEMA([("w", one(3.0)), ("i", torch.tensor([2]))], backend=backend)
    assert {name: tensor.tolist() for name, tensor in ema.shadow_state_dict().items()} == {"w": [3.0], "i": [2]}


class Extra(nn.Linear):
    """State that is not a tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


def test_shadow_state_dict_keeps_extra_state(backend: str) -> None:
    model = Extra(2, 2)
    state = FastEMA(model, backend=backend).shadow_state_dict()
    assert state["_extra_state"] == {"version": 3}
    model.load_state_dict(state)


# ---- models that change ----


def replaced_by_assign(model: nn.Sequential) -> None:
    model.load_state_dict({k: v.clone() + 1 for k, v in model.state_dict().items()}, assign=True)


def replaced_data(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() + 1


def replaced_memory_format(model: nn.Sequential) -> None:
    model.to(memory_format=torch.channels_last)


def replaced_module(model: nn.Sequential) -> None:
    model[1] = nn.Conv2d(4, 4, 3)


def replaced_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))


def replaced_buffer(model: nn.Sequential) -> None:
    model[2].running_mean = torch.ones(4)


def moved_to_shared_memory(model: nn.Sequential) -> None:
    model.share_memory()


def strides_changed_in_place(model: nn.Sequential) -> None:
    weight = model[0].weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "change",
    [
        replaced_by_assign,
        replaced_data,
        replaced_memory_format,
        replaced_module,
        replaced_parameter,
        replaced_buffer,
        moved_to_shared_memory,
        strides_changed_in_place,
    ],
)
@pytest.mark.parametrize("then", ["update", "apply_shadow", "copy_to", "load_state_dict"])
def test_the_average_goes_on_when_tensors_are_replaced(backend: str, change: Any, then: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model, seed=1)
    ema.update()
    reference = {name: tensor.clone() for name, tensor in ema.state_dict()["shadow"].items()}
    change(model)
    train(model, seed=2)
    if then == "update":
        ema.update()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                reference[name] = torch.lerp(reference[name], tensor, 0.5)
            else:
                reference[name] = tensor.clone()
    elif then == "apply_shadow":
        live = bits(model)
        with ema.swapped():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    assert torch.equal(tensor, reference[name]), name
        assert bits(model) == live
    elif then == "copy_to":
        ema.copy_to()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                assert torch.equal(tensor, reference[name]), name
    else:
        state = ema.state_dict()
        state["shadow"] = {name: torch.full_like(tensor, 3) for name, tensor in state["shadow"].items()}
        reference = {name: tensor.clone() for name, tensor in state["shadow"].items()}
        ema.load_state_dict(state)
        with ema.swapped():
            assert all((tensor == 3).all() for tensor in model.state_dict().values())
    shadow = ema.state_dict()["shadow"]
    for name, expected in reference.items():
        if expected.is_floating_point():
            assert torch.equal(shadow[name], expected), name
    assert ema.num_updates == (2 if then == "update" else 1)
    live = bits(model)
    with ema.swapped():
        pass
    assert bits(model) == live


def test_replaced_tensors_are_current_in_the_swap_not_the_old_ones(backend: str) -> None:
    model = nn.Linear(2, 2)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    old = model.weight
    model.weight = nn.Parameter(torch.full((2, 2), 5.0))
    before = raw(old)
    with ema.swapped():
        assert raw(old) == before
        assert torch.equal(model.weight, ema.state_dict()["shadow"]["weight"])
    assert torch.equal(model.weight, torch.full((2, 2), 5.0))


def test_a_weight_that_becomes_tied_is_averaged_once(backend: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    model["b"].weight = model["a"].weight
    averages_before = [tensor.clone() for tensor in ema.state_dict()["shadow"].values()]
    add(model["a"].weight, 1.0)
    ema.update()
    shadow = ema.state_dict()["shadow"]
    assert torch.equal(shadow["a.weight"], shadow["b.weight"])
    allowed = [raw(torch.lerp(before, model["a"].weight.detach(), 0.5)) for before in averages_before]
    assert raw(shadow["a.weight"]) in allowed, "one of the two averages goes on, and moves once"


def test_copied_tensors_may_come_and_go(backend: str) -> None:
    model = nn.Linear(2, 2)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    model.register_buffer("cache", torch.zeros(4))
    ema.update()
    model.cache = torch.ones(9)
    ema.update()
    with ema.swapped():
        assert torch.equal(model.cache, torch.ones(9))
    del model.cache
    ema.update()
    assert ema.num_updates == 3


# ---- compiled models ----


def test_a_compiled_model(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="eager")
    ema, plain = (
        FastEMA(compiled, decay=0.5, decay_type="constant", backend=backend),
        FastEMA(model, decay=0.5, decay_type="constant", backend=backend),
    )
    features = values(5, 3)
    compiled(features)
    train(model)
    ema.update()
    plain.update()
    assert not any("_orig_mod" in name for name in ema.state_dict()["shadow"])
    assert averages(ema) == averages(plain)
    plain.load_state_dict(ema.state_dict())
    ema.load_state_dict(plain.state_dict())
    compiled.load_state_dict(compiled.state_dict())
    assert set(ema.shadow_state_dict()) == set(model.state_dict()), "the keys of the model inside"
    with plain.swapped():
        expected = model(features)
    live = compiled(features)
    with ema.swapped():
        swapped = compiled(features)
    assert torch.equal(swapped, expected)
    assert not torch.equal(swapped, live)
    assert torch.equal(compiled(features), live)
    torch._dynamo.reset()


def test_a_swap_does_not_recompile() -> None:
    model = nn.Linear(3, 2)
    compilations = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counting)
    ema = FastEMA(compiled, decay=0.5, decay_type="constant")
    with torch.no_grad():
        compiled(values(4, 3))
        before = len(compilations)
        with ema.swapped():
            compiled(values(4, 3))
        compiled(values(4, 3))
    assert before == len(compilations) == 1
    torch._dynamo.reset()


# ---- modes and sources ----


def test_built_and_updated_under_inference_mode(backend: str) -> None:
    model = small_model()
    with torch.inference_mode():
        ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model)
    ema.update()
    with torch.inference_mode():
        ema.update()
    first = averages(ema)
    train(model)
    ema.update()
    assert averages(ema) != first
    assert not any(tensor.is_inference() for tensor in ema.state_dict()["shadow"].values())
    with torch.inference_mode(), ema.swapped():
        pass
    ema.copy_to()
    assert bits(model) == averages(ema)


def test_a_model_built_under_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 2)
        ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
        train(model)
        ema.update()
        live = bits(model)
        with ema.swapped():
            assert bits(model) == averages(ema)
        assert bits(model) == live


def test_an_update_leaves_no_graph(backend: str) -> None:
    model = nn.Linear(3, 2)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    with torch.enable_grad():
        ema.update()
        state = ema.state_dict()["shadow"]
    assert not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in state.values())


def test_iterables_of_named_tensors(backend: str) -> None:
    model = small_model()
    sources = [
        list(model.named_parameters()),
        tuple(model.named_parameters()),
        model.named_parameters(),
        ((name, parameter) for name, parameter in model.named_parameters()),
        dict(model.named_parameters()).items(),
    ]
    emas = [FastEMA(source, decay=0.5, decay_type="constant", backend=backend) for source in sources]
    train(model)
    for ema in emas:
        ema.update()
        ema.update()
    assert set(averages(emas[0])) == set(dict(model.named_parameters()))
    assert all(averages(ema) == averages(emas[0]) for ema in emas)
    with emas[2].swapped():
        assert averages(emas[0]).items() <= bits(model).items()


def test_tensors_that_are_no_parameters(backend: str) -> None:
    weight = torch.zeros(3)
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", backend=backend)
    weight += 1
    ema.update()
    with ema.swapped():
        assert weight.tolist() == [0.5] * 3


def test_a_module_with_empty_slots(backend: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False, track_running_stats=False))
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model)
    ema.update()
    assert set(averages(ema)) == {"0.weight"}


def test_a_model_on_which_nobody_holds_on(backend: str) -> None:
    """FastEMA and its model are freed together: neither keeps the other through a cycle."""
    import weakref

    model = small_model()
    ema = FastEMA(model, backend=backend)
    ema.update()
    with ema.swapped():
        pass
    watched = weakref.ref(model)
    del model, ema
    assert watched() is None

"""Every error of the contract: it says what was wrong, what was given and what to do, and nothing was changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import bits, raw, small_model, train
from fastema import FastEMA

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def nothing_changes(model: nn.Module, ema: FastEMA) -> Iterator[None]:
    """The model, the average and the counters are the same afterwards, and an update still works as it would have."""

    def everything() -> tuple[Any, ...]:
        state = ema.state_dict()
        shadow = {name: raw(tensor) for name, tensor in state["shadow"].items()}
        return bits(model), shadow, state["step"], state["num_updates"], ema.num_updates, ema.is_applied

    before = everything()
    yield
    assert everything() == before


def worked() -> tuple[nn.Sequential, FastEMA]:
    model = small_model()
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    train(model)
    ema.update()
    return model, ema


# ---- arguments ----


@pytest.mark.parametrize("decay", [1.5, -0.1, 1 + 1e-9, float("nan"), float("inf"), float("-inf")])
def test_decay_outside_the_range(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay must be in \[0, 1\], got {decay}"):
        FastEMA(small_model(), decay=decay, decay_type="constant")


@pytest.mark.parametrize("decay", ["0.9", None, True, 1j])
def test_decay_that_is_no_number(decay: Any) -> None:
    with pytest.raises(ValueError, match="decay must be") as error:
        FastEMA(small_model(), decay=decay, decay_type="constant")
    assert repr(decay) in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_update_every(value: Any) -> None:
    with pytest.raises(ValueError, match=f"update_every must be an int of at least 1, got {value!r}"):
        FastEMA(small_model(), update_every=value)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2", None])
def test_update_after_step(value: Any) -> None:
    with pytest.raises(ValueError, match=f"update_after_step must be an int of at least 0, got {value!r}"):
        FastEMA(small_model(), update_after_step=value)


def test_nonfinite() -> None:
    with pytest.raises(ValueError, match='nonfinite must be "skip" or "propagate", got \'raise\''):
        FastEMA(small_model(), nonfinite="raise")  # type: ignore[arg-type]


def test_buffers() -> None:
    with pytest.raises(ValueError, match=r"buffers must be one of .*'auto'.*'skip'.*, got 'yes'"):
        FastEMA(small_model(), buffers="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, "float32", float])
def test_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float32, .*, or None") as error:
        FastEMA(small_model(), dtype=dtype)
    assert repr(dtype) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.99, 0.9999, 1.0])
def test_a_shadow_that_would_stand_still(dtype: torch.dtype, decay: float) -> None:
    with pytest.raises(ValueError, match=f"{dtype} shadow stands still at decay {decay}.*dtype=None"):
        FastEMA(small_model(), decay=decay, decay_type="constant", dtype=dtype)
    FastEMA(small_model(), decay=0.9, decay_type="constant", dtype=dtype).update()


def test_device_meta() -> None:
    with pytest.raises(ValueError, match="device='meta' holds no values"):
        FastEMA(small_model(), device="meta")


def test_backend() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'.*known: auto, native, .*torch"):
        FastEMA(small_model(), backend="cuda")


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEMA_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"unknown backend 'fast'.*FASTEMA_BACKEND"):
        FastEMA(small_model())


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="do not take the arguments: momentum"):
        FastEMA(small_model(), momentum=0.1)


def test_from_params_with_an_unknown_key() -> None:
    with pytest.raises(TypeError, match="do not take the arguments: gamma"):
        FastEMA.from_params(small_model(), {"decay": 0.9, "gamma": 3})


@pytest.mark.parametrize("whole", [{"ema": True, "ema_params": {"decay": 0.9}}, {"max_epochs": 3, "ema": False}])
def test_from_params_with_a_whole_training_params(whole: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"whole training_params .*: pass training_params\['ema_params'\]"):
        FastEMA.from_params(small_model(), whole, total_steps=10)


# ---- what cannot be averaged ----


@pytest.mark.parametrize(
    "source",
    [
        nn.ReLU(),
        nn.Sequential(),
        [],
        [("count", torch.tensor(1))],
    ],
    ids=["no parameters", "no modules", "no tensors", "integers"],
)
def test_nothing_to_average(source: Any) -> None:
    with pytest.raises(ValueError, match=r"nothing to average: the model has no floating-point (parameters|tensors)"):
        FastEMA(source)


def test_everything_skipped() -> None:
    with pytest.raises(ValueError, match=r"nothing to average.*the policy skips them all"):
        FastEMA(small_model(), policy=lambda *_: "skip")


def test_policy_that_returns_nonsense() -> None:
    with pytest.raises(ValueError, match=r"policy returned 'freeze' for '0.weight'; it must return one of"):
        FastEMA(small_model(), policy=lambda *_: "freeze")  # type: ignore[arg-type, return-value]


def test_policy_that_averages_integers() -> None:
    with pytest.raises(
        ValueError, match=r"average '1.num_batches_tracked', but torch.int64 cannot be averaged: copy it"
    ):
        FastEMA(small_model(), policy=lambda *_: "average")


def two_tensor() -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (lambda: torch.eye(3).to_sparse(), "has layout torch.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "has layout torch.sparse_csr"),
        (lambda: torch.ones(3, device="meta"), "is on the meta device: materialise"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "is quantised: average the float model",
        ),
        (nn.UninitializedParameter, "is not initialised yet: run the lazy module once"),
        (two_tensor, "is a TwoTensor, a wrapper without storage"),
        (lambda: torch.ones(1).expand(4), "has overlapping elements"),
    ],
    ids=["sparse", "csr", "meta", "quantised", "lazy", "wrapper", "expanded"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_managed(tensor: Callable[[], Tensor], reason: str) -> None:
    bad = tensor()
    good = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError) as error:
        FastEMA([("good", good), ("layer.bad", bad)])
    for part in ("'layer.bad'", reason, "return 'skip' for it from the policy"):
        assert part in str(error.value)
    FastEMA([("good", good), ("layer.bad", bad)], policy=lambda name, *_: "skip" if name == "layer.bad" else None)


@pytest.mark.parametrize(
    "move",
    [lambda model: model.to("meta"), lambda model: model.weight.untyped_storage().resize_(0)],
    ids=["meta", "resized"],
)
def test_weights_without_memory(move: Callable[[nn.Module], object]) -> None:
    model = nn.Linear(3, 2)
    move(model)
    with pytest.raises(ValueError, match=r"'weight' (is on the meta device|has no memory)"):
        FastEMA(model)


# ---- what is no model ----


def test_parameters_without_names() -> None:
    """`model.parameters()`, as other EMA libraries take it."""
    for model in (nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(3, 5)):
        with pytest.raises(TypeError, match=r"pairs of name and tensor.*named_parameters\(\)"):
            FastEMA(model.parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [3, None, torch.ones(2, 2), {"w": torch.ones(2)}, ["weight"]], ids=str)
def test_sources_that_are_none(source: Any) -> None:
    with pytest.raises(TypeError, match="a module, or pairs of name and tensor"):
        FastEMA(source)


def test_a_named_thing_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="'b' is a list, not a tensor"):
        FastEMA([("a", torch.ones(2)), ("b", [1.0])])  # type: ignore[list-item]


def test_two_tensors_under_one_name() -> None:
    """One would be lost in every state."""
    with pytest.raises(ValueError, match="two tensors are named 'w'"):
        FastEMA([("w", torch.ones(2)), ("w", torch.zeros(2))])


def test_one_tensor_twice_under_one_name_is_fine() -> None:
    weight = torch.zeros(2)
    ema = FastEMA([("w", weight), ("w", weight)], decay=0.5, decay_type="constant")
    weight.fill_(1)
    ema.update()
    assert ema.state_dict()["shadow"]["w"].tolist() == [0.5, 0.5]


# ---- update ----


@pytest.mark.parametrize("step", [0, -3, 1.5, True, "4"])
def test_update_with_a_bad_step(step: Any) -> None:
    model, ema = worked()
    with (
        nothing_changes(model, ema),
        pytest.raises(ValueError, match=f"step must be an int of at least 1, got {step!r}"),
    ):
        ema.update(step=step)


@pytest.mark.parametrize("per_epoch", [0, -1, float("nan")])
def test_lag(per_epoch: float) -> None:
    with pytest.raises(ValueError, match=f"updates_per_epoch must be positive, got {per_epoch}"):
        FastEMA(small_model()).lag(per_epoch)


def grown(model: nn.Sequential) -> None:
    model[0].weight.data = torch.zeros(6, 3)


def halved(model: nn.Sequential) -> None:
    model[0].half()


def lost(model: nn.Sequential) -> None:
    model[0].bias = None


def gained(model: nn.Sequential) -> None:
    model.register_parameter("extra", nn.Parameter(torch.zeros(2)))


def replaced(model: nn.Sequential) -> None:
    model[3] = nn.Linear(5, 7)


def renamed(model: nn.Sequential) -> None:
    model.add_module("4", model[3])
    del model[3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (grown, ["'0.weight' is now (6, 3) torch.float32", "was (5, 3) torch.float32"]),
        (halved, ["'0.weight' is now (5, 3) torch.float16", "'0.bias'", "was (5,) torch.float32"]),
        (lost, ["'0.bias' is gone"]),
        (gained, ["'extra' is new"]),
        (replaced, ["'3.weight' is now (7, 5)", "'3.bias'", "was (2,)"]),
    ],
)
@pytest.mark.parametrize("then", ["update", "apply_shadow", "copy_to"])
def test_a_model_that_changed(backend: str, change: Callable[[nn.Module], None], words: list[str], then: str) -> None:
    model = small_model()
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model)
    ema.update()
    backup = copy.deepcopy(model)
    change(model)
    with nothing_changes(model, ema), pytest.raises(RuntimeError) as error:
        getattr(ema, then)()
    for word in [*words, "the model changed since FastEMA was built", "build a new one"]:
        assert word in str(error.value)
    average = {name: raw(tensor) for name, tensor in ema.state_dict()["shadow"].items()}
    # Put back, it goes on where it was.
    if change is gained:
        del model.extra
    for index in (0, 3):
        model[index] = backup[index]
    with ema.swapped():
        assert bits(model) == average
    ema.update()
    assert ema.num_updates == 2


def test_differences_are_listed_to_a_few() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(10)])
    ema = FastEMA(model)
    model.double()
    with pytest.raises(RuntimeError) as error:
        ema.update()
    assert str(error.value).count("is now") == 5
    assert "and 15 more" in str(error.value)


# ---- states ----


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "not a FastEMA state"),
        ({"step": 1, "num_updates": 1}, "not a FastEMA state: it has no shadow"),
        (small_model().state_dict(), "not a FastEMA state: it has no num_updates, shadow, step"),
        (None, "not a FastEMA state"),
        ([1, 2], "not a FastEMA state"),
    ],
    ids=["empty", "partial", "a model's", "none", "list"],
)
def test_load_what_is_no_state(state: Any, words: str) -> None:
    model, ema = worked()
    with nothing_changes(model, ema), pytest.raises(ValueError, match=words):
        ema.load_state_dict(state)


def foreign(ema: FastEMA, **shadow: Tensor | None) -> dict[str, Any]:
    """The EMA's own state with some tensors replaced or, if None, removed."""
    state = ema.state_dict()
    changed = {name.replace("__", "."): tensor for name, tensor in shadow.items()}
    kept = {**{name: tensor.clone() + 1 for name, tensor in state["shadow"].items()}, **changed}
    return {**state, "step": 100, "num_updates": 100, "shadow": {n: t for n, t in kept.items() if t is not None}}


@pytest.mark.parametrize(
    ("shadow", "words"),
    [
        ({"a0__weight": torch.zeros(1)}, ["'a0.weight' is in the state, not in the model"]),
        ({"fc": None}, []),
    ],
)
def test_load_a_state_with_foreign_names(shadow: dict[str, Any], words: list[str]) -> None:
    model, ema = worked()
    state = foreign(ema, **shadow)
    del state["shadow"]["0.bias"]
    with nothing_changes(model, ema), pytest.raises(ValueError, match="the state is of another model") as error:
        ema.load_state_dict(state)
    for word in [*words, "'0.bias' is missing in the state"]:
        assert word in str(error.value)


@pytest.mark.parametrize("strict", [True, False])
def test_load_a_state_with_other_shapes(strict: bool) -> None:
    model, ema = worked()
    state = foreign(ema)
    state["shadow"]["3.weight"] = torch.zeros(9, 9)
    with (
        nothing_changes(model, ema),
        pytest.raises(ValueError, match=r"'3.weight' has shape \(9, 9\), expected \(2, 5\)"),
    ):
        ema.load_state_dict(state, strict=strict)


def test_load_a_state_with_other_dtypes() -> None:
    model, ema = worked()
    state = foreign(ema)
    state["shadow"]["3.weight"] = state["shadow"]["3.weight"].double()
    with (
        nothing_changes(model, ema),
        pytest.raises(ValueError, match=r"'3.weight' has dtype torch.float64, expected torch.float32"),
    ):
        ema.load_state_dict(state)
    ema.load_state_dict(state, strict=False)
    assert ema.num_updates == 100


def test_load_a_state_whose_shadow_holds_no_tensors() -> None:
    model, ema = worked()
    for shadow in (dict.fromkeys(ema.state_dict()["shadow"], 1.0), ["a"], None):
        with nothing_changes(model, ema), pytest.raises(ValueError, match="state"):
            ema.load_state_dict({**ema.state_dict(), "shadow": shadow})


# ---- copy_to ----


def test_copy_to_another_kind_of_model() -> None:
    model, ema = worked()
    other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    before = bits(other)
    with nothing_changes(model, ema), pytest.raises(ValueError, match="model that differs") as error:
        ema.copy_to(other)
    assert "'3.weight' has shape (4, 5), expected (2, 5)" in str(error.value)
    assert bits(other) == before
    with nothing_changes(model, ema), pytest.raises(ValueError, match=r"'3.weight' is missing"):
        ema.copy_to(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))


# ---- CUDA graphs ----


def test_an_exchange_during_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, the exchanged addresses would be in the graph for ever. Simulated: the check comes first."""
    model, ema = worked()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with nothing_changes(model, ema), pytest.raises(RuntimeError, match="during CUDA graph capture"):
        ema.apply_shadow()
    with nothing_changes(model, ema), pytest.raises(RuntimeError, match="during CUDA graph capture"), ema.swapped():
        pytest.fail("the block was entered")

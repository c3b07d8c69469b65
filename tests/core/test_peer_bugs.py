"""Bugs that other EMA implementations have had, each as a test that fails on the buggy behaviour."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import bits, raw, small_model, train, values
from fastema import FastEMA

pytestmark = pytest.mark.usefixtures("one_thread")


def shadow(ema: FastEMA) -> dict[str, Tensor]:
    return ema.state_dict()["shadow"]


def through_a_file(state: Any) -> Any:
    """Save and load, as a checkpoint does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- arithmetic ----


def test_weights_that_stand_still_stay_bit_for_bit(backend: str) -> None:
    """super-gradients (distillation): a teacher averaged with itself as d*t + (1-d)*t drifts, 15.6 % in 1,000 steps."""
    model = nn.Linear(64, 64)
    ema = FastEMA(model, decay=0.9999, decay_type="constant", backend=backend)
    before = bits(model)
    for _ in range(1000):
        ema.update()
    assert {name: raw(tensor) for name, tensor in shadow(ema).items()} == before


@pytest.mark.parametrize("tie", ["parameter", "module"])
def test_tied_weights_are_averaged_once(backend: str, tie: str) -> None:
    """EMAs that walk state_dict() apply tied weights twice: moved by 0.19 instead of 0.10."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    if tie == "parameter":
        model["b"].weight = model["a"].weight
    else:
        model["b"] = model["a"]
    with torch.no_grad():
        model["a"].weight.zero_()
    ema = FastEMA(model, decay=0.9, decay_type="constant", backend=backend)
    with torch.no_grad():
        model["a"].weight.fill_(1.0)
    ema.update()
    for name in ("a.weight", "b.weight"):
        torch.testing.assert_close(shadow(ema)[name], torch.full((3, 3), 0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_average_of_16_bit_weights_does_not_stall(backend: str, dtype: torch.dtype) -> None:
    """A bfloat16 shadow (diffusers, timm and others) rounds every step of (1 - 0.9999) * 0.01 away."""
    weight = nn.Parameter(torch.ones(4, dtype=dtype))
    ema = FastEMA([("w", weight)], decay=0.9999, decay_type="constant", backend=backend)
    with torch.no_grad():
        weight.add_(0.01)
    target = weight[0].item()
    assert target > 1.0
    for _ in range(1000):
        ema.update()
    expected = target + (1.0 - target) * 0.9999**1000
    assert shadow(ema)["w"].tolist() == pytest.approx([expected] * 4, abs=0.02 * (target - 1))  # float32 rounds too


def test_a_16_bit_shadow_that_would_stall_is_refused(backend: str) -> None:
    """The same, asked for by name."""
    with pytest.raises(ValueError, match=r"bfloat16 shadow stands still at decay 0.9999"):
        FastEMA(nn.Linear(2, 2), decay=0.9999, decay_type="constant", dtype=torch.bfloat16, backend=backend)


def test_one_nan_does_not_poison_the_average(backend: str) -> None:
    """ultralytics (six pull requests): one NaN weight, and the average is NaN for ever."""
    model = nn.Linear(8, 8)
    ema = FastEMA(model, decay=0.9, decay_type="constant", backend=backend)
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.weight[3, 3] = float("nan")
    ema.update()
    model.load_state_dict(good)
    for _ in range(3):
        ema.update()
    with pytest.warns(UserWarning, match="NaN or infinite"):
        assert all(tensor.isfinite().all() for tensor in shadow(ema).values())


# ---- buffers ----


def test_integer_buffers_go_along(backend: str) -> None:
    """num_batches_tracked froze at 1, 1, 1, ... (averaged in integers) or was never copied."""
    model = nn.BatchNorm1d(3)
    ema = FastEMA(model, decay=0.999, decay_type="constant", backend=backend)
    seen = []
    for step in range(4):
        model(values(5, 3, seed=step))
        ema.update()
        seen.append(shadow(ema)["num_batches_tracked"].item())
    assert seen == [1, 2, 3, 4]


def test_spectral_norm_vectors_are_copied(backend: str) -> None:
    """miles-credit #409: an averaged u is of another matrix's singular vectors; the loss went from 0.074 to 466."""
    for layer in (
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
        nn.utils.spectral_norm(nn.Linear(4, 3)),
    ):
        ema = FastEMA(layer, decay=0.9, decay_type="constant", backend=backend)
        for step in range(3):
            layer(values(5, 4, seed=step))
            train(layer, seed=step)
            ema.update()
        vectors = {name: buffer for name, buffer in layer.named_buffers() if name.endswith(("_u", "_v"))}
        assert len(vectors) == 2
        for name, vector in vectors.items():
            assert torch.equal(shadow(ema)[name], vector)


# ---- resume ----


@pytest.mark.parametrize("decay_type", ["threshold", "warmup", "exp", "linear"])
def test_the_warm_up_does_not_restart_after_a_resume(backend: str, decay_type: str) -> None:
    """yolov5 #292, lightly-train #892: the counter was not saved, the first decay is near 0 and wipes the average."""
    model = nn.Linear(2, 2)
    arguments: dict[str, Any] = {"decay": 0.999, "decay_type": decay_type, "total_steps": 1000, "backend": backend}
    ema = FastEMA(model, **arguments)
    for _ in range(500):
        ema.update()
    saved = through_a_file({"net": model.state_dict(), "ema": ema.state_dict()})

    resumed_model = nn.Linear(2, 2)
    resumed = FastEMA(resumed_model, **arguments)
    resumed_model.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["ema"])
    with torch.no_grad():
        resumed_model.weight.add_(100.0)
    before = shadow(resumed)["weight"].clone()
    resumed.update()
    moved = (shadow(resumed)["weight"] - before) / 100
    torch.testing.assert_close(moved, torch.full((2, 2), 1 - ema.decay_at(501)), rtol=1e-4, atol=1e-6)
    assert resumed.num_updates == 501


@pytest.mark.parametrize("order", ["model first", "ema first"])
def test_an_ema_that_is_built_before_the_checkpoint_is_loaded(backend: str, order: str) -> None:
    """It went on averaging from the initial weights."""
    model = small_model()
    ema = FastEMA(model, decay=0.9, decay_type="constant", backend=backend)
    train(model)
    ema.update()
    saved = through_a_file({"net": model.state_dict(), "ema": ema.state_dict()})
    other = small_model(seed=7)
    resumed = FastEMA(other, decay=0.9, decay_type="constant", backend=backend)
    if order == "model first":
        other.load_state_dict(saved["net"])
        resumed.load_state_dict(saved["ema"])
    else:
        resumed.load_state_dict(saved["ema"])
        other.load_state_dict(saved["net"])
    for net, average in ((model, ema), (other, resumed)):
        train(net, seed=5)
        average.update()
    assert {n: raw(t) for n, t in shadow(resumed).items()} == {n: raw(t) for n, t in shadow(ema).items()}


def test_a_threshold_step_that_passed_before_a_resume_has_still_passed(backend: str) -> None:
    """`if epoch == trigger` never fires in a run that resumes behind the trigger."""
    weight = nn.Parameter(torch.zeros(1))
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", update_after_step=3, backend=backend)
    for _ in range(5):
        ema.update()
    state = through_a_file(ema.state_dict())
    resumed = FastEMA([("w", weight)], decay=0.5, decay_type="constant", update_after_step=3, backend=backend)
    resumed.load_state_dict(state)
    with torch.no_grad():
        weight.fill_(1.0)
    resumed.update()
    assert shadow(resumed)["w"].item() == 0.5


# ---- swaps ----


def test_a_checkpoint_that_is_saved_while_swapped_has_the_right_average(backend: str) -> None:
    """nequip #590, schnetpack #785: the average was saved as the weights and the weights as the average."""
    model = small_model()
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model)
    ema.update()
    outside = through_a_file({"ema": ema.state_dict(), "ema_net": ema.shadow_state_dict()})
    with ema.swapped():
        inside = through_a_file({"ema": ema.state_dict(), "ema_net": ema.shadow_state_dict()})
    for name, tensor in outside["ema"]["shadow"].items():
        assert torch.equal(inside["ema"]["shadow"][name], tensor)
    for name, tensor in outside["ema_net"].items():
        assert torch.equal(inside["ema_net"][name], tensor)
        assert not torch.equal(tensor, model.state_dict()[name]) or not tensor.is_floating_point()


def test_a_validation_that_raises_leaves_the_live_weights(backend: str) -> None:
    """Store / copy / validate / restore without `finally`: training went on with the average."""
    model = small_model()
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model)
    live = bits(model)
    with pytest.raises(torch.OutOfMemoryError), ema.swapped():
        raise torch.OutOfMemoryError("validation")
    assert bits(model) == live
    ema.update()


def test_a_second_view_of_a_weight_sees_the_swap(backend: str) -> None:
    """FSDP2 gathers from a second view of each shard; a swap through `p.data` leaves that view live, silently."""
    shard = values(12)
    weight = nn.Parameter(shard.view(3, 4))
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", backend=backend)
    with torch.no_grad():
        weight.add_(2.0)
    ema.update()
    average = shadow(ema)["w"].clone()
    with ema.swapped():
        assert torch.equal(shard.view(3, 4), average)


def test_a_model_that_cannot_be_copied_is_averaged(backend: str) -> None:
    """EMAs that deep-copy the model fail on FSDP2, on locks, on handles."""

    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no")

        def __reduce__(self) -> Any:
            raise TypeError("no")

    model = Uncopyable(2, 2)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    train(model)
    ema.update()
    with ema.swapped():
        assert torch.equal(model.weight, shadow(ema)["weight"])


# ---- names ----


def test_a_compiled_model_is_averaged_under_plain_names(backend: str) -> None:
    """senpai #2899: `_orig_mod.` in front of every name, none matched, nothing was averaged, silently."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    inner_compiled = nn.Sequential(torch.compile(model[0], backend="eager"), model[1])
    for wrapped in (torch.compile(model, backend="eager"), inner_compiled):
        compiled = FastEMA(wrapped, decay=0.5, decay_type="constant", backend=backend)
        assert set(shadow(compiled)) == set(shadow(ema)) == {"0.weight", "0.bias", "1.weight", "1.bias"}
        before = shadow(compiled)["0.weight"].clone()
        train(model)
        compiled.update()
        assert not torch.equal(shadow(compiled)["0.weight"], before)
        compiled.load_state_dict(through_a_file(ema.state_dict()))
        assert torch.equal(shadow(compiled)["0.weight"], shadow(ema)["0.weight"])


# ---- when it is updated ----


def test_gradient_accumulation_updates_once_per_optimizer_step(backend: str) -> None:
    """F5-TTS #631: updated per micro-batch, so the window is shorter by the accumulation; others forgot the last,
    short group, which steps without an update."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, by_hand = (
        FastEMA(model, decay=0.5, decay_type="constant", backend=backend),
        FastEMA(model, decay=0.5, decay_type="constant", backend=backend),
    )
    ema.attach(optimizer)
    batches, accumulate = 10, 4
    for index in range(batches):
        model(values(2, 3, seed=index)).mean().backward()
        if (index + 1) % accumulate == 0 or index + 1 == batches:
            optimizer.step()
            by_hand.update()
            optimizer.zero_grad()
    assert ema.num_updates == 3
    assert raw(shadow(ema)["weight"]) == raw(shadow(by_hand)["weight"])


def test_a_step_that_mixed_precision_skipped_is_no_update(backend: str) -> None:
    """The average counted, and averaged, a step that the gradient scaler had skipped."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = FastEMA(model, decay=0.5, decay_type="threshold", backend=backend)
    ema.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.full((1, 3), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert ema.num_updates == 0
    assert ema.state_dict()["step"] == 0


def test_frozen_when_built_then_unfrozen(backend: str) -> None:
    """EMAs that register only what requires grad raise a KeyError, or leave the layer out for ever."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    ema.update()
    model[0].requires_grad_(True)
    before = shadow(ema)["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    ema.update()
    torch.testing.assert_close(shadow(ema)["0.weight"], before + 0.5)
    with ema.swapped():
        assert model[0].weight.requires_grad


def test_an_update_under_inference_mode_does_not_end_all_updates(backend: str) -> None:
    """ultralytics #22372: the average became inference tensors, which nothing may update outside."""
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
        ema.update()
        with ema.swapped():
            pass
    before = shadow(ema)["weight"].clone()
    train(model)
    ema.update()
    assert not torch.equal(shadow(ema)["weight"], before)
    model(values(1, 2)).sum().backward()

"""`import_average` finds the average, accounts for every tensor, and changes nothing where something does not fit."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fastema
from cases import raw
from fastema import FastEMA
from fastema.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from fastema.cli import main


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 2)


def an_average(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return a state that differs from the model's in every tensor."""
    return {prefix + name: tensor + 1 for name, tensor in model.state_dict().items()}


def snapshot(ema: FastEMA) -> dict[str, Any]:
    state = ema.state_dict()
    counters = {key: state[key] for key in ("step", "num_updates", "last_update", "decay", "decay_type")}
    return {**counters, **{name: raw(tensor) for name, tensor in state["shadow"].items()}}


def loaded(ema: FastEMA, wanted: dict[str, Tensor]) -> bool:
    shadow = ema.state_dict()["shadow"]
    return all(torch.equal(shadow[name], tensor.to(shadow[name].dtype)) for name, tensor in wanted.items())


# ---- names ----


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "_model.", "a.b."])
def test_prefixes_of_the_file(prefix: str) -> None:
    model = Net()
    ema = FastEMA(model)
    result = fastema.import_average(ema, {"ema": an_average(model, prefix)}, step=7)
    assert loaded(ema, an_average(model)) and not result.kept and not result.ignored
    assert (ema.num_updates, ema.state_dict()["step"]) == (7, 7)


def test_wrappers_inside_names() -> None:
    model = Net()
    average = {
        name.replace("body.", "body._checkpoint_wrapped_module."): tensor for name, tensor in an_average(model).items()
    }
    fastema.import_average(FastEMA(model), average, step=1)
    average = {name.replace("head.", "_fsdp_wrapped_module.head."): tensor for name, tensor in average.items()}
    ema = FastEMA(model)
    fastema.import_average(ema, average, step=1)
    assert loaded(ema, an_average(model))


def test_a_model_with_a_prefix_of_its_own() -> None:
    outer = nn.ModuleDict({"net": Net()})
    ema = FastEMA(outer)
    fastema.import_average(ema, {"ema": an_average(outer["net"])}, step=1)
    assert loaded(ema, an_average(outer))


def test_a_part_of_a_larger_file_leaves_the_rest() -> None:
    outer = nn.ModuleDict({"net": Net(), "loss": nn.Linear(3, 3)})
    ema = FastEMA(outer["net"])
    result = fastema.import_average(ema, {"ema": an_average(outer)}, step=1)
    assert loaded(ema, an_average(outer["net"]))
    assert result.ignored == ("loss.weight", "loss.bias")


def test_two_parts_that_fit_alike_are_refused() -> None:
    both = nn.ModuleDict({"student": Net(), "teacher": Net()})
    ema = FastEMA(both["student"])
    before = snapshot(ema)
    with pytest.raises(ValueError, match=r"'student\.' and 'teacher\.' fit the model alike"):
        fastema.import_average(ema, {"ema": an_average(both)}, step=1)
    assert snapshot(ema) == before


def test_weights_with_buffers_do_not_go_before_an_average_without_them() -> None:
    model = Net()
    model.head.register_parameter("tied", model.head.weight)
    average = {f"shadow.{name}": tensor + 1 for name, tensor in model.named_parameters()}
    weights = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    ema = FastEMA(model)
    before = snapshot(ema)
    with pytest.raises(ValueError, match=r"'net\.' and 'shadow\.' fit the model alike"):
        fastema.import_average(ema, {**weights, **average}, step=1)
    assert snapshot(ema) == before


@pytest.mark.parametrize("key", ["model_without_ema", "non_ema", "unet_no_ema", "state_dict_non_averaged"])
def test_a_key_that_says_no_average_is_none(key: str) -> None:
    model = Net()
    content = {key: model.state_dict(), "model": an_average(model)}
    with pytest.raises(ValueError, match="no average of a known library"):
        fastema.import_average(FastEMA(model), content, step=1)
    content["model_ema"] = an_average(model)
    ema = FastEMA(model)
    assert fastema.import_average(ema, content, step=1).where == "model_ema" and loaded(ema, an_average(model))


def test_tied_tensors_need_one_name_and_must_agree() -> None:
    model = Net()
    model.tied = model.head
    average = {name: tensor for name, tensor in an_average(model).items() if not name.startswith("tied")}
    ema = FastEMA(model)
    fastema.import_average(ema, average, step=1)
    assert loaded(ema, average)
    with pytest.raises(ValueError, match="one tensor in the model and differ in the file"):
        fastema.import_average(ema, {**average, "tied.weight": average["head.weight"] + 1}, step=1)


def test_tensors_that_the_policy_skips_are_named() -> None:
    model = Net()
    ema = FastEMA(model, policy=lambda name, tensor, module: "skip" if name.startswith("head") else None)
    result = fastema.import_average(ema, {"state_dict_ema": an_average(model)}, step=1)
    assert result.ignored == ("head.weight", "head.bias")


def test_what_the_format_leaves_out_stays_and_is_named() -> None:
    model = Net()
    ema = FastEMA(model)
    state = {"decay": 0.999, "num_updates": 50, "shadow_params": [tensor + 1 for tensor in model.parameters()]}
    result = fastema.import_average(ema, state)
    assert set(result.kept) == {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
    assert "not in the file, as before: body.1.running_mean" in str(result)
    assert loaded(ema, {name: tensor for name, tensor in an_average(model).items() if name not in result.kept})


def test_a_list_of_the_parameters_that_train() -> None:
    model = Net()
    model.head.requires_grad_(False)
    training = [tensor + 1 for tensor in model.parameters() if tensor.requires_grad]
    ema = FastEMA(model)
    result = fastema.import_average(ema, {"decay": 0.999, "num_updates": 3, "shadow_params": training})
    assert {"head.weight", "head.bias"} <= set(result.kept)


def test_named_tensors_in_place_of_a_module() -> None:
    model = Net()
    ema = FastEMA(list(model.named_parameters()))
    fastema.import_average(ema, {"ema": {name: tensor + 1 for name, tensor in model.named_parameters()}}, step=1)
    assert loaded(ema, {name: tensor + 1 for name, tensor in model.named_parameters()})


# ---- nothing is changed ----

WRONG: dict[str, tuple[Any, str]] = {
    "a name is missing": (lambda s: s.pop("head.bias"), "'head.bias' is missing in the file"),
    "a name is new": (lambda s: s.update(extra=torch.ones(2)), "'extra' is in the file, not in the model"),
    "a shape": (lambda s: s.update({"head.bias": torch.ones(3)}), r"'head.bias' has shape \(3,\), expected \(2,\)"),
    "NaN": (lambda s: s["head.bias"].fill_(torch.nan), "'head.bias' has 2 elements in the file that are NaN"),
    "overflow of 16 bits": (lambda s: s.update({"head.bias": torch.tensor([7e4, 1.0]).half()}), "1 elements"),
    "integers for numbers": (lambda s: s.update({"head.bias": torch.ones(2, dtype=torch.int64)}), "is torch.int64"),
    "complex numbers": (lambda s: s.update({"head.bias": torch.ones(2) + 1j}), "is torch.complex64"),
    "no tensor memory": (lambda s: s.update({"head.bias": torch.ones(2, device="meta")}), "no ordinary tensor"),
}


@pytest.mark.parametrize("change", WRONG)
def test_nothing_changes_where_something_does_not_fit(change: str) -> None:
    model = Net()
    ema = FastEMA(model, decay=0.9)
    ema.update()
    average = an_average(model)
    damage, text = WRONG[change]
    damage(average)
    before = snapshot(ema)
    with pytest.raises(ValueError, match=text):
        fastema.import_average(ema, {"state_dict_ema": average}, step=100)
    assert snapshot(ema) == before


def test_infinity_that_the_weights_have_too_is_meant() -> None:
    model = Net()
    with torch.no_grad():
        model.head.bias[0] = -torch.inf
    fastema.import_average(FastEMA(model), {"state_dict_ema": an_average(model)}, step=1)


def test_a_file_without_a_count_asks_for_it() -> None:
    model = Net()
    with pytest.raises(ValueError, match="pass step="):
        fastema.import_average(FastEMA(model), {"state_dict_ema": an_average(model)})
    with pytest.raises(ValueError, match="step must be an int"):
        fastema.import_average(FastEMA(model), {"state_dict_ema": an_average(model)}, step=-1)


def test_a_count_may_be_numpys() -> None:
    model = Net()
    ema = FastEMA(model)
    count = pytest.importorskip("numpy").int64(12)
    assert fastema.import_average(ema, {"ema": an_average(model), "updates": count}).step == 12 == ema.num_updates


def test_a_state_of_fastema_whose_count_is_none_asks_for_it() -> None:
    model = Net()
    state = {**FastEMA(model).state_dict(), "step": "many"}
    with pytest.raises(ValueError, match="pass step="):
        fastema.import_average(FastEMA(model), state)


def test_an_average_that_has_not_begun_is_refused() -> None:
    model = Net()
    with pytest.raises(ValueError, match="nothing was averaged yet"):
        fastema.import_average(FastEMA(model), AveragedModel(model).state_dict())


def test_checkpoints_without_an_average_are_refused() -> None:
    model = Net()
    for content in ({"model": model.state_dict(), "epoch": 3}, {"state_dict": model.state_dict()}, {}):
        with pytest.raises(ValueError, match="no average of a known library"):
            fastema.import_average(FastEMA(model), content)


MALFORMED: tuple[dict[str, Any], ...] = (
    {"decay": "high", "num_updates": 3, "shadow_params": []},
    {"optimization_step": "3", "update_after_step": 0, "use_ema_warmup": False, "shadow_params": []},
    {"optimization_step": 3, "update_after_step": 0, "use_ema_warmup": True, "inv_gamma": 0, "shadow_params": []},
    {"state_dict": {}, "current_model_state": {}, "averaging_state": 3},
    {"state": {"algorithms": [("EMA", 3)]}},
    {"stds": ["wide"], "emas": [{"a": torch.ones(1)}]},
    {"step": [], "num_updates": 1, "shadow": {}},
    {"model_ema": {"a": torch.ones(1)}, "ema_sched": {"last_epoch": "x"}},
)


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_values_of_other_types_are_one_error(content: dict[str, Any]) -> None:
    ema = FastEMA(Net())
    before = snapshot(ema)
    with pytest.raises(ValueError):
        fastema.import_average(ema, content)
    assert snapshot(ema) == before


def test_several_averages_are_refused_and_a_source_selects() -> None:
    model = Net()
    content = {"ema_net": an_average(model), "state_dict_ema": an_average(model, "module.")}
    with pytest.raises(ValueError, match=r"several averages.*super-gradients at ema_net; timm at state_dict_ema"):
        fastema.import_average(FastEMA(model), content, step=1)
    assert fastema.import_average(FastEMA(model), content, source="timm", step=1).where == "state_dict_ema"
    with pytest.raises(ValueError, match="unknown source 'keras'"):
        fastema.import_average(FastEMA(model), content, source="keras", step=1)


def test_while_applied_it_is_refused() -> None:
    model = Net()
    ema = FastEMA(model)
    with ema.swapped(), pytest.raises(RuntimeError, match="while the EMA weights are applied"):
        fastema.import_average(ema, {"ema": an_average(model)}, step=1)


def test_load_state_dict_of_a_foreign_file_names_the_call() -> None:
    model = Net()
    ema = FastEMA(model)
    for foreign in ({"state_dict_ema": an_average(model)}, AveragedModel(model).state_dict(), [1]):
        with pytest.raises(ValueError, match=r"fastema\.import_average\(ema, file\)"):
            ema.load_state_dict(foreign)  # type: ignore[arg-type]


def test_a_state_with_other_names_is_refused_without_strict_too() -> None:
    model = Net()
    ema = FastEMA(model)
    before = snapshot(ema)
    state = {"step": 9000, "num_updates": 9000, "shadow": an_average(model, "module.")}
    with pytest.raises(ValueError, match="none of its names is an average's here"):
        ema.load_state_dict(state, strict=False)
    assert snapshot(ema) == before
    assert fastema.import_average(ema, state).source == "fastema"
    assert loaded(ema, an_average(model))


# ---- traps of formats ----


def test_litema_with_two_names_that_are_spelled_alike_is_refused() -> None:
    model = nn.ModuleDict({"1": nn.ModuleDict({"11": nn.Linear(2, 2)}), "11": nn.ModuleDict({"1": nn.Linear(2, 2)})})
    held = {name.replace(".", ""): tensor.detach() for name, tensor in model.named_parameters()}
    content = {**held, "decay": torch.tensor(0.999), "num_updates": torch.tensor(5)}
    with pytest.raises(ValueError, match=r"'1\.11\.weight' and '11\.1\.weight' are both '111weight' in the file"):
        fastema.import_average(FastEMA(model), content)


def test_litema_leaves_frozen_parts_as_they_are() -> None:
    outer = nn.ModuleDict({"model": Net(), "first_stage": nn.Linear(3, 3).requires_grad_(False)})
    names = dict(outer["model"].named_parameters())
    state = {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in names.items()}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(90)}
    content = {"state_dict": {**outer.state_dict(), **state}}
    ema = FastEMA(outer, 0.9999, buffers="copy")
    result = fastema.import_average(ema, content)
    assert {"first_stage.weight", "first_stage.bias"} <= set(result.kept)
    assert loaded(ema, {f"model.{name}": tensor + 1 for name, tensor in names.items()})


def test_composers_part_alone_is_refused_while_the_average_is_in_the_model() -> None:
    model = Net()
    held = {"named_parameters_dict": dict(model.named_parameters()), "named_buffers_dict": dict(model.named_buffers())}
    content = {"ema_model": held, "ema_weights_active": True, "ema_started": True}
    with pytest.raises(ValueError, match="hand over the whole checkpoint"):
        fastema.import_average(FastEMA(model), content, step=1)


def test_edm2_averages_are_told_by_their_width() -> None:
    model = Net()
    content = {"stds": [0.05, 0.1], "emas": [an_average(model), model.state_dict()]}
    ema = FastEMA(model, decay_type="power", sigma_rel=[0.1, 0.05])
    fastema.import_average(ema, content, step=10)
    shadows = ema.state_dict()["shadow"]
    assert torch.equal(shadows[1]["head.bias"], model.head.bias + 1)
    assert torch.equal(shadows[0]["head.bias"], model.head.bias)
    with pytest.raises(ValueError, match=r"averages of sigma_rel \[0\.05, 0\.1\], none of 0\.2"):
        fastema.import_average(FastEMA(model, decay_type="power", sigma_rel=0.2), content, step=10)
    with pytest.raises(ValueError, match="has 2 averages, this FastEMA has 1"):
        fastema.import_average(FastEMA(model), content, step=10)


def test_the_power_profile_does_not_forget_what_was_imported() -> None:
    """Built on the average and told a late step, "power" takes the whole run for the gap and drops it."""
    model = nn.Linear(2, 2)
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    for arguments in ({"decay_type": "power", "sigma_rel": 0.1}, {"decay_type": "debiased"}):
        ema = FastEMA(model, **arguments)  # type: ignore[arg-type]
        fastema.import_average(ema, {"ema": average}, step=100_000)
        ema.update()
        left = (ema.state_dict()["shadow"]["bias"] - model.bias).mean()
        assert left > 0.99


def test_another_decay_than_theirs_is_warned_of() -> None:
    model = Net()
    state = {"decay": 0.9, "num_updates": 500, "shadow_params": [tensor.clone() for tensor in model.parameters()]}
    with pytest.warns(UserWarning, match=r"next update has decay .*torch-ema would be 0\.9: FastEMA\(model, 0\.9"):
        fastema.import_average(FastEMA(model, 0.999), state)


def test_a_16_bit_file_goes_on_in_32() -> None:
    model = Net()
    average = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in an_average(model).items()
    }
    ema = FastEMA(model)
    result = fastema.import_average(ema, {"ema": average, "updates": 40})
    assert (result.source, result.step) == ("ultralytics", 40)
    assert any("torch.float16, which go on in torch.float32" in note for note in result.notes)
    assert ema.state_dict()["shadow"]["head.bias"].dtype == torch.float32


def test_a_bfloat16_model_and_its_float32_average() -> None:
    model = Net().bfloat16()
    average = {
        name: tensor.float() + 0.001 if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    ema = FastEMA(model)
    fastema.import_average(ema, {"ema": average}, step=3)
    assert loaded(ema, {name: tensor for name, tensor in average.items() if tensor.is_floating_point()})


# ---- files ----


class Held:
    """A class of a stranger, which a file must not be able to build."""

    built = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).built += 1


def test_objects_of_classes_are_never_built(tmp_path: Path) -> None:
    held = Held()
    held.value = 1  # type: ignore[attr-defined]
    torch.save({"ema": held}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"weights_only=False\)\n +torch\.save"):
        fastema.import_average(FastEMA(Net()), tmp_path / "a.pt")
    assert Held.built == 0


def test_a_namespace_of_arguments_is_read(tmp_path: Path) -> None:
    model = Net()
    torch.save({"args": argparse.Namespace(lr=0.1), "ema": an_average(model)}, tmp_path / "a.pt")
    assert fastema.import_average(FastEMA(model), tmp_path / "a.pt", step=1).where == "ema"


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    ema = FastEMA(Net())
    (tmp_path / "a.pt").write_bytes(b"nothing")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    for name in ("a.pt", "a.safetensors", "b.pt", "b.safetensors", "."):
        with pytest.raises(CheckpointError):
            fastema.import_average(ema, tmp_path / name)
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged JSON"):
        fastema.import_average(ema, tmp_path)
    with pytest.raises(TypeError, match="pass its state_dict"):
        fastema.import_average(ema, Net())  # type: ignore[arg-type]


def test_a_checkpoint_of_fastema_and_one_of_the_hugging_face_callback(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = Net()
    ema = FastEMA(model, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            model.head.bias.add_(1)
        ema.update()
    save_checkpoint(tmp_path / "a.pth", net=model, ema=ema)
    state = ema.state_dict()
    safetensors.save_file(dict(state.pop("shadow")), tmp_path / "ema.safetensors")
    (tmp_path / "ema.json").write_text(json.dumps(state))
    for file in (tmp_path / "a.pth", tmp_path):
        other = FastEMA(copy.deepcopy(model), decay=0.9)
        fastema.import_average(other, file)
        assert snapshot(other) == snapshot(ema)


def test_the_folder_that_diffusers_saves(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = Net()
    config = {
        "decay": 0.999,
        "min_decay": 0.0,
        "optimization_step": 40,
        "update_after_step": 0,
        "use_ema_warmup": False,
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, "inv_gamma": 1.0, "power": 0.6667, "channels": 3}))
    safetensors.save_file(an_average(model), tmp_path / "diffusion_pytorch_model.safetensors")
    ema = FastEMA(model)
    result = fastema.import_average(ema, tmp_path)
    assert (result.source, result.step, result.kept) == ("diffusers", 39, ())
    assert loaded(ema, an_average(model))


# ---- fastema convert ----


def test_convert_writes_a_checkpoint_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Net()
    torch.save({"state_dict_ema": an_average(model, "module.")}, tmp_path / "theirs.pth")
    out = str(tmp_path / "ours.pth")
    assert main(["convert", str(tmp_path / "theirs.pth"), out]) == 2
    assert "give --step" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "theirs.pth"), out, "--step", "300"]) == 0
    assert "the average of timm from state_dict_ema, at step 300" in capsys.readouterr().out
    other = Net()
    assert load_weights(other, out) == "ema_net"
    assert torch.equal(other.head.bias, model.head.bias + 1)
    ema = FastEMA(model)
    ema.load_state_dict(load_checkpoint(out)["ema"])
    assert ema.num_updates == 300 and loaded(ema, an_average(model))


def test_convert_to_weights_alone(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = Net()
    torch.save(an_average(model), tmp_path / "theirs.pth")
    assert main(["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours.safetensors")]) == 0
    model.load_state_dict(safetensors.load_file(tmp_path / "ours.safetensors"))


def test_convert_names_litemas_tensors_by_the_weights_beside_them(tmp_path: Path) -> None:
    model = Net()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in model.named_parameters()}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(90)}
    torch.save({"state_dict": state}, tmp_path / "theirs.ckpt")
    assert main(["convert", str(tmp_path / "theirs.ckpt"), str(tmp_path / "ours.pth")]) == 0
    names = {f"model.{name}" for name, _ in model.named_parameters()}
    assert set(load_checkpoint(tmp_path / "ours.pth")["ema_net"]) == names


def test_convert_refuses_what_has_no_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"decay": 0.9, "num_updates": 3, "shadow_params": [torch.ones(2)]}, tmp_path / "theirs.pth")
    assert main(["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth")]) == 2
    assert "1 tensors without names" in capsys.readouterr().err
    assert not (tmp_path / "ours.pth").exists()

"""Distillation: the loss, an unchanged teacher, and an ordinary run of the student."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import torch

from fastema import cli
from fastema.checkpoint import load_checkpoint
from fastema.cli.train import options_of
from fastema.errors import UserError
from fastema.segmentation.data.listing import hold_out, list_pairs
from fastema.segmentation.data.loaders import ValidationSet, validation_loader
from fastema.segmentation.data.synthetic import ensure_dataset
from fastema.segmentation.devices import Precision
from fastema.segmentation.eval.scores import evaluate
from fastema.segmentation.model.load import load_net, read_checkpoint
from fastema.segmentation.model.network import Architecture, Output, create_net
from fastema.segmentation.options import DistillOptions, TrainOptions
from fastema.segmentation.train import run as run_module
from fastema.segmentation.train import trainer as trainer_module
from fastema.segmentation.train.checkpoints import changed_options
from fastema.segmentation.train.distillation import Distillation, Teacher, distillation_loss, load_teacher, mean_iou
from fastema.segmentation.train.losses import BALANCE_WEIGHT, structure_loss
from fastema.segmentation.train.trainer import Trainer
from segmentation.runs import Pairs, differences, output_of, tiny_options, tiny_run
from segmentation.tiny_network import random_net

BACKBONE = "mobilenetv3_small_050"
STUDENT = "mobilenetv3_small_075"
TINY = ["--backbone", STUDENT, "--no-pretrained", "--num-experts", "0", "--img-size", "64", "--device", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_dataset(tmp_path_factory.mktemp("data"), seed=0, count=12, size=64)


@pytest.fixture(scope="module")
def pairs(data: Path) -> Pairs:
    return hold_out(list_pairs(data).pairs, 0.3)


@pytest.fixture(scope="module")
def teacher_file(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With experts, and an average that is clearly another network than the trained one."""
    folder = tmp_path_factory.mktemp("teacher")
    chosen = {"epochs": 1, "num_experts": 2, "top_k": 1, "use_ema": True, "ema_decay": 0.7, "val_fraction": 0.05}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "write_curves", lambda *_: None)
        patch.setattr(trainer_module, "write_predictions", lambda *_: None)
        tiny_run(pairs, tiny_options(folder, **chosen)).fit()
    return folder / "last.pth"


def options(folder: Path, teacher: Path, **changes: Any) -> DistillOptions:
    own = {name: changes.pop(name) for name in ("distill_weight", "temperature") if name in changes}
    training = tiny_options(folder, **{"use_ema": True, **changes})
    values = {field.name: getattr(training, field.name) for field in fields(training)}
    return DistillOptions(**values, teacher_checkpoint=teacher, **own)


def distillation_run(pairs: Pairs, chosen: DistillOptions) -> tuple[Trainer, Distillation]:
    distillation = Distillation(load_teacher(chosen.teacher_checkpoint), chosen.distill_weight, chosen.temperature)
    return tiny_run(pairs, chosen, make_objective=distillation.make_objective), distillation


def bits(teacher: Teacher) -> dict[str, torch.Tensor]:
    """Copy every parameter and buffer, also those in no checkpoint."""
    return {name: tensor.clone() for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]}


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_the_softened_divergence_times_the_temperature_squared(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    p, q = (teacher / temperature).sigmoid(), (student / temperature).sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    expected = float(temperature**2 * divergence.mean())
    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-10)
    assert float(distillation_loss(student.float(), teacher.float(), temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(student, student, temperature)) == pytest.approx(0, abs=1e-12)


def test_the_gradient_keeps_its_scale_at_any_temperature() -> None:
    """A large temperature matches the logits: (student - teacher) / 4 a pixel, however large it is."""
    student = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    teacher = torch.tensor([[0.0, 3.0, 0.5]], requires_grad=True)
    for temperature in (100.0, 1000.0):
        (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
        torch.testing.assert_close(gradient, torch.tensor([[0.5, -1.0, 0.0]]) / 3, rtol=1e-3, atol=1e-4)
    distillation_loss(student, teacher, 2.0).backward()
    assert teacher.grad is None


def test_logits_that_are_certain_and_wrong_stay_finite() -> None:
    student = torch.tensor([200.0, -200.0, 1e4], requires_grad=True)
    loss = distillation_loss(student, torch.tensor([-200.0, 200.0, -1e4]), 1.0)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and bool(student.grad.isfinite().all())


def test_what_each_part_of_the_loss_weighs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, side, taught = (torch.randn(2, 1, 16, 16, generator=generator) for _ in range(3))
    masks = (torch.rand(2, 1, 16, 16, generator=generator) > 0.5).float()
    output = Output(logits, [side], balance=torch.tensor(3.0), usage=torch.zeros(1, 2))
    net, _ = create_net(Architecture(BACKBONE, 0), pretrained=False)
    to_masks = structure_loss(logits, masks) + 0.5 * structure_loss(side, masks)
    to_teacher = distillation_loss(logits, taught, 2.0)
    for weight in (0.0, 0.25, 1.0):
        loss = Distillation(Teacher(net, 64), weight, 2.0).loss(output, masks, taught)
        torch.testing.assert_close(loss, (1 - weight) * to_masks + weight * to_teacher + BALANCE_WEIGHT * 3.0)


def test_a_student_comes_to_say_what_its_teacher_says() -> None:
    net, _ = create_net(Architecture(BACKBONE, 0), pretrained=False)
    torch.nn.init.constant_(net.decoder.heads.get_parameter("0.bias"), 4.0)  # at first it is sure of the opposite
    objective = Distillation(Teacher(random_net(0), 64), 1.0, 2.0).make_objective(net, Precision("none", CPU))
    images, masks = torch.rand(4, 3, 64, 64), torch.zeros(4, 1, 64, 64)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss, _ = objective(images, masks)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses


# --- the teacher ------------------------------------------------------------------------------------------------------


def test_the_teacher_is_neither_trained_nor_averaged_nor_saved(
    pairs: Pairs, tmp_path: Path, teacher_file: Path
) -> None:
    """super-gradients averaged the shared teacher along with the student: 15.6 % of its weights changed."""
    chosen = options(tmp_path / "run", teacher_file, ema_decays=(0.9, 0.999), ema_decay_type="constant", batch_size=2)
    run, distillation = distillation_run(pairs, chosen)
    before, file = bits(distillation.teacher), teacher_file.read_bytes()
    run.fit()

    assert not differences(bits(distillation.teacher), before)
    assert teacher_file.read_bytes() == file
    assert all(parameter.grad is None for parameter in distillation.teacher.parameters())
    assert not any(module.training for module in distillation.teacher.modules())

    names = run.net.state_dict().keys()
    assert run.ema is not None and run.ema.num_updates > 0
    last = load_checkpoint(tmp_path / "run" / "last.pth")
    for saved in (run.ema.shadow_state_dict(), last["net"], last["ema_net"], *last["ema"]["shadow"]):
        assert saved.keys() <= names
    assert last["net"].keys() == last["ema_net"].keys() == names
    assert last.keys() == load_checkpoint(teacher_file).keys(), "as of an ordinary training"
    assert sum(len(group["params"]) for group in last["optimizer"]["param_groups"]) == len(list(run.net.parameters()))


def test_the_average_is_taken_where_there_is_one(pairs: Pairs, tmp_path: Path, teacher_file: Path) -> None:
    content = load_checkpoint(teacher_file)
    assert differences(content["net"], content["ema_net"])
    teacher = load_teacher(teacher_file)
    assert not differences(teacher.net.state_dict(), content["ema_net"])
    assert teacher.origin.startswith(f"ema_net of {teacher_file} after epoch 1; {BACKBONE}; 2 experts a level; ")

    del content["ema_net"]
    torch.save(content, tmp_path / "base.pth")
    teacher = load_teacher(tmp_path / "base.pth", BACKBONE)
    assert not differences(teacher.net.state_dict(), content["net"])
    assert teacher.origin.startswith(f"net of {tmp_path / 'base.pth'} after")


def test_teacher_and_student_see_the_same_images(pairs: Pairs, tmp_path: Path, teacher_file: Path) -> None:
    run, distillation = distillation_run(pairs, options(tmp_path / "run", teacher_file))
    seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    run.net.register_forward_pre_hook(lambda _, args: seen["student"].append(args[0].clone()))
    distillation.teacher.net.register_forward_pre_hook(lambda _, args: seen["teacher"].append(args[0].clone()))
    run._train_epoch(1)
    assert len(seen["student"]) > 1
    assert not differences(seen["student"], seen["teacher"])


def test_a_teacher_of_another_size_is_shown_its_own(teacher_file: Path) -> None:
    teacher = load_teacher(teacher_file)
    seen = []
    teacher.net.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    output = teacher(images)
    assert seen == [(2, 3, 64, 64)]
    assert output.logits.shape == (2, 1, 96, 96)
    own_size = teacher(torch.nn.functional.interpolate(images, (64, 64), mode="bilinear", antialias=True)).logits
    back = torch.nn.functional.interpolate(output.logits, (64, 64), mode="bilinear", antialias=True)
    assert (back - own_size).abs().max() < 0.1 * own_size.abs().max()


def test_the_teacher_answers_in_the_students_precision(pairs: Pairs, tmp_path: Path, teacher_file: Path) -> None:
    run, distillation = distillation_run(pairs, options(tmp_path / "run", teacher_file, amp="bf16"))
    seen = []
    first = next(module for module in distillation.teacher.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    run._train_epoch(1)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in distillation.teacher.parameters()} == {torch.float32}


# --- the run ----------------------------------------------------------------------------------------------------------


def test_without_weight_the_teacher_changes_nothing(pairs: Pairs, tmp_path: Path, teacher_file: Path) -> None:
    """Bit for bit an ordinary training: no random number is drawn for the teacher, no statistics are touched."""
    chosen = {"epochs": 1, "num_experts": 2, "top_k": 1}
    distillation_run(pairs, options(tmp_path / "a", teacher_file, distill_weight=0.0, **chosen))[0].fit()
    tiny_run(pairs, tiny_options(tmp_path / "b", use_ema=True, **chosen)).fit()
    a, b = (load_checkpoint(tmp_path / name / "last.pth") for name in "ab")
    for name in ("net", "ema_net", "ema", "optimizer", "rng", "bests"):
        assert not differences(a[name], b[name]), name
    assert a["history"][0]["loss"] == b["history"][0]["loss"]


def test_resume_of_a_distillation_is_exact(pairs: Pairs, tmp_path: Path, teacher_file: Path) -> None:
    chosen = {"epochs": 2, "temperature": 3.0}
    distillation_run(pairs, options(tmp_path / "whole", teacher_file, **chosen))[0].fit()

    first, _ = distillation_run(pairs, options(tmp_path / "parts", teacher_file, **chosen))
    save = first._save

    def save_and_stop() -> None:
        save()
        raise KeyboardInterrupt

    first._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    torch.manual_seed(12345)
    last = tmp_path / "parts" / "last.pth"
    distillation_run(pairs, options(tmp_path / "parts", teacher_file, resume_from=last, **chosen))[0].fit()

    whole, parts = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    for name in ("net", "ema_net", "ema", "optimizer", "epoch", "bests"):
        assert not differences(whole[name], parts[name]), name
    assert whole["options"]["teacher_checkpoint"] == str(teacher_file)
    assert (whole["options"]["distill_weight"], whole["options"]["temperature"]) == (0.5, 3.0)
    plain = TrainOptions(dataset_path="synthetic", checkpoint_dir=tmp_path)
    assert any("no teacher any more" in change for change in changed_options(whole, plain))

    other = {**chosen, "epochs": 3, "temperature": 1.0, "resume_from": last}
    run, _ = distillation_run(pairs, options(tmp_path / "parts", teacher_file, **other))
    assert "--temperature 3.0 → 1.0" in output_of(run)


def test_the_command(
    data: Path, teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student of another kind than its teacher; its output and its files."""
    teachers: list[Teacher] = []

    def recorded(path: Path, backbone: str | None) -> Teacher:
        teachers.append(load_teacher(path, backbone))
        return teachers[-1]

    monkeypatch.setattr(run_module, "load_teacher", recorded)
    folder = tmp_path / "run"
    flags = ["distill", "--dataset-path", str(data), "--checkpoint-dir", str(folder), *TINY, "--epochs", "1"]
    flags += ["--teacher-checkpoint", str(teacher_file), "--teacher-backbone", BACKBONE, "--img-size", "96"]
    assert cli.main(flags) == 0
    text = capsys.readouterr().out

    checkpoint = read_checkpoint(teacher_file)
    (teacher,) = teachers
    assert not differences(teacher.net.state_dict(), dict(checkpoint.content["ema_net"])), "unchanged at the end"
    assert re.search(rf"Teacher: IoU 0\.\d{{4}} \(ema_net of {re.escape(str(teacher_file))} after epoch 1; ", text)
    assert "gets the images of 96 pixels resized to its 64" in text
    assert "it held out 5% of its images, this run 10%" in text
    assert re.search(r"Epoch 1: Loss: \d\.\d+ \| IoU: 0\.\d+ \(base\) \| EMA IoU: 0\.\d+ \|", text)
    assert re.search(r"Teacher: \d+\.\d ms a batch \(median\), \d+% of the training time", text)

    student = read_checkpoint(folder / "last.pth")
    assert student.weights == ("net", "ema_net"), "the student is averaged, without a flag"
    assert student.architecture.backbone == STUDENT
    load_net(student, CPU, "ema_net")  # a checkpoint like any other, for evaluate and predict


def test_the_iou_that_is_said_is_the_teachers(pairs: Pairs, teacher_file: Path) -> None:
    """At its own size: what `evaluate` says of its average."""
    net = load_net(read_checkpoint(teacher_file), CPU, "ema_net")
    _, validation = pairs
    ious = evaluate(net, validation_loader(ValidationSet(validation, 64), 4, 0), CPU)
    assert mean_iou(load_teacher(teacher_file), validation, 64, 0, CPU) == pytest.approx(sum(ious) / len(ious))


# --- what is refused --------------------------------------------------------------------------------------------------


def parsed(*flags: str) -> DistillOptions:
    needed = ["distill", "--dataset-path", "x", "--checkpoint-dir", "y", "--teacher-checkpoint", "z/last.pth"]
    return options_of(cli._parser().parse_args([*needed, *flags]), DistillOptions)


def test_flags() -> None:
    chosen = parsed()
    assert (chosen.use_ema, chosen.distill_weight, chosen.temperature) == (True, 0.5, 2.0)
    assert chosen.teacher_checkpoint == Path("z/last.pth") and chosen.teacher_backbone is None
    assert not parsed("--no-use-ema").use_ema
    assert parsed("--teacher-checkpoint", "y/teacher/last.pth").checkpoint_dir == Path("y"), "a folder within is fine"
    chosen = parsed("--distill-weight", "0.9", "--temperature", "4", "--teacher-backbone", "a", "--backbone", "b")
    assert (chosen.distill_weight, chosen.temperature, chosen.teacher_backbone, chosen.backbone) == (0.9, 4.0, "a", "b")


def test_help_begins_with_the_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["distill", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    places = [text.index(group) for group in (" teacher: ", " data: ", " model: ", " exponential moving average: ")]
    assert places == sorted(places)
    for shown in ("the teacher (default: 0.5)", "are compared (default: 2.0)", "(default: 0.999)"):
        assert shown in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--distill-weight 1.5", r"--distill-weight must be in \[0, 1\], got 1.5"),
        ("--distill-weight nan", r"--distill-weight must be in \[0, 1\], got nan"),
        ("--temperature 0", "--temperature must be a number above 0, got 0.0"),
        ("--temperature inf", "--temperature must be a number above 0, got inf"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--checkpoint-dir z", "z/last.pth is in --checkpoint-dir z, where this run puts the student's files"),
        ("--teacher-checkpoint y/previous/last.pth", "is in --checkpoint-dir y, where this run puts the student's"),
    ],
)
def test_options_that_cannot_be_meant(flags: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parsed(*flags.split())


def test_an_average_that_the_file_asks_for_and_a_flag_does_not(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"ema": true}')
    with pytest.raises(UserError, match=r"--use-ema False and --training-params .*, which says True, conflict"):
        parsed("--no-use-ema", "--training-params", str(tmp_path / "params.json"))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("missing", r"--teacher-checkpoint: there is no checkpoint at .*none.pth"),
        ("damaged", r"--teacher-checkpoint: .*is not a checkpoint, or is cut short"),
        ("bare weights", r"bare.pth has no weights under 'net': it is a bare state_dict of 1 tensors \(weight\)"),
        ("no options", r"does not say how its network is built: it has 'net', but no 'options'"),
        ("older", r"was written by another version of fastema: its options have no num_experts"),
        ("other backbone", rf"has the backbone {BACKBONE}, not resnet18: give the checkpoint that you mean"),
    ],
)
def test_a_teacher_that_cannot_be_used(
    case: str, said: str, teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before any image is read and without a trace on the disk."""
    content = load_checkpoint(teacher_file)
    old = {name: value for name, value in content["options"].items() if name != "num_experts"}
    files: dict[str, Any] = {
        "bare weights": ("bare.pth", {"weight": torch.zeros(1)}),
        "no options": ("own.pth", {"net": content["net"]}),
        "older": ("old.pth", {**content, "options": old}),
    }
    file = tmp_path / {"missing": "none.pth", "damaged": "bad.pth"}.get(case, "")
    if case == "damaged":
        file.write_bytes(b"PK\x03\x04 and then the disk was full")
    elif case == "other backbone":
        file = teacher_file
    elif case in files:
        file = tmp_path / files[case][0]
        torch.save(files[case][1], file)
    flags = ["distill", "--dataset-path", "nowhere", "--checkpoint-dir", str(tmp_path / "run"), *TINY]
    flags += ["--teacher-backbone", "resnet18"] if case == "other backbone" else []
    assert cli.main([*flags, "--teacher-checkpoint", str(file)]) == 2
    message = capsys.readouterr().err
    assert re.search(said, message), message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_pretraining_tag_is_no_other_backbone(teacher_file: Path) -> None:
    assert load_teacher(teacher_file, f"{BACKBONE}.lamb_in1k").img_size == 64

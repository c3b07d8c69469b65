"""Tiny trainings: resume, accumulation, stages, averages, files, errors."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import torch

from fastema import FastEMA, cli
from fastema.checkpoint import CheckpointError, load_checkpoint, load_weights
from fastema.errors import UserError
from fastema.segmentation.train import averaging, checkpoints
from fastema.segmentation.train import trainer as trainer_module
from fastema.segmentation.train.checkpoints import ensure_writable, move_previous_run, require_space
from fastema.segmentation.train.trainer import Trainer
from segmentation.phases import PHASE_1, PHASE_2
from segmentation.runs import differences
from segmentation.runs import output_of as output
from segmentation.runs import tiny_options as options
from segmentation.runs import tiny_run as trainer

BASE_LINE = re.compile(r"^Epoch (\d+): Loss: \d\.\d{4} \| IoU: \d\.\d{4} \| LR: \d\.\d{6}$", re.MULTILINE)
EMA_LINE = re.compile(
    r"^Epoch (\d+): Loss: \d\.\d{4} \| IoU: \d\.\d{4} \(base\) \| EMA IoU: \d\.\d{4} \| LR: \d\.\d{6}$", re.MULTILINE
)


@pytest.fixture(scope="module")
def one_epoch(pairs, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Return a run of one epoch without an average."""
    return trained_once(pairs, tmp_path_factory)


@pytest.fixture(scope="module")
def one_epoch_averaged(pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of one epoch with an average."""
    run = trained_once(pairs, tmp_path_factory, use_ema=True, **CONSTANT)
    return run.options.checkpoint_dir / "last.pth"


CONSTANT: dict[str, Any] = {"ema_decay": 0.5, "ema_decay_type": "constant"}


def trained_once(pairs, tmp_path_factory: pytest.TempPathFactory, **chosen: Any) -> Trainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "write_curves", lambda *_: None)
        patch.setattr(trainer_module, "write_predictions", lambda *_: None)
        run = trainer(pairs, options(tmp_path_factory.mktemp("run"), epochs=1, **chosen))
        run.fit()
    return run


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_with_an_ema(pairs, tmp_path: Path, pictures: None) -> None:
    run = trainer(pairs, options(tmp_path / "run", use_ema=True))
    run.fit()
    text = output(run)
    assert [match[1] for match in EMA_LINE.finditer(text)] == ["1", "2"]
    assert "ema.update()" in text
    assert "training step" in text
    assert re.search(r"Better: (neither|the EMA by|the base by)", text)

    folder = tmp_path / "run"
    written = {file.name for file in folder.iterdir()}
    pictures = {"predictions.png", "curves.png"}
    # Of TensorBoard's there are files only where it is installed.
    assert written - {"tensorboard"} == {"last.pth", "best_model.pth", "best_ema.pth", "history.csv", *pictures}
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [float(row["iou"]) for row in rows] == [record.iou for record in run.history]

    last = load_checkpoint(folder / "last.pth")
    assert not differences(last["net"], run.net.state_dict())
    assert not differences(last["ema_net"], run.ema.shadow_state_dict())
    assert differences(last["net"], last["ema_net"])
    best = load_checkpoint(folder / "best_model.pth")
    best_ema = load_checkpoint(folder / "best_ema.pth")
    assert best["history"][-1]["iou"] == max(record.iou for record in run.history)
    assert best_ema["history"][-1]["ema_iou"] == max(record.ema_iou for record in run.history)
    assert load_weights(run.net, folder / "best_ema.pth") == "ema_net"
    assert last["bests"] == {
        "iou": max(record.iou for record in run.history),
        "ema_iou": max(record.ema_iou for record in run.history),
    }


def test_a_checkpoint_of_every_so_many_epochs_stays_as_it_was(pairs, tmp_path: Path) -> None:
    trainer(pairs, options(tmp_path / "run", epochs=5, save_every=2)).fit()
    kept = {file.name: load_checkpoint(file)["epoch"] for file in (tmp_path / "run").glob("checkpoint_*.pth")}
    assert kept == {"checkpoint_epoch2.pth": 2, "checkpoint_epoch4.pth": 4}
    assert load_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 5


def test_how_the_experts_are_used_is_said_and_recorded(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", epochs=1, num_experts=3, top_k=1))
    run.fit()
    usage = run.history[0].expert_usage
    assert [sum(level) for level in usage] == pytest.approx([1.0] * len(usage))
    assert re.search(r"Experts, share of images \(mean of \d levels\): .*texture \d+%", output(run))
    assert 0 < run.history[0].data_wait < 1
    assert "of the training time went by waiting for images" in output(run)


def test_a_run_without_an_ema(one_epoch: Trainer) -> None:
    assert BASE_LINE.search(output(one_epoch))
    assert "EMA" not in output(one_epoch)
    folder = one_epoch.options.checkpoint_dir
    assert not (folder / "best_ema.pth").exists()
    assert "ema_net" not in load_checkpoint(folder / "last.pth")


def test_the_same_seed_gives_the_same_run_and_another_another(pairs, tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = trainer(pairs, options(tmp_path / name, epochs=1, seed=seed))
        run.fit()
        losses.append(run.history[0].loss)
    assert losses[0] == losses[1] != losses[2]


def test_validation_does_not_touch_the_training(pairs, tmp_path: Path) -> None:
    """Base, then EMA through the swap: weights, statistics and mode are afterwards what they were."""
    run = trainer(pairs, options(tmp_path / "run", use_ema=True))
    run._train_epoch(1)
    before = {name: tensor.clone() for name, tensor in run.net.state_dict().items()}
    base, averaged = run._validate()
    assert not differences(run.net.state_dict(), before)
    assert run.net.training
    assert not run.ema.is_applied
    assert len(base) == len(averaged[0]) == 4


# --- accumulation -----------------------------------------------------------------------------------------------------


def test_the_ema_is_updated_once_for_each_real_step(pairs, tmp_path: Path) -> None:
    """Ten images, groups of 2 x 4: a whole group and one of a single batch of 2 - two steps, not three batches."""
    run = trainer(pairs, options(tmp_path / "run", use_ema=True, accumulation_steps=2))
    stepped = []
    run.optimizer.adamw.register_step_post_hook(lambda *_: stepped.append(1))
    run._train_epoch(1)
    assert len(stepped) == run.ema.num_updates == 2


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_accumulated_batches_are_one_large_batch(
    pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Also in the short last group: its gradient is a mean over what it has."""
    monkeypatch.setattr(trainer_module, "freeze", lambda *_: None)
    weights = []
    for name, size, accumulation in (("whole", 8, 1), ("parts", batch_size, 8 // batch_size)):
        chosen = {"batch_size": size, "accumulation_steps": accumulation, "lr": 0.01, "scheduler": "none"}
        run = trainer(pairs, options(tmp_path / name, **chosen))
        # SGD shows the gradient as it is; normalisation by the running statistics makes images independent.
        groups = [{"params": group["params"]} for group in run.optimizer.adamw.param_groups]
        run.optimizer.adamw = torch.optim.SGD(groups, lr=0.0)
        run.net.eval()
        run.net.train = lambda mode=True, net=run.net: net  # type: ignore[method-assign]
        assert len(run._train_epoch(1).step_seconds) == 2
        weights.append(torch.cat([parameter.detach().flatten() for parameter in run.net.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-6


# --- stages -----------------------------------------------------------------------------------------------------------


def trained_parts(run: Trainer, epoch: int) -> tuple[bool, bool]:
    """Train an epoch; return whether the decoder, and whether the backbone, changed in weights or statistics."""
    parts = {name: {k: v.clone() for k, v in getattr(run.net, name).state_dict().items()} for name in PARTS}
    run._train_epoch(epoch)
    return tuple(bool(differences(parts[name], getattr(run.net, name).state_dict())) for name in PARTS)  # type: ignore[return-value]


PARTS = ("decoder", "backbone")


def test_the_backbone_stands_still_in_stage_1_and_moves_in_stage_2(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", epochs=3, stage1_epochs=1, stage2_batch_size=2))
    assert trained_parts(run, 1) == (True, False)
    moments = [dict(state) for state in run.optimizer.adamw.state.values()]
    optimizer = run.optimizer.adamw
    assert trained_parts(run, 2) == (True, True)
    assert run.optimizer.adamw is optimizer, "one optimizer for the whole run"
    assert len(optimizer.state) > len(moments) > 0
    decoder_steps = {int(optimizer.state[parameter]["step"]) for parameter in run.net.decoder.parameters()}
    assert decoder_steps <= {3 + 5, 3 + 5 - 1}, "the decoder's moments went on: 3 steps of 4 images, then 5 of 2"
    text = output(run)
    assert "Stage 1: the decoder trains, the backbone is frozen; 4 images a step" in text
    assert "Stage 2: everything trains, the backbone at a tenth of the rate; 2 images a step" in text


def test_skipping_stage_1_trains_everything_from_the_first_epoch(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", stage1_epochs=1, skip_stage1=True))
    assert trained_parts(run, 1) == (True, True)


def test_the_backbone_opens_from_its_deep_end(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", epochs=10, progressive_unfreeze=True))
    levels = run.net.backbone_levels()
    opened = []
    for epoch in (1, 2, 4, 6):
        before = [[p.detach().clone() for m in modules for p in m.parameters()] for modules in levels]
        run._train_epoch(epoch)
        after = [[p for m in modules for p in m.parameters()] for modules in levels]
        moved = [bool(differences(a, [p.detach() for p in b])) for a, b in zip(before, after, strict=True)]
        assert moved == sorted(moved), "never a shallow level before a deeper one"
        opened.append(sum(moved))
    assert opened == [1, 2, 4, 5]


def test_every_group_of_parameters_has_its_rate(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", lr=0.01, min_lr=0.001))
    rates = []
    run.optimizer.adamw.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    run._train_epoch(1)
    run._train_epoch(2)
    assert rates[0] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert rates[-1] == pytest.approx([0.001, 0.001, 0.0001, 0.0001]), "the floor is the group's own"
    backbone = {id(parameter) for parameter in run.net.backbone.parameters()}
    for i, group in enumerate(run.optimizer.adamw.param_groups):
        assert all((id(parameter) in backbone) == (i >= 2) for parameter in group["params"])
        assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for parameter in group["params"])


# --- precision --------------------------------------------------------------------------------------------------------


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", amp="bf16", num_experts=7))
    seen = []
    first = next(module for module in run.net.backbone.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    run._train_epoch(1)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in run.net.parameters()} == {torch.float32}


def test_float16_is_refused_on_a_cpu(pairs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--amp fp16 needs a GPU, and this run is on cpu: .* Use --amp bf16"):
        trainer(pairs, options(tmp_path / "run", amp="fp16"))


def test_a_step_that_the_scaler_leaves_out_is_no_update_of_the_ema(pairs, tmp_path: Path) -> None:
    """A scaler works on a CPU too, only float16 does not: an overflow in the first of three steps."""
    run = trainer(pairs, options(tmp_path / "run", use_ema=True))
    run.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    backward = run.optimizer.backward
    calls = []

    def overflowing(loss: torch.Tensor) -> None:
        calls.append(1)
        backward(loss * (math.inf if len(calls) == 1 else 1.0))

    run.optimizer.backward = overflowing  # type: ignore[method-assign]
    assert len(run._train_epoch(1).step_seconds) == 3
    assert run.ema is not None
    assert run.ema.num_updates == 2
    assert run.optimizer.scaler.get_scale() == 2.0**9
    assert all(bool(parameter.isfinite().all()) for parameter in run.net.parameters())


def test_gradients_that_overflow_at_every_scale_stop_the_run(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", batch_size=1))
    run.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-8)
    backward = run.optimizer.backward
    run.optimizer.backward = lambda loss: backward(loss * math.inf)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"the gradient became inf in epoch 1; no epoch was finished yet"):
        run.fit()


# --- averages ---------------------------------------------------------------------------------------------------------


def test_several_averages_at_once(pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(pairs, options(tmp_path / "run", use_ema=True, ema_decays=(0.9, 0.5), ema_decay_type="constant"))
    single = trainer(pairs, options(tmp_path / "single", use_ema=True, ema_decay=0.5, ema_decay_type="constant"))
    monkeypatch.setattr(run, "_validate", lambda: ([0.5, 0.7], [[0.1, 0.3], [0.2, 0.4]]))
    run.fit()
    single.fit()
    assert run.ema is not None and single.ema is not None
    assert not differences(run.ema.shadow_state_dict(1), single.ema.shadow_state_dict())
    assert re.search(r"IoU: 0.6000 \(base\) \| EMA IoU: 0.2000 \(0.9\), 0.3000 \(0.5\) \| LR", output(run))
    rows = list(csv.DictReader((tmp_path / "run" / "history.csv").open()))
    assert [(row["ema_iou"], row["ema_iou_0.5"]) for row in rows] == [("0.2", "0.30000000000000004")] * 2
    last, best = (load_checkpoint(tmp_path / "run" / name) for name in ("last.pth", "best_ema.pth"))
    assert not differences(last["ema_net"], run.ema.shadow_state_dict(0))
    assert not differences(best["ema_net"], run.ema.shadow_state_dict(1)), "best_ema.pth has the best of them"
    assert not differences(best["ema"], last["ema"]), "and the state of all"


def test_other_decays_after_a_resume(pairs, tmp_path: Path, one_epoch_averaged: Path) -> None:
    """Averages of a decay that was there go on; new ones start from the weights."""
    last = one_epoch_averaged
    chosen = {"use_ema": True, "ema_decay_type": "constant", "resume_from": last}
    run = trainer(pairs, options(tmp_path / "run", ema_decays=(0.9, 0.5), **chosen))
    assert "last.pth has no EMA of decay 0.9: from the weights of epoch 1" in output(run)
    saved = load_checkpoint(last)
    assert run.ema is not None
    assert not differences(run.ema.shadow_state_dict(0), saved["net"])
    assert not differences(run.ema.shadow_state_dict(1), saved["ema_net"])


def test_the_average_starts_before_the_epoch_that_was_asked_for(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", epochs=3, use_ema=True, ema_start_epoch=3, ema_decay_type="linear"))
    assert run.ema is None
    run.fit()
    assert "EMA: starts before epoch 3 (--ema-start-epoch)" in output(run)
    assert [record.ema_iou is None for record in run.history] == [True, True, False]
    assert run.history[2].ema_decay == pytest.approx(0.999), "a schedule with an end begins with the average"


# --- resume -----------------------------------------------------------------------------------------------------------


def interrupted_after(run: Trainer, epoch: int) -> None:
    """Train until the checkpoint of `epoch` is written, then interrupt."""
    save = run._save

    def save_and_stop() -> None:
        save()
        if run.epoch == epoch:
            raise KeyboardInterrupt

    run._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.fit()


RUNS: dict[str, dict[str, Any]] = {
    "one stage": {
        "epochs": 3,
        "ema_decay_type": "threshold",
        "warmup_epochs": 1,
        "accumulation_steps": 2,
        "num_experts": 2,
    },
    "two stages, resumed while the backbone opens": {
        "epochs": 4,
        "stage1_epochs": 1,
        "progressive_unfreeze": True,
        "stage2_batch_size": 2,
        "stage2_lr": 5e-4,
        "scheduler": "cosine_restart",
        "ema_decays": (0.9, 0.99),
        "ema_decay_type": "exp",
        "ema_start_epoch": 2,
        "amp": "bf16",
    },
    "resumed between the stages": {"epochs": 3, "stage1_epochs": 2, "scheduler": "onecycle", "ema_start_epoch": 3},
}


@pytest.mark.parametrize("chosen", RUNS.values(), ids=RUNS)
def test_resume_is_exact(pairs, tmp_path: Path, chosen: dict[str, Any]) -> None:
    """All epochs = 2, Ctrl-C, resume, the rest; bit for bit, even with another number of workers."""
    chosen = {"use_ema": True, **chosen}
    trainer(pairs, options(tmp_path / "whole", **chosen)).fit()

    interrupted_after(trainer(pairs, options(tmp_path / "parts", **chosen)), epoch=2)
    torch.manual_seed(12345)  # as after a restart: nothing of the first part is left in the process
    last = tmp_path / "parts" / "last.pth"
    trainer(pairs, options(tmp_path / "parts", resume_from=last, num_workers=2, **chosen)).fit()

    whole, parts = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name in ("net", "ema_net", "ema", "optimizer", "scaler", "epoch", "bests", "ema_start_epoch"):
        assert not differences(whole[name], parts[name]), name
    assert not differences(whole["rng"]["torch"], parts["rng"]["torch"])
    assert len(whole["history"]) == len(parts["history"]) == chosen["epochs"]
    for a, b in zip(whole["history"], parts["history"], strict=True):
        assert {**a, "seconds": 0, "data_wait": 0} == {**b, "seconds": 0, "data_wait": 0}
    best = [load_checkpoint(tmp_path / name / "best_ema.pth")["epoch"] for name in ("whole", "parts")]
    assert best[0] == best[1], "the best score of the EMA survives the resume"


def test_a_checkpoint_without_an_ema_starts_it_from_its_weights(pairs, tmp_path: Path, one_epoch: Trainer) -> None:
    last = one_epoch.options.checkpoint_dir / "last.pth"
    run = trainer(pairs, options(tmp_path / "second", use_ema=True, resume_from=last))
    assert "has no EMA: it starts here, from the weights of epoch 1" in output(run)
    assert not differences(run.ema.shadow_state_dict(), load_checkpoint(last)["net"])
    assert run.ema.num_updates == 0
    run.fit()
    assert [record.epoch for record in run.history] == [1, 2]
    assert (tmp_path / "second" / "best_model.pth").exists(), "a new folder gets best files of its own"


def test_resume_says_what_is_different(pairs, tmp_path: Path, one_epoch_averaged: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", epochs=3, lr=0.01, resume_from=one_epoch_averaged, **CONSTANT))
    assert "after epoch 1; --epochs 1 → 3, --lr 0.001 → 0.01, --use-ema True → False" in output(run)
    assert "is dropped: --use-ema is not given" in output(run)


def test_the_weight_decay_of_a_resumed_run_is_the_one_it_is_given(pairs, tmp_path: Path, one_epoch: Trainer) -> None:
    """An optimizer's state contains the old one."""
    last = one_epoch.options.checkpoint_dir / "last.pth"
    run = trainer(pairs, options(tmp_path / "run", weight_decay=0.3, resume_from=last))
    assert [group["weight_decay"] for group in run.optimizer.adamw.param_groups] == [0.3, 0.0, 0.3, 0.0]
    assert "--weight-decay 0.0001 → 0.3" in output(run)


def test_resume_errors(pairs, tmp_path: Path, one_epoch: Trainer) -> None:
    last = one_epoch.options.checkpoint_dir / "last.pth"
    with pytest.raises(UserError, match=r"has done its 1 epochs: --epochs is the total"):
        trainer(pairs, options(tmp_path / "run", epochs=1, resume_from=last))
    longer = {"epochs": 2, "resume_from": last}
    with pytest.raises(
        UserError, match="trained with --backbone mobilenetv3_small_050, not --backbone edgenext_xx_sma"
    ):
        trainer(pairs, options(tmp_path / "run", backbone="edgenext_xx_small", **longer))
    with pytest.raises(UserError, match="trained with --num-experts 0, not --num-experts 3"):
        trainer(pairs, options(tmp_path / "run", num_experts=3, **longer))
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        trainer(pairs, options(tmp_path / "run", resume_from=tmp_path / "run" / "none.pth"))
    torch.save({"net": {}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"cannot be resumed from: it has no optimizer, history, options"):
        trainer(pairs, options(tmp_path / "run", resume_from=tmp_path / "foreign.pth"))


def test_the_two_phases_of_a_training_run_as_they_stand(
    pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only sizes are changed: the first phase goes on from a best model, the second goes on from it in a new folder."""
    monkeypatch.chdir(tmp_path)
    data = pairs[0][0].image.parents[2]
    small = f"--dataset-path {data} --backbone mobilenetv3_small_050 --num-experts 2 --img-size 64 --device cpu"
    start = f"train --checkpoint-dir checkpoints {small} --no-pretrained --epochs 2 --stage1-epochs 1 --num-workers 0"
    assert cli.main(start.split()) == 0
    assert cli.main(f"{PHASE_1} {small} --num-workers 0 --epochs 3".split()) == 0
    assert "Resuming from checkpoints/best_model.pth after epoch" in capsys.readouterr().out
    assert cli.main(f"{PHASE_2} {small} --num-workers 0 --epochs 4".split()) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"after epoch \d; --epochs 3 → 4, --use-ema False → True", text) or "--epochs 2 → 4" in text
    assert "checkpoints/best_model.pth has no EMA: it starts here, from the weights of epoch" in text
    assert load_checkpoint(tmp_path / "checkpoints_ema" / "best_ema.pth")["ema_net"]
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pth")["epoch"] == 3, "the first phase's folder is as it was"


# --- what stops a run -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(pairs, tmp_path: Path) -> None:
    calls = []

    def diverging(net, precision):
        def objective(images: torch.Tensor, masks: torch.Tensor) -> Any:
            calls.append(1)
            output = net(images)
            return output.logits.mean() * (math.nan if len(calls) > 4 else 1.0), output  # three batches an epoch

        return objective

    run = trainer(pairs, options(tmp_path / "run", use_ema=True), make_objective=diverging)
    with pytest.raises(
        UserError, match=r"the loss became nan in epoch 2; the last good checkpoint is .*last\.pth \(ep"
    ):
        run.fit()
    weights = load_checkpoint(tmp_path / "run" / "last.pth")
    assert all(bool(tensor.isfinite().all()) for tensor in weights["ema_net"].values())
    assert weights["epoch"] == 1
    assert all(bool(parameter.isfinite().all()) for parameter in run.net.parameters())


@pytest.mark.parametrize(
    ("error", "changes", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            {"num_experts": 3},
            "out of memory in epoch 1; no epoch was finished yet (CUDA out of memory. Tried to allocate 2 GiB): try, "
            "in this order: a smaller --batch-size than 4 (with more --accumulation-steps the step stays the same); a "
            "smaller --img-size than 64; fewer --num-experts than 3; a smaller --backbone",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            {"stage2_batch_size": 2, "num_workers": 1},
            "a smaller --stage2-batch-size than 2",
        ),
        (RuntimeError("CUDA error: out of memory\nmore"), {}, "(CUDA error: out of memory): try, in this order"),
    ],
)
def test_out_of_memory_says_what_to_lower(
    pairs, tmp_path: Path, error: Exception, changes: dict[str, Any], said: str
) -> None:
    def too_large(net, precision):
        def objective(images: torch.Tensor, masks: torch.Tensor) -> Any:
            raise error

        return objective

    run = trainer(pairs, options(tmp_path / "run", **changes), make_objective=too_large)
    with pytest.raises(UserError, match=re.escape(said)):
        run.fit()


def test_out_of_memory_for_averages_that_start_in_mid_run_says_so(
    pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(averaging, "FastEMA", too_large)
    run = trainer(pairs, options(tmp_path / "run", use_ema=True, ema_start_epoch=2))
    with pytest.raises(UserError, match=r"out of memory in epoch 2; the last good .* is .*last\.pth \(epoch 1\)"):
        run.fit()


def test_another_error_is_not_taken_for_a_lack_of_memory(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run"), make_objective=lambda net, precision: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        run.fit()


def test_a_disk_that_fills_up_names_the_last_good_checkpoint(
    pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(pairs, options(tmp_path / "run"))
    save = checkpoints.save_checkpoint

    def full(path: Path, **content: Any) -> None:
        if content["epoch"] == 2:
            raise CheckpointError(f"cannot write the checkpoint {path}: No space left on device")
        save(path, **content)

    monkeypatch.setattr(checkpoints, "save_checkpoint", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; the last good .* is .*last\.pth \(epoch 1\)"):
        run.fit()
    assert load_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 1


def test_a_disk_that_is_full_is_found_before_the_training(
    pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = checkpoints.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=30_000_000))
    with pytest.raises(UserError, match=r"no space left for this run in .*: its checkpoints are \d+\.\d MB each"):
        trainer(pairs, options(tmp_path / "run", use_ema=True))
    require_space(tmp_path, 1_000_000)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    ensure_writable(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--checkpoint-dir .*file/run cannot be written to: Not a directory"):
        ensure_writable(tmp_path / "file" / "run")


def test_an_unusable_device(pairs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device nonsense cannot be used here"):
        trainer(pairs, options(tmp_path / "run", device="nonsense"))


# --- the folder -------------------------------------------------------------------------------------------------------


def test_an_earlier_run_is_set_aside_not_overwritten(tmp_path: Path) -> None:
    assert move_previous_run(tmp_path, keep=None) is None
    for name in ("last.pth", "history.csv", "notes.txt"):
        (tmp_path / name).write_text(name)
    assert move_previous_run(tmp_path, keep=tmp_path / "last.pth") is None, "the run goes on: everything stays"
    assert move_previous_run(tmp_path, keep=None) == tmp_path / "previous"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "previous"]
    assert (tmp_path / "previous" / "last.pth").read_text() == "last.pth"


# --- with the real thing ----------------------------------------------------------------------------------------------


def test_the_trainers_ema_is_the_one_we_publish(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", use_ema=True, ema_decay=0.9, ema_decay_type="constant"))
    assert isinstance(run.ema, FastEMA)
    expected = {name: tensor.double().clone() for name, tensor in run.net.named_parameters()}

    def average(*_: object) -> None:
        for name, parameter in run.net.named_parameters():
            expected[name] = (0.9 * expected[name] + 0.1 * parameter.double()).detach()

    run.optimizer.adamw.register_step_post_hook(average)
    run._train_epoch(1)
    shadow = run.ema.shadow_state_dict()
    assert max(float((shadow[name].double() - value).abs().max()) for name, value in expected.items()) < 1e-6

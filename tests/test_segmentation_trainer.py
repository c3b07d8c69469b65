"""Whole, tiny trainings: resume, accumulation, what is written, what stops a run."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastema.segmentation.extras import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import torch
from rich.console import Console

from fastema import FastEMA
from fastema.checkpoint import CheckpointError, load_checkpoint, load_weights
from fastema.segmentation import trainer as trainer_module
from fastema.segmentation.errors import UserError
from fastema.segmentation.layout import Pair, list_pairs
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.run_folder import set_aside
from fastema.segmentation.split import hold_out
from fastema.segmentation.synthetic import ensure_dataset
from fastema.segmentation.trainer import Trainer

BASE_LINE = re.compile(r"^Epoch (\d+): Loss: \d\.\d{4} \| IoU: \d\.\d{4} \| LR: \d\.\d{6}$", re.MULTILINE)
EMA_LINE = re.compile(
    r"^Epoch (\d+): Loss: \d\.\d{4} \| IoU: \d\.\d{4} \(base\) \| EMA IoU: \d\.\d{4} \| LR: \d\.\d{6}$", re.MULTILINE
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and wait for it ten times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Pair], list[Pair]]:
    folder = ensure_dataset(tmp_path_factory.mktemp("data"), seed=0, count=14, size=64)
    training, validation = hold_out(list_pairs(folder).pairs, 0.3)
    # Whatever the hash says: ten to train on, so that the groups below are what they say.
    spare = validation + training
    return spare[4:14], spare[:4]


def options(folder: Path, **changes: Any) -> TrainOptions:
    folder.mkdir(exist_ok=True)
    defaults: dict[str, Any] = {
        "dataset_path": "synthetic",
        "checkpoint_dir": folder,
        "backbone": "mobilenetv3_small_050",
        "pretrained": False,
        "img_size": 64,
        "batch_size": 4,
        "epochs": 2,
        "device": "cpu",
    }
    return TrainOptions(**{**defaults, **changes})


def trainer(pairs: tuple[list[Pair], list[Pair]], chosen: TrainOptions) -> Trainer:
    chosen.check()
    return Trainer(chosen, *pairs, Console(file=io.StringIO(), width=200))


def output(run: Trainer) -> str:
    assert isinstance(run.console.file, io.StringIO)
    return run.console.file.getvalue()


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Every place in which two nested values differ, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        return [p for i, (x, y) in enumerate(zip(a, b, strict=True)) for p in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [where]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_with_an_ema(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", use_ema=True))
    run.fit()
    text = output(run)
    assert [match[1] for match in EMA_LINE.finditer(text)] == ["1", "2"]
    assert "ema.update()" in text
    assert "training step" in text
    assert re.search(r"Better: (neither|the EMA by|the base by)", text)

    folder = tmp_path / "run"
    written = {file.name for file in folder.iterdir()}
    assert written == {"last.pth", "best_model.pth", "best_ema.pth", "history.csv", "predictions.png"}
    assert (folder / "predictions.png").read_bytes().startswith(b"\x89PNG")
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


def test_a_run_without_an_ema(pairs, tmp_path: Path) -> None:
    run = trainer(pairs, options(tmp_path / "run", epochs=1))
    run.fit()
    assert BASE_LINE.search(output(run))
    assert "EMA" not in output(run)
    assert not (tmp_path / "run" / "best_ema.pth").exists()
    assert "ema_net" not in load_checkpoint(tmp_path / "run" / "last.pth")


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
    assert len(base) == len(averaged) == 4


# --- accumulation -----------------------------------------------------------------------------------------------------


def test_the_ema_is_updated_once_for_each_real_step(pairs, tmp_path: Path) -> None:
    """Ten images, groups of 2 x 4: a whole group and one of a single batch of 2 - two steps, not three batches."""
    run = trainer(pairs, options(tmp_path / "run", use_ema=True, accumulation_steps=2))
    assert run.steps_per_epoch == 2
    stepped = []
    run.optimizer.register_step_post_hook(lambda *_: stepped.append(1))
    run._train_epoch(1)
    assert len(stepped) == run.ema.num_updates == 2


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_accumulated_batches_are_one_large_batch(pairs, tmp_path: Path, batch_size: int) -> None:
    """Also in the short last group: its gradient is a mean over what it has."""
    weights = []
    for name, size, accumulation in (("whole", 8, 1), ("parts", batch_size, 8 // batch_size)):
        run = trainer(pairs, options(tmp_path / name, batch_size=size, accumulation_steps=accumulation))
        # SGD shows the gradient as it is; normalisation by the running statistics makes images independent.
        run.optimizer = torch.optim.SGD(run.net.parameters(), lr=0.01)
        run.net.eval()
        run.net.train = lambda mode=True, net=run.net: net  # type: ignore[method-assign]
        run._train_epoch(1)
        assert run.steps_per_epoch == 2
        weights.append(torch.cat([parameter.detach().flatten() for parameter in run.net.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-6


# --- resume -----------------------------------------------------------------------------------------------------------


def interrupted_after(run: Trainer, epoch: int) -> None:
    """Trains until the checkpoint of `epoch` is written, then presses Ctrl-C."""
    save = run._save

    def save_and_stop() -> None:
        save()
        if run.epoch == epoch:
            raise KeyboardInterrupt

    run._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.fit()


@pytest.mark.parametrize("decay_type", ["threshold", "exp"])
def test_resume_is_exact(pairs, tmp_path: Path, decay_type: str) -> None:
    """4 epochs = 2, Ctrl-C, resume, 2; bit for bit, even with another number of workers."""
    chosen = {"epochs": 4, "use_ema": True, "ema_decay_type": decay_type, "warmup_epochs": 1, "accumulation_steps": 2}
    trainer(pairs, options(tmp_path / "whole", **chosen)).fit()

    interrupted_after(trainer(pairs, options(tmp_path / "parts", **chosen)), epoch=2)
    torch.manual_seed(12345)  # as after a restart: nothing of the first part is left in the process
    last = tmp_path / "parts" / "last.pth"
    trainer(pairs, options(tmp_path / "parts", resume_from=last, num_workers=2, **chosen)).fit()

    whole, parts = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name in ("net", "ema_net", "ema", "optimizer", "epoch"):
        assert not differences(whole[name], parts[name]), name
    assert len(whole["history"]) == len(parts["history"]) == 4
    for a, b in zip(whole["history"], parts["history"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    best = [load_checkpoint(tmp_path / name / "best_ema.pth")["epoch"] for name in ("whole", "parts")]
    assert best[0] == best[1], "the best score of the EMA survives the resume"


def test_a_checkpoint_without_an_ema_starts_it_from_its_weights(pairs, tmp_path: Path) -> None:
    first = trainer(pairs, options(tmp_path / "first", epochs=1))
    first.fit()
    last = tmp_path / "first" / "last.pth"
    run = trainer(pairs, options(tmp_path / "second", use_ema=True, resume_from=last))
    assert "has no EMA: it starts here, from the weights of epoch 1" in output(run)
    assert not differences(run.ema.shadow_state_dict(), load_checkpoint(last)["net"])
    assert run.ema.num_updates == 0
    run.fit()
    assert [record.epoch for record in run.history] == [1, 2]
    assert (tmp_path / "second" / "best_model.pth").exists(), "a new folder gets best files of its own"


def test_resume_says_what_is_different(pairs, tmp_path: Path) -> None:
    trainer(pairs, options(tmp_path / "run", epochs=1, use_ema=True)).fit()
    last = tmp_path / "run" / "last.pth"
    run = trainer(pairs, options(tmp_path / "run", epochs=3, lr=0.01, resume_from=last))
    assert "after epoch 1; --epochs 1 → 3, --lr 0.001 → 0.01, --use-ema True → False" in output(run)
    assert "left behind: --use-ema is not given" in output(run)


def test_resume_errors(pairs, tmp_path: Path) -> None:
    trainer(pairs, options(tmp_path / "run", epochs=1)).fit()
    last = tmp_path / "run" / "last.pth"
    with pytest.raises(UserError, match=r"has done its 1 epochs: --epochs is the total"):
        trainer(pairs, options(tmp_path / "run", epochs=1, resume_from=last))
    with pytest.raises(UserError, match="trained with --backbone mobilenetv3_small_050, not edgenext_xx_small"):
        trainer(pairs, options(tmp_path / "run", backbone="edgenext_xx_small", resume_from=last))
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        trainer(pairs, options(tmp_path / "run", resume_from=tmp_path / "run" / "none.pth"))
    torch.save({"net": {}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"cannot be resumed from: it has no optimizer, history, options"):
        trainer(pairs, options(tmp_path / "run", resume_from=tmp_path / "foreign.pth"))


# --- what stops a run -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(
    pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(pairs, options(tmp_path / "run", use_ema=True))
    calls = []

    def diverges(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return logits.mean() * (math.nan if len(calls) > 4 else 1.0)  # three batches an epoch: in the second epoch

    monkeypatch.setattr(trainer_module, "structure_loss", diverges)
    with pytest.raises(UserError, match=r"the loss became nan in epoch 2; the last good checkpoint is .*last\.pth"):
        run.fit()
    weights = load_checkpoint(tmp_path / "run" / "last.pth")
    assert all(bool(tensor.isfinite().all()) for tensor in weights["ema_net"].values())
    assert weights["epoch"] == 1
    assert all(bool(parameter.isfinite().all()) for parameter in run.net.parameters())


def test_an_unusable_device(pairs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device nonsense cannot be used here"):
        trainer(pairs, options(tmp_path / "run", device="nonsense"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
        ({"img_size": 32}, "--img-size must be at least 64, got 32"),
        ({"lr": math.nan}, "--lr must be a number above 0, got nan"),
        ({"min_lr": 0.1}, r"--min-lr must be between 0 and --lr \(0.001\), got 0.1"),
        ({"ema_decay": 1.5}, r"--ema-decay must be in \[0, 1\], got 1.5"),
        ({"ema_decay": math.nan}, r"--ema-decay must be in \[0, 1\], got nan"),
        ({"val_fraction": 1.0}, "--val-fraction must be between 0 and 1, got 1.0"),
        ({"warmup_epochs": 2}, "--warmup-epochs must be below --epochs 2, got 2"),
        ({"accumulation_steps": 0}, "--accumulation-steps must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        options(tmp_path, **changes).check()


# --- the folder -------------------------------------------------------------------------------------------------------


def test_an_earlier_run_is_set_aside_not_overwritten(tmp_path: Path) -> None:
    assert set_aside(tmp_path, keep=None) is None
    for name in ("last.pth", "history.csv", "notes.txt"):
        (tmp_path / name).write_text(name)
    assert set_aside(tmp_path, keep=tmp_path / "last.pth") is None, "the run goes on: everything stays"
    assert set_aside(tmp_path, keep=None) == tmp_path / "previous"
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

    run.optimizer.register_step_post_hook(average)
    run._train_epoch(1)
    shadow = run.ema.shadow_state_dict()
    assert max(float((shadow[name].double() - value).abs().max()) for name, value in expected.items()) < 1e-6

"""`FastEMACallback` in Lightning's real Trainer, on the CPU."""

from __future__ import annotations

import doctest
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cases.lightning import Net, loader, pl, snapshot, trainer

# isort: split
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cases.callbacks import CONSTANT, DECAY, assert_average, assert_same, average
from fastema import FastEMA, extras
from fastema.integrations.lightning import (
    FastEMACallback,
    carry_over,
    validation,
    weight_averaging,
)
from fastema.integrations.lightning import callback as ours

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|logging interval|TensorBoard|exists and is not empty).*"),
]


# ---- updates ----


def test_one_update_per_optimizer_step_and_not_per_batch(tmp_path: Path) -> None:
    net, callback = Net(), FastEMACallback(**CONSTANT)
    first = snapshot(net)
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(net, loader(), loader(seed=8))
    # 5 batches in groups of 2: the short last one steps too. 2 epochs.
    assert len(net.after_steps) == 6
    assert callback.ema is not None and callback.ema.num_updates == 6
    assert_average(callback.ema_state_dict(), average(first, net.after_steps))
    assert_same(snapshot(net), net.after_steps[-1])


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_gradient_scaler_skips_are_not_averaged(tmp_path: Path, fused: bool) -> None:
    class Overflows(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("inf") if batch_idx == 2 else 1.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01, fused=fused)

    net, callback = Overflows(), FastEMACallback(**CONSTANT)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    trainer(tmp_path, callback, plugins=precision, max_epochs=1).fit(net, loader())
    assert callback.ema is not None and callback.ema.num_updates == 4  # of 5 batches


def test_start_step_is_a_threshold_counted_in_optimizer_steps(tmp_path: Path) -> None:
    net, callback = Net(), FastEMACallback(**CONSTANT, start_step=3)
    trainer(tmp_path, callback).fit(net, loader())
    assert len(net.after_steps) == 10
    assert callback.ema is not None and callback.ema.num_updates == 7
    assert_average(callback.ema_state_dict(), average(net.after_steps[2], net.after_steps[3:]))


def test_a_start_that_a_resumed_run_has_passed_begins_at_once(tmp_path: Path) -> None:
    without = trainer(tmp_path, ModelCheckpoint(tmp_path, filename="plain"), max_epochs=2)
    without.fit(Net(), loader())
    net, callback = Net(), FastEMACallback(**CONSTANT, start_epoch=1, start_step=4)
    trainer(tmp_path, callback, max_epochs=3).fit(net, loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert callback.ema is not None and callback.ema.num_updates == 5
    resumed_from = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    assert_average(callback.ema_state_dict(), average(resumed_from, net.after_steps))


def test_start_epoch_is_not_reached(tmp_path: Path) -> None:
    net, callback = Net(), FastEMACallback(start_epoch=5)
    trainer(tmp_path, callback).fit(net, loader(), loader(seed=8))
    assert callback.ema is None
    with pytest.raises(RuntimeError, match="no average yet"):
        callback.ema_state_dict()


class TwoOptimizers(Net):
    """Manual optimization: the head steps in every batch, the rest in every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.of_the_head: list[dict[str, Tensor]] = []
        self.of_the_batches: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        rest, head = self.optimizers()
        for optimizer in (rest, head) if batch_idx % 2 == 0 else (head,):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        self.of_the_batches.append(snapshot(self))

    def configure_optimizers(self) -> Any:
        rest = torch.optim.SGD(self.body[:2].parameters(), lr=0.1)
        head = torch.optim.SGD(self.body[3].parameters(), lr=0.1)
        head.register_step_post_hook(lambda *_: self.of_the_head.append(snapshot(self)))
        return rest, head


def test_several_optimizers_average_once_a_batch(tmp_path: Path) -> None:
    net, callback = TwoOptimizers(), FastEMACallback(**CONSTANT)
    first = snapshot(net)
    trainer(tmp_path, callback, max_epochs=1).fit(net, loader())
    assert callback.ema is not None and callback.ema.num_updates == 5
    assert_average(callback.ema_state_dict(), average(first, net.of_the_batches))


def test_one_of_several_optimizers_counts_if_asked(tmp_path: Path) -> None:
    net, callback = TwoOptimizers(), FastEMACallback(**CONSTANT, optimizer=0)
    trainer(tmp_path, callback, max_epochs=1).fit(net, loader())
    assert callback.ema is not None and callback.ema.num_updates == 3
    with pytest.raises(ValueError, match="optimizer=2, but the module has 2"):
        trainer(tmp_path, FastEMACallback(optimizer=2)).fit(TwoOptimizers(), loader())


def test_every_keyword_reaches_fastema_and_wrong_ones_are_refused_at_once(tmp_path: Path) -> None:
    callback = FastEMACallback((0.5, 0.9), decay_type="exp", total_steps=10, beta=3, update_every=2)
    trainer(tmp_path, callback).fit(Net(), loader())
    direct = FastEMA(nn.Linear(1, 1), (0.5, 0.9), decay_type="exp", total_steps=10, beta=3)
    assert callback.ema is not None and callback.ema.num_updates == 5
    assert callback.ema.decay_at(4) == direct.decay_at(4)
    with pytest.raises(ValueError, match="decay"):
        FastEMACallback(1.5)
    with pytest.raises(TypeError, match="no_such_argument"):
        FastEMACallback(no_such_argument=1)
    with pytest.raises(ValueError, match="validate must be one of 'ema', 'both', 'base'"):
        FastEMACallback(validate="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start_step"):
        FastEMACallback(start_step=-1)


# ---- validation ----


def logged_by(net: Net, weights: dict[str, Tensor], batches: DataLoader[Any]) -> dict[str, float]:
    """Return what the module must log with these weights, computed by hand."""
    plain = Net().eval()
    plain.load_state_dict(weights)
    with torch.no_grad():
        losses = [plain.loss(batch) for batch in batches]
        right = torch.cat([plain.body(inputs).argmax(1) == labels for inputs, labels in batches])
    return {
        "loss": torch.stack(losses).mean().item(),
        "acc": right.float().mean().item(),
        "worst": torch.stack(losses).max().item(),
    }


def test_both_log_the_metrics_of_base_and_average_side_by_side(tmp_path: Path) -> None:
    net, callback = Net(), FastEMACallback(**CONSTANT, validate="both")
    run, batches = trainer(tmp_path, callback), loader(seed=8)
    run.fit(net, loader(), batches)
    metrics = {name: value.item() for name, value in run.callback_metrics.items()}
    for prefix, weights in (("val", snapshot(net)), ("val_ema", callback.ema_state_dict())):
        expected = logged_by(net, weights, batches)
        for name in (f"{prefix}_loss", f"{prefix}_loss_epoch"):
            assert metrics[name] == pytest.approx(expected["loss"], rel=1e-5)
        assert metrics[f"{prefix}/acc"] == pytest.approx(expected["acc"])
        assert metrics[f"{prefix}_worst"] == pytest.approx(expected["worst"], rel=1e-5)
    assert metrics["val_ema_other"] == pytest.approx(2 * metrics["val_ema_loss"])
    assert metrics["val_loss"] != metrics["val_ema_loss"]
    # A sanity check, and then in each of 2 epochs the average and the base.
    assert len(net.validated) == 5
    assert_same(net.validated[-1], snapshot(net))
    assert_same(net.validated[-2], callback.ema_state_dict())
    assert "log" not in vars(net) and "run" not in vars(run.fit_loop.epoch_loop.val_loop)


def test_several_loaders_and_a_limit_of_batches(tmp_path: Path) -> None:
    net, callback = Net(), FastEMACallback(**CONSTANT, validate="both")
    run = trainer(tmp_path, callback, limit_val_batches=2, limit_train_batches=3, max_epochs=1)
    run.fit(net, loader(), [loader(seed=8), loader(seed=9)])
    for index, seed in enumerate((8, 9)):
        batches = list(loader(seed=seed))[:2]
        for prefix, weights in (("val", snapshot(net)), ("val_ema", callback.ema_state_dict())):
            expected = logged_by(net, weights, batches)["loss"]  # type: ignore[arg-type]
            assert run.callback_metrics[f"{prefix}_loss/dataloader_idx_{index}"].item() == pytest.approx(
                expected, rel=1e-5
            )


def test_before_the_start_the_average_is_the_model_and_monitors_work(tmp_path: Path) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.metrics: list[tuple[float, float]] = []

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                found = trainer.callback_metrics
                self.metrics.append((found["val_loss"].item(), found["val_ema_loss"].item()))

    seen, callback = Seen(), FastEMACallback(**CONSTANT, start_epoch=1, validate="both")
    best = ModelCheckpoint(tmp_path, monitor="val_ema_loss", filename="{epoch}")
    stop = EarlyStopping("val_ema_loss", patience=10, strict=True)
    run = trainer(tmp_path, seen, callback, stop, best, max_epochs=3)
    run.fit(Net(), loader(), loader(seed=8))
    assert [base == ema for base, ema in seen.metrics] == [True, False, False]
    assert best.best_model_score is not None
    assert best.best_model_score.item() == min(ema for _, ema in seen.metrics)
    assert stop.best_score.item() == best.best_model_score.item()


def test_training_goes_on_bit_for_bit_as_without_the_callback(tmp_path: Path) -> None:
    def trained(averaged: bool) -> tuple[dict[str, Tensor], Any]:
        torch.manual_seed(3)
        net = Net()
        callbacks = [FastEMACallback(DECAY, validate="both")] if averaged else []
        run = trainer(tmp_path, *callbacks, val_check_interval=2)
        run.fit(net, loader(shuffle=True), loader(shuffle=True, seed=8))  # every pass draws random numbers
        return snapshot(net), run.fit_loop.state_dict()

    plain, progress = trained(False)
    averaged, progress_averaged = trained(True)
    assert_same(averaged, plain)
    assert progress_averaged == progress


def test_ema_only_validates_under_the_modules_own_names(tmp_path: Path) -> None:
    net, callback = Net(), FastEMACallback(**CONSTANT, validate="ema")
    run, batches = trainer(tmp_path, callback), loader(seed=8)
    run.fit(net, loader(), batches)
    expected = logged_by(net, callback.ema_state_dict(), batches)["loss"]
    assert run.callback_metrics["val_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert not [name for name in run.callback_metrics if "ema" in name]
    assert_same(snapshot(net), net.after_steps[-1])


def test_base_only_runs_validation_once(tmp_path: Path) -> None:
    net = Net()
    run = trainer(tmp_path, FastEMACallback(validate="base"), max_epochs=1, num_sanity_val_steps=0)
    run.fit(net, loader(), loader(seed=8))
    assert len(net.validated) == 1
    assert not [name for name in run.callback_metrics if "ema" in name]


def test_validate_test_and_predict_after_fit(tmp_path: Path) -> None:
    net, callback = Net(), FastEMACallback(**CONSTANT, validate="both")
    run, batches = trainer(tmp_path, callback), loader(seed=8)
    run.fit(net, loader())
    base = logged_by(net, snapshot(net), batches)
    ema = logged_by(net, callback.ema_state_dict(), batches)
    (validated,) = run.validate(net, batches, verbose=False)
    assert validated["val_loss_epoch"] == pytest.approx(base["loss"], rel=1e-5)
    assert validated["val_ema_loss_epoch"] == pytest.approx(ema["loss"], rel=1e-5)
    (tested,) = run.test(net, batches, verbose=False)
    assert tested["test_loss"] == pytest.approx(ema["loss"], rel=1e-5)
    assert tested["test_loss"] != pytest.approx(base["loss"], rel=1e-5)
    predicted = torch.cat(run.predict(net, batches))
    averaged = Net().eval()
    averaged.load_state_dict(callback.ema_state_dict())
    with torch.no_grad():
        torch.testing.assert_close(predicted, torch.cat([averaged.body(inputs) for inputs, _ in batches]))
    assert_same(snapshot(net), net.after_steps[-1])
    # Lightning evaluates in inference mode; the average can still be trained further.
    run.fit_loop.max_epochs = 3
    run.fit(net, loader())
    assert callback.ema is not None and callback.ema.num_updates == 15


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_before_there_is_an_average_the_trained_weights_are_taken_with_a_warning(tmp_path: Path, stage: str) -> None:
    net = Net()
    with pytest.warns(UserWarning, match=f"no average of this module yet: trainer.{stage} takes the trained weights"):
        (result, *_) = getattr(trainer(tmp_path, FastEMACallback()), stage)(net, loader(seed=8))
    if stage != "predict":
        expected = logged_by(net, snapshot(net), loader(seed=8))["loss"]
        assert result["test_loss" if stage == "test" else "val_loss_epoch"] == pytest.approx(expected, rel=1e-5)


# ---- both: what the module's own hooks see and do ----


class ReadsItsMetrics(Net):
    """Reads its own metric in a hook and steps a scheduler with it, as manual optimization does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.read: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        assert self.trainer.checkpoint_callback.dirpath is not None
        self.read.append(self.trainer.callback_metrics["val_loss"].item())
        self.lr_schedulers().step(self.read[-1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        # No improvement is large enough: every step but the first halves the learning rate.
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def test_a_hook_reads_the_metrics_of_its_own_run_and_steps_a_scheduler_once(tmp_path: Path) -> None:
    plain = ReadsItsMetrics()
    trainer(tmp_path, ModelCheckpoint(tmp_path / "plain"), max_epochs=3).fit(plain, loader(), loader(seed=8))
    net, callback = ReadsItsMetrics(), FastEMACallback(**CONSTANT, validate="both")
    run = trainer(tmp_path, callback, ModelCheckpoint(tmp_path), max_epochs=3)
    run.fit(net, loader(), loader(seed=8))
    assert net.read[1::2] == plain.read  # the second of each two runs is of the trained weights
    assert net.read[0] != net.read[1]
    assert run.callback_metrics["val_loss"].item() == net.read[-1]
    assert run.callback_metrics["val_ema_loss"].item() == net.read[-2]
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.025]
    assert_same(snapshot(net), snapshot(plain))


def test_loggers_get_both_names_and_each_once(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    callback = FastEMACallback(**CONSTANT, validate="both")
    run = trainer(tmp_path, callback, logger=logger, max_epochs=1, num_sanity_val_steps=0)
    run.fit(Net(), loader(), loader(seed=8))
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    for name in ("val_loss_epoch", "val_ema_loss_epoch"):
        (value,) = [cell for row in rows[1:] if (cell := row.split(",")[names.index(name)])]
        assert float(value) == pytest.approx(run.callback_metrics[name].item(), rel=1e-4)
    steps = [row for row in rows[1:] if row.split(",")[names.index("val_ema_loss_step")]]
    assert len(steps) == 5


def test_other_callbacks_are_silent_in_the_averaged_run_but_there(tmp_path: Path) -> None:
    class Counts(Callback):
        def __init__(self) -> None:
            self.calls: list[str] = []

        def on_validation_start(self, *_: Any) -> None:
            self.calls.append("start")

        def on_validation_batch_end(self, *_: Any) -> None:
            self.calls.append("batch")

        def on_validation_end(self, *_: Any) -> None:
            self.calls.append("end")

    class Looks(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            assert any(isinstance(callback, Counts) for callback in self.trainer.callbacks)

    counts = Counts()
    run = trainer(tmp_path, counts, FastEMACallback(validate="both"), max_epochs=1, num_sanity_val_steps=0)
    run.fit(Looks(), loader(), loader(seed=8))
    assert counts.calls == ["start", *["batch"] * 5, "end"]


@pytest.mark.parametrize("validate", ["ema", "both"])
def test_a_crash_in_the_averaged_validation_repeats_it_after_the_resume(tmp_path: Path, validate: Any) -> None:
    class Crashes(Net):
        crash = True

        def __init__(self) -> None:
            super().__init__()
            self.epochs: set[int] = set()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.crash and self.trainer.current_epoch == 1 and batch_idx == 2:
                raise ValueError("stop")

        def on_validation_epoch_end(self) -> None:
            self.epochs.add(self.trainer.current_epoch)

    saves = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=10)
    args: dict[str, Any] = {"max_epochs": 3, "num_sanity_val_steps": 0}
    with pytest.raises(ValueError, match="stop"):
        trainer(tmp_path, FastEMACallback(validate=validate), saves, **args).fit(Crashes(), loader(), loader(seed=8))
    (path,) = tmp_path.glob("*.ckpt")
    net = Crashes()
    net.crash = False
    trainer(tmp_path, FastEMACallback(validate=validate), **args).fit(net, loader(), loader(seed=8), ckpt_path=path)
    assert net.epochs == {1, 2}


@pytest.mark.parametrize("left", range(12))
def test_both_resumes_from_a_validation_of_two_loaders_and_repeats_it_whole(tmp_path: Path, left: int) -> None:
    class Crashes(Net):
        left: int | None = None

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx, dataloader_idx)
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise ValueError("stop")

    loaders = [loader(seed=8, count=12), loader(seed=9, count=12)]
    saves = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=10)
    args: dict[str, Any] = {"max_epochs": 1, "num_sanity_val_steps": 0}
    net = Crashes()
    net.left = left
    with pytest.raises(ValueError, match="stop"):
        trainer(tmp_path, FastEMACallback(validate="both"), saves, **args).fit(net, loader(), loaders)
    (path,) = tmp_path.glob("*.ckpt")
    runs = [trainer(tmp_path, FastEMACallback(validate="both"), **args) for _ in range(2)]
    runs[0].fit(Crashes(), loader(), loaders)
    runs[1].fit(Crashes(), loader(), loaders, ckpt_path=path)
    whole, resumed = (run.callback_metrics for run in runs)
    names = [f"{name}/dataloader_idx_{which}" for name in ("val/acc", "val_ema/acc") for which in (0, 1)]
    assert names and all(whole[name] == resumed[name] for name in names)
    assert whole.keys() == resumed.keys()


# ---- checkpoints ----


def test_the_best_file_of_weights_only_has_the_average(tmp_path: Path) -> None:
    callback = FastEMACallback(**CONSTANT, validate="both")
    best = ModelCheckpoint(tmp_path, monitor="val_ema_loss", mode="max", save_weights_only=True, filename="best")
    net, run = Net(), trainer(tmp_path, callback, best, max_epochs=3)
    run.fit(net, loader(), loader(seed=8))
    saved = torch.load(best.best_model_path, weights_only=True)
    values = logged_by(net, saved["ema_state_dict"], loader(seed=8))
    assert values["loss"] == pytest.approx(best.best_model_score.item(), rel=1e-5)
    assert "callbacks" not in saved
    # The trainer's own way of loading it takes both.
    (tested,) = run.test(net, loader(seed=8), ckpt_path="best", verbose=False)
    assert tested["test_loss"] == pytest.approx(values["loss"], rel=1e-5)
    assert_same(snapshot(net), saved["state_dict"])
    assert_same(callback.ema_state_dict(), saved["ema_state_dict"])
    run.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert_same(torch.load(tmp_path / "after.ckpt", weights_only=True)["ema_state_dict"], saved["ema_state_dict"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_checkpoint_holds_the_average_once(tmp_path: Path, precision: Any) -> None:
    callback = FastEMACallback(**CONSTANT)
    run = trainer(tmp_path, callback, precision=precision)
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    shadow = saved["callbacks"][callback.state_key]["shadow"]
    assert all(saved["ema_state_dict"][name].data_ptr() == shadow[name].data_ptr() for name in shadow)
    assert_same(saved["ema_state_dict"], callback.ema_state_dict())


@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="this lightning has none")
def test_a_checkpoint_of_lightnings_own_callback_resumes_with_both(tmp_path: Path) -> None:
    theirs = pl.callbacks.EMAWeightAveraging(decay=DECAY)
    trainer(tmp_path, theirs, ModelCheckpoint(tmp_path, filename="theirs")).fit(Net(), loader())
    saved = torch.load(tmp_path / "theirs.ckpt", weights_only=True)
    seen: dict[str, Any] = {}

    class Noted(FastEMACallback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            seen.setdefault("live", snapshot(pl_module))
            seen.setdefault("average", {name: value.clone() for name, value in self.ema_state_dict().items()})

    callback, net = Noted(**CONSTANT), Net()
    trainer(tmp_path, callback, max_epochs=3).fit(net, loader(), ckpt_path=tmp_path / "theirs.ckpt")
    assert_same(seen["live"], saved["current_model_state"])
    assert_same(seen["average"], saved["state_dict"])
    assert callback.ema is not None and callback.ema.num_updates == 15
    assert_average(callback.ema_state_dict(), average(saved["state_dict"], net.after_steps))


@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="this lightning has none")
@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        ({"update_starting_at_step": 6}, {"decay_type": "constant", "update_after_step": 6}),
        ({"update_every_n_steps": 5}, {"decay_type": "threshold"}),
        ({"update_every_n_steps": 5}, {"decay_type": "warmup", "update_every": 5}),
    ],
)
def test_an_average_of_lightnings_own_callback_goes_on_at_its_step(
    tmp_path: Path, theirs: dict[str, Any], own: dict[str, Any]
) -> None:
    """Not at its number of updates: a schedule would begin too early, or a start that has passed wipe the average."""
    written = pl.callbacks.EMAWeightAveraging(decay=DECAY, **theirs)
    trainer(tmp_path, written, ModelCheckpoint(tmp_path, filename="theirs")).fit(Net(), loader())
    seen: dict[str, Any] = {}

    class Noted(FastEMACallback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            seen.setdefault("state", self.ema.state_dict())

    callback = Noted(decay=DECAY, **own)
    trainer(tmp_path, callback, max_epochs=3).fit(Net(), loader(), ckpt_path=tmp_path / "theirs.ckpt")
    assert (seen["state"]["step"], seen["state"]["num_updates"]) == (10, int(written._average_model.n_averaged))
    assert callback.ema is not None and callback.ema.state_dict()["step"] == 15


# ---- a module that changes in mid-run ----


def test_pruning_carries_the_average_over_by_name(tmp_path: Path) -> None:
    net, callback = Net(), FastEMACallback(**CONSTANT)
    at_pruning: list[dict[str, Tensor]] = []

    class Noted(pl.callbacks.ModelPruning):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                at_pruning.append({name: value.clone() for name, value in callback.ema_state_dict().items()})
            super().on_train_epoch_end(trainer, pl_module)

    prune = Noted(
        "l1_unstructured", parameters_to_prune=[(net.body[0], "weight")], amount=0.5, use_global_unstructured=False
    )
    # Pruning begins after the first epoch.
    prune._apply_pruning = lambda epoch: epoch == 0  # type: ignore[assignment]
    prune._make_pruning_permanent = False
    trainer(tmp_path, callback, prune).fit(net, loader())
    (before,) = at_pruning
    assert callback.ema is not None and callback.ema.num_updates == 10
    averages = callback.ema_state_dict()
    assert "body.0.weight_orig" in averages and "body.0.weight" not in averages
    steps = [step["body.0.weight_orig"] for step in net.after_steps if "body.0.weight_orig" in step]
    expected = average({"": before["body.0.weight"]}, [{"": step} for step in steps])[""]
    torch.testing.assert_close(averages["body.0.weight_orig"].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_parameter_of_another_shape_begins_anew_with_a_warning(tmp_path: Path) -> None:
    class Grows(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.body[3] = nn.Linear(8, 4)

    net, callback = Grows(), FastEMACallback(**CONSTANT)
    with pytest.warns(UserWarning, match=r"begins anew for body\.3\.weight, body\.3\.bias"):
        trainer(tmp_path, callback).fit(net, loader())
    assert callback.ema_state_dict()["body.3.weight"].shape == (4, 8)
    assert callback.ema is not None and callback.ema.num_updates == 10


def test_the_schedule_is_that_of_fastema_unless_asked_for(tmp_path: Path) -> None:
    callback = FastEMACallback()
    trainer(tmp_path, callback, max_epochs=1).fit(Net(), loader())
    assert callback.ema is not None
    assert [callback.ema.decay_at(step) for step in (1, 9000)] == [2 / 11, 0.999]


# ---- more of checkpoints ----


@pytest.mark.parametrize("validate", ["both", "ema"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_never_holds_averaged_weights_as_the_models(
    tmp_path: Path, validate: Any, weights_only: bool
) -> None:
    class Saves(Net):
        def on_validation_epoch_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / f"inside{len(self.validated)}.ckpt", weights_only=weights_only)
            self.inside = snapshot(self)

    net, callback = Saves(), FastEMACallback(**CONSTANT, validate=validate)
    each = ModelCheckpoint(tmp_path, filename="each", save_weights_only=weights_only)
    trainer(tmp_path, callback, each, max_epochs=1, num_sanity_val_steps=0).fit(net, loader(), loader(seed=8))
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == (3 if validate == "both" else 2)
    for path in saved:
        content = torch.load(path, weights_only=True)
        assert_same(content["state_dict"], net.after_steps[-1])
        if not weights_only:
            assert_same(content["ema_state_dict"], callback.ema_state_dict())
    # The rest of the validation had the averaged weights again.
    assert_same(net.validated[0], callback.ema_state_dict())
    if validate == "ema":
        assert_same(net.inside, callback.ema_state_dict())


@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 2}])
def test_fit_validate_test_resume_is_bit_for_bit(tmp_path: Path, every: dict[str, int]) -> None:
    def run(folder: Path, epochs: int, resume: Path | None = None) -> tuple[Net, FastEMACallback, Any]:
        net, callback = Net(), FastEMACallback(decay=0.99, decay_type="warmup", start_step=1)
        checkpoint = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True, **every)
        current = trainer(folder, callback, checkpoint, max_epochs=epochs, accumulate_grad_batches=2)
        current.fit(net, loader(), loader(seed=8), ckpt_path=resume)
        return net, callback, current

    net, callback, whole = run(tmp_path / "whole", 4)
    _, _, half = run(tmp_path / "half", 2)
    last = half.checkpoint_callback.best_model_path
    assert last == str(tmp_path / "half" / "step=6.ckpt")
    resumed_net, resumed, current = run(tmp_path / "resumed", 4, Path(last))

    assert_same(snapshot(resumed_net), snapshot(net))
    assert_same(resumed.ema_state_dict(), callback.ema_state_dict())
    assert resumed.ema is not None and callback.ema is not None
    assert resumed.ema.num_updates == callback.ema.num_updates == 11
    assert resumed.state_dict()["step"] == callback.state_dict()["step"] == 11
    names = [name for name in whole.callback_metrics if name.startswith("val")]
    assert {n: current.callback_metrics[n].item() for n in names} == {
        n: whole.callback_metrics[n].item() for n in names
    }
    assert whole.test(net, loader(seed=9), verbose=False) == current.test(resumed_net, loader(seed=9), verbose=False)
    assert whole.validate(net, loader(seed=9), verbose=False) == current.validate(
        resumed_net, loader(seed=9), verbose=False
    )


def test_a_fresh_process_tests_the_average_of_a_checkpoint(tmp_path: Path) -> None:
    net, callback = Net(), FastEMACallback(**CONSTANT)
    trainer(tmp_path, callback, ModelCheckpoint(tmp_path, filename="last")).fit(net, loader())
    fresh, fresh_callback, batches = Net(), FastEMACallback(**CONSTANT), loader(seed=8)
    run = trainer(tmp_path, fresh_callback)
    (tested,) = run.test(fresh, batches, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert tested["test_loss"] == pytest.approx(logged_by(net, callback.ema_state_dict(), batches)["loss"], rel=1e-5)
    assert_same(snapshot(fresh), snapshot(net))
    assert_same(fresh_callback.ema_state_dict(), callback.ema_state_dict())
    # And the plain model loads it without fastema.
    fresh.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["ema_state_dict"])
    assert_same(snapshot(fresh), callback.ema_state_dict())


def test_a_training_that_was_finished_already_has_its_average(tmp_path: Path) -> None:
    callback = FastEMACallback(**CONSTANT)
    trainer(tmp_path, callback, ModelCheckpoint(tmp_path, filename="last")).fit(Net(), loader())
    again = FastEMACallback(**CONSTANT)
    trainer(tmp_path, again).fit(Net(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert again.ema is not None and again.ema.num_updates == 10
    assert_same(again.ema_state_dict(), callback.ema_state_dict())


def test_a_checkpoint_without_an_average_ends_the_one_of_other_weights(tmp_path: Path) -> None:
    trainer(tmp_path, ModelCheckpoint(tmp_path, filename="plain"), max_epochs=1).fit(Net(), loader())
    net, callback = Net(), FastEMACallback(**CONSTANT)
    run = trainer(tmp_path, callback)
    run.fit(net, loader())
    with pytest.warns(UserWarning, match="no average of this module yet"):
        run.test(net, loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)


def test_a_new_module_gets_a_new_average(tmp_path: Path) -> None:
    callback = FastEMACallback(**CONSTANT)
    for fold in range(2):
        net = Net()
        first = snapshot(net)
        trainer(tmp_path, callback, max_epochs=1).fit(net, loader(seed=fold))
        assert_average(callback.ema_state_dict(), average(first, net.after_steps))


# ---- what goes wrong ----


class Fails(Net):
    def __init__(self, error: type[BaseException], at: str) -> None:
        super().__init__()
        self.error, self.at = error, at

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.at == "validation" and self.after_steps:
            raise self.error("stop")

    def on_validation_epoch_end(self) -> None:
        pass

    def test_step(self, batch: Any, batch_idx: int) -> None:
        raise self.error("stop")


class OnException(Callback):
    """A callback before the EMA's, which sees the weights as the exception leaves them."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.weights = snapshot(pl_module)


@pytest.mark.parametrize("validate", ["both", "ema"])
@pytest.mark.parametrize(("error", "raised"), [(ValueError, ValueError), (KeyboardInterrupt, SystemExit)])
def test_an_exception_in_validation_leaves_the_trained_weights(
    tmp_path: Path, validate: Any, error: type[BaseException], raised: type[BaseException]
) -> None:
    net, callback, seen = Fails(error, "validation"), FastEMACallback(**CONSTANT, validate=validate), OnException()
    saves = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=5)
    run = trainer(tmp_path, seen, callback, saves)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(raised):
            run.fit(net, loader(), loader(seed=8))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning turns it off after a Ctrl+C
    assert len(net.after_steps) == 5
    for weights in (seen.weights, snapshot(net)):
        assert_same(weights, net.after_steps[-1])
    assert callback.ema is not None and not callback.ema.is_applied
    assert run.callbacks[0] is seen
    assert "log" not in vars(net) and "save_checkpoint" not in vars(run)
    assert "run" not in vars(run.fit_loop.epoch_loop.val_loop)
    for path in tmp_path.glob("*.ckpt"):
        assert_same(torch.load(path, weights_only=True)["state_dict"], net.after_steps[-1])


def test_an_exception_in_a_test_of_the_average_leaves_the_trained_weights(tmp_path: Path) -> None:
    net, callback = Fails(ValueError, "test"), FastEMACallback(**CONSTANT)
    run = trainer(tmp_path, callback)
    run.fit(net, loader())
    with pytest.raises(ValueError, match="stop"):
        run.test(net, loader(), verbose=False)
    assert_same(snapshot(net), net.after_steps[-1])


def test_two_callbacks_in_one_trainer_are_refused(tmp_path: Path) -> None:
    # Lightning itself refuses two callbacks with one key for the checkpoint.
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(tmp_path, FastEMACallback(0.9), FastEMACallback(0.99)).fit(Net(), loader())

    class Mine(FastEMACallback):
        pass

    with pytest.raises(ValueError, match="several FastEMACallbacks: give one of them several decays"):
        trainer(tmp_path, FastEMACallback(0.9), Mine(0.99)).fit(Net(), loader())


def test_strategies_that_shard_the_weights_are_refused(tmp_path: Path) -> None:
    callback = FastEMACallback()
    run = trainer(tmp_path, callback, strategy=ModelParallelStrategy(), devices=1)
    with pytest.raises(ValueError, match="does not work with ModelParallelStrategy"):
        callback.setup(run, Net(), "fit")


def test_a_framework_that_is_itself_broken_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_framework.py").write_text("import a_module_that_it_misses")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_it_misses"):
        extras.require("broken_framework", "lightning")
    with pytest.raises(ImportError, match=r"^no_framework is not installed: pip install fastema\[lightning\]$"):
        extras.require("no_framework.part", "lightning")


@pytest.mark.parametrize(
    "module", [extras, ours, carry_over, validation, weight_averaging], ids=lambda module: module.__name__
)
def test_examples_in_docstrings(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys, fastema; print([m for m in sys.modules if 'lightning' in m])", "[]"),
        (
            "import sys; sys.modules.update({'lightning': None, 'lightning.pytorch': None})\n"
            "try: import fastema.integrations.lightning\n"
            "except ImportError as error: print(error)",
            "lightning is not installed: pip install fastema[lightning]",
        ),
        (
            "import fastema.segmentation.torchvision_shim\n"
            "import pytorch_lightning as pl, fastema.integrations.lightning as ours\n"
            "print(issubclass(ours.FastEMACallback, pl.Callback))",
            "True",
        ),
    ],
    ids=["never imported", "missing", "pytorch_lightning"],
)
def test_import(code: str, expected: str) -> None:
    if "pytorch_lightning" in code:
        pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == expected

"""`EMAWeightAveraging` in the place of Lightning's: the same numbers, hooks and checkpoints."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases.callbacks import DECAY, assert_same
from cases.lightning import Net, loader, snapshot, trainer

theirs = pytest.importorskip("lightning.pytorch.callbacks", reason="lightning is not installed")
if not hasattr(theirs, "EMAWeightAveraging"):
    pytest.skip("this lightning has no EMAWeightAveraging", allow_module_level=True)

from fastema.integrations import lightning as ours  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|logging interval|TensorBoard|exists and is not empty).*"),
]

BOTH = pytest.mark.parametrize("package", [ours, theirs], ids=["ours", "theirs"])


class Watched(Net):
    """A module that keeps the weights that tests and predictions see."""

    def on_test_start(self) -> None:
        self.tested = snapshot(self)

    def on_predict_start(self) -> None:
        self.predicted = snapshot(self)


def fitted(
    package: Any, folder: Path, make: Callable[[Any], Any], epochs: int = 2, **fit: Any
) -> tuple[Watched, Any, Any]:
    net, callback = Watched(), make(package)
    run = trainer(folder, callback, theirs.ModelCheckpoint(folder, filename="last"), max_epochs=epochs)
    run.fit(net, loader(), loader(seed=8), **fit)
    return net, callback, run


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare up to rounding; counters of batches, which Lightning's average rounds down, are copied by ours."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "arguments",
    [
        {"decay": DECAY},
        {"decay": DECAY, "use_buffers": False},
        {"decay": DECAY, "update_every_n_steps": 3},
        {"decay": DECAY, "update_starting_at_step": 4},
        {"decay": DECAY, "update_starting_at_epoch": 1},
        {"decay": DECAY, "update_starting_at_step": 6, "update_starting_at_epoch": 0},
        {"device": "cpu", "decay": DECAY, "update_every_n_steps": 0, "update_starting_at_epoch": 0},
    ],
    ids=lambda arguments: "-".join(map(str, arguments)),
)
def test_every_argument_gives_lightnings_average(tmp_path: Path, arguments: dict[str, Any]) -> None:
    results = {}
    for package in (ours, theirs):
        folder = tmp_path / package.__name__
        net, callback, run = fitted(package, folder, lambda package: package.EMAWeightAveraging(**arguments))
        saved = torch.load(folder / "last.ckpt", weights_only=True)
        run.test(net, loader(seed=9), verbose=False)
        run.predict(net, loader(seed=9))
        results[package] = (net, callback, saved)
    (net, callback, saved), (their_net, their_callback, their_saved) = results.values()
    assert callback._average_model.n_averaged == their_callback._average_model.n_averaged
    assert_close(snapshot(callback._average_model.module), snapshot(their_callback._average_model.module))
    assert_close(snapshot(net), snapshot(their_net))  # the average, after the fit
    assert_close(net.tested, their_net.tested)
    assert_close(net.predicted, their_net.predicted)
    for seen, their_seen in zip(net.validated, their_net.validated, strict=True):
        assert_close(seen, their_seen)
    for step, their_step in zip(net.after_steps, their_net.after_steps, strict=True):
        assert_same(step, their_step)
    assert saved.keys() == their_saved.keys()
    assert_close(saved["state_dict"], their_saved["state_dict"])
    assert_same(saved["current_model_state"], their_saved["current_model_state"])
    assert saved["averaging_state"] == their_saved["averaging_state"]
    assert saved["callbacks"]["EMAWeightAveraging"] == their_saved["callbacks"]["EMAWeightAveraging"]


def test_the_first_positional_argument_is_the_device() -> None:
    assert ours.EMAWeightAveraging("cpu")._device == torch.device("cpu")


def test_updates_every_3_steps_happen_at_1_4_7(tmp_path: Path) -> None:
    class Noted(ours.EMAWeightAveraging):
        steps: list[int] = []  # noqa: RUF012

        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            due = super().should_update(step_idx, epoch_idx)
            if due:
                assert step_idx is not None
                self.steps.append(step_idx + 1)
            return due

    _, callback, _ = fitted(ours, tmp_path, lambda _: Noted(decay=DECAY, update_every_n_steps=3))
    assert callback.steps == [1, 4, 7, 10] and int(callback._average_model.n_averaged) == 4


@pytest.mark.parametrize(("writer", "reader"), [(ours, theirs), (theirs, ours), (ours, ours)])
def test_checkpoints_of_either_resume_in_the_other(tmp_path: Path, writer: Any, reader: Any) -> None:
    def make(package: Any) -> Any:
        return package.EMAWeightAveraging(decay=DECAY, update_every_n_steps=2)

    fitted(writer, tmp_path / "half", make)
    net, callback, _ = fitted(reader, tmp_path / "rest", make, epochs=4, ckpt_path=tmp_path / "half" / "last.ckpt")
    whole, whole_callback, _ = fitted(theirs, tmp_path / "whole", make, epochs=4)
    for step, whole_step in zip(net.after_steps, whole.after_steps[10:], strict=True):
        assert_same(step, whole_step)  # the trained weights went on
    assert_close(snapshot(callback._average_model.module), snapshot(whole_callback._average_model.module))


def test_a_checkpoint_of_fastema_callback_resumes_with_its_average(tmp_path: Path) -> None:
    fitted(ours, tmp_path, lambda package: package.FastEMACallback(decay=DECAY))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    seen: dict[str, Any] = {}

    class Noted(ours.EMAWeightAveraging):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.update(live=snapshot(pl_module), average=snapshot(self._average_model.module))

    fitted(ours, tmp_path / "rest", lambda _: Noted(decay=DECAY), epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert_same(seen["live"], saved["state_dict"])
    assert_same(seen["average"], saved["ema_state_dict"])


def test_what_users_override_is_called(tmp_path: Path) -> None:
    class Overrides(ours.EMAWeightAveraging):
        def __init__(self) -> None:
            super().__init__(decay=DECAY)
            self.calls: list[str] = []

        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return epoch_idx is not None

        def _swap_models(self, pl_module: Any) -> None:
            self.calls.append("swap")
            super()._swap_models(pl_module)

        def _copy_average_to_current(self, pl_module: Any) -> None:
            self.calls.append("copy")
            super()._copy_average_to_current(pl_module)

    net, callback, _ = fitted(ours, tmp_path, lambda _: Overrides())
    assert callback.calls == ["swap"] * 6 + ["copy"]  # the sanity check and two validations
    assert int(callback._average_model.n_averaged) == 2
    assert_same(snapshot(net), snapshot(callback._average_model.module))


@pytest.mark.parametrize("after_fit", [False, True])
def test_it_can_be_pickled(tmp_path: Path, after_fit: bool) -> None:
    callback = ours.EMAWeightAveraging(decay=DECAY, update_every_n_steps=3)
    if after_fit:
        trainer(tmp_path, callback).fit(Net(), loader())
    again = pickle.loads(pickle.dumps(callback))
    assert again.update_every_n_steps == 3
    if after_fit:
        assert_same(snapshot(again._average_model.module), snapshot(callback._average_model.module))
    else:  # Lightning's, too, goes on counting steps where the last fit ended
        trainer(tmp_path, again).fit(Net(), loader())
        assert int(again._average_model.n_averaged) == 4


def test_a_checkpoint_saved_in_a_validation_has_each_weights_in_its_own_place(tmp_path: Path) -> None:
    class Saves(Net):
        def on_validation_batch_end(self, *args: Any) -> None:
            if not self.trainer.sanity_checking:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
                self.inside = snapshot(self)

    net, callback = Saves(), ours.EMAWeightAveraging(decay=DECAY)
    trainer(tmp_path, callback, max_epochs=1).fit(net, loader(), loader(seed=8))
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    average = snapshot(callback._average_model.module)
    assert_same(saved["state_dict"], average)
    assert_same(net.inside, average)
    assert_same(saved["current_model_state"], net.after_steps[-1])


def test_an_exception_in_a_validation_leaves_the_trained_weights(tmp_path: Path) -> None:
    class Fails(Net):
        def on_validation_epoch_end(self) -> None:
            pass

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.after_steps:
                raise ValueError("stop")

    net, callback = Fails(), ours.EMAWeightAveraging(decay=DECAY)
    saves = theirs.ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=5)
    with pytest.raises(ValueError, match="stop"):
        trainer(tmp_path, callback, saves).fit(net, loader(), loader(seed=8))
    assert_same(snapshot(net), net.after_steps[-1])
    for path in tmp_path.glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        assert_same(saved["current_model_state"], net.after_steps[-1])
        assert_same(saved["state_dict"], snapshot(callback._average_model.module))


@pytest.mark.parametrize("start", [{"update_starting_at_step": 7}, {"update_starting_at_step": 50}])
def test_validations_before_the_start_are_said_and_no_training_is_lost(tmp_path: Path, start: dict[str, int]) -> None:
    net, callback = Net(), ours.EMAWeightAveraging(decay=DECAY, **start)
    with pytest.warns(UserWarning, match="copy of the initial weights") as said:
        trainer(tmp_path, callback, max_epochs=2).fit(net, loader(), loader(seed=8))
    never = start["update_starting_at_step"] == 50
    assert sum("initial weights: these" in str(each.message) for each in said) == 1
    assert sum("in the whole fit" in str(each.message) for each in said) == never
    assert_same(snapshot(net), net.after_steps[-1] if never else snapshot(callback._average_model.module))

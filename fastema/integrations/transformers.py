"""`FastEMATrainerCallback`: an average of the weights in the Hugging Face Trainer.

How it is done, and why so:

- **Updates run after the torch optimizer's own step**, inside Accelerate's wrapper. The Trainer's `on_optimizer_step`
  also fires where the gradient scaler skipped the step, and Accelerate notices a skip of unfused optimizers only.
- **The callback is attached to its Trainer**, `callback.attach(trainer)`, since the Trainer tells its callbacks too
  little: there is no event before an evaluation and none after an exception, and the checkpoint it resumes from is
  not named. So four public methods of this one Trainer are wrapped: `train`, `evaluate`, `predict`, `save_model`. The
  exchange surrounds an evaluation as a `with` block: whatever ends it, the trained weights are back.
- **`evaluate` runs a second time**, with the averaged weights in the model. That run comes first and is hidden from the
  other callbacks, but for `on_log`; its metrics have their usual names inside of it, for an `evaluate` of your own that
  reads them, and `_ema` in their prefix afterwards. The metrics of both runs go to one `on_evaluate`, and are returned.
  So early stopping, `metric_for_best_model="eval_ema_loss"` and the choice of the best checkpoint work with either.
  Then the random number generators are restored: training goes on bit for bit as without it.
- **Whatever `save_model` writes gets the average beside it**, checkpoints included.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fastema.core.checks import checked_count
from fastema.ema import AttachedHandle, FastEMA
from fastema.extras import require
from fastema.integrations.callbacks import AXES, HoldsAverage, checked_choice, ema_arguments, replaced
from fastema.integrations.transformers_checkpoint import EMA_STATE, is_peft, read_average, what_trains, write_average

if TYPE_CHECKING:
    import numpy as np
    from transformers import Trainer, TrainerCallback, TrainerState
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import get_last_checkpoint
else:
    TrainerCallback = require("transformers", "transformers").TrainerCallback
    TrainerState = require("transformers", "transformers").TrainerState
    TRAINER_STATE_NAME = require("transformers.trainer", "transformers").TRAINER_STATE_NAME
    get_last_checkpoint = require("transformers.trainer_utils", "transformers").get_last_checkpoint
    np = require("numpy", "transformers")

__all__ = ["FastEMATrainerCallback"]


class FastEMATrainerCallback(HoldsAverage, TrainerCallback):
    """Keep an exponential moving average of the weights that a Hugging Face Trainer trains, and evaluate it.

    With `evaluate="both"`, every metric of `trainer.evaluate` appears twice: `eval_loss` of the trained weights and
    `eval_ema_loss` of the averaged ones; before the average has begun, both are the same. With `evaluate="ema"`
    the averaged weights alone are evaluated, under the usual names.

    Every checkpoint, and whatever else `trainer.save_model` writes, gets `ema.safetensors`, the averaged weights under
    the model's own keys (`safetensors.torch.load_model(model, path)` loads them, tied weights included), and `ema.json`
    with the counters. `trainer.train(resume_from_checkpoint=...)` takes both up exactly. With
    `load_best_model_at_end=True` model and average at the end are those of the best checkpoint; where the metric that
    chose it was the average's (`metric_for_best_model="eval_ema_loss"`, or `evaluate="ema"`), the model has it too.

    Of a PEFT model only what trains is averaged, and a checkpoint gets `ema_adapter/` too, for
    `PeftModel.from_pretrained(base, ...)`. `callback.ema.copy_to(); model.merge_and_unload()` merges the average.

    A `trainer.train` that does not resume begins a new average, as a copy of the weights.

    Args:
        decay: as for `FastEMA`. With several decays the first is evaluated; all are saved.
        start_step: the average begins, as a copy of the weights, once so many optimizer steps are done.
        start_epoch: and not before so many epochs are done.
        evaluate: "both", "ema" or "base".
        predict: the weights that `trainer.predict` takes, "base" or "ema".
        **ema_args: every keyword of `FastEMA`.

    Raises:
        ValueError: an argument out of range.

    Examples:
        >>> callback = FastEMATrainerCallback(decay=0.999)  # then, with the Trainer at hand: callback.attach(trainer)
        >>> callback.ema is None  # until training starts
        True
    """

    def __init__(
        self,
        decay: Any = 0.999,
        *,
        start_step: int = 0,
        start_epoch: float = 0,
        evaluate: Literal["both", "ema", "base"] = "both",
        predict: Literal["ema", "base"] = "base",
        **ema_args: Any,
    ) -> None:
        self._start_step = checked_count("start_step", start_step, at_least=0)
        if not start_epoch >= 0:
            raise ValueError(f"start_epoch must not be negative, got {start_epoch!r}")
        self._start_epoch = start_epoch
        self._evaluate_weights = checked_choice("evaluate", evaluate, ("both", "ema", "base"))
        self._predict_weights = checked_choice("predict", predict, ("ema", "base"))
        self._ema_args = ema_arguments(decay, ema_args)
        self._trainer: Trainer | None = None
        self._handle: AttachedHandle | None = None  # on the optimizer
        self._resume_from: Path | None = None
        # Of the evaluation that runs now: its prefix, and the average's metrics.
        self._evaluation: tuple[str, dict[str, float] | None] | None = None

    def attach(self, trainer: Trainer) -> FastEMATrainerCallback:
        """Add the callback to the Trainer, unless it is there already, and wrap the four methods.

        Returns:
            The callback: `ema = FastEMATrainerCallback(decay=0.999).attach(trainer)`.

        Raises:
            RuntimeError: it is attached already, or the Trainer has another one.
            ValueError: the Trainer shards the weights, or casts them in place for evaluation.
        """
        callbacks = trainer.callback_handler.callbacks
        if self._trainer is not None:
            raise RuntimeError("this FastEMATrainerCallback is attached already: one Trainer, one callback")
        if any(isinstance(other, FastEMATrainerCallback) for other in callbacks if other is not self):
            raise RuntimeError("the Trainer has a FastEMATrainerCallback: give that one several decays instead")
        if any(
            getattr(trainer, name, False)
            for name in ("is_fsdp_enabled", "is_deepspeed_enabled", "is_distributed_loading_by_transformers")
        ):
            raise ValueError(
                "FastEMATrainerCallback does not work with FSDP and DeepSpeed: they shard the weights, and a "
                "checkpoint would hold the average of one process's shards only. In a training loop of your own "
                "FastEMA works with both"
            )
        averaged = (self._evaluate_weights, self._predict_weights) != ("base", "base")
        if averaged and (trainer.args.fp16_full_eval or trainer.args.bf16_full_eval):
            raise ValueError(
                "fp16_full_eval and bf16_full_eval replace the weights inside the evaluation, so that the trained ones "
                "could not be put back: turn them off, or use evaluate='base', predict='base'"
            )
        # The first, so that all others see the average's metrics too.
        trainer.callback_handler.callbacks = [self, *(other for other in callbacks if other is not self)]
        for name, wrapper in (
            ("train", self._train),
            ("evaluate", self._evaluate),
            ("predict", self._predict),
            ("save_model", self._save_model),
        ):
            setattr(trainer, name, functools.partial(wrapper, getattr(trainer, name)))
        self._trainer = trainer
        return self

    # ---- the Trainer's events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Continue the average of the checkpoint; without one, drop that of an earlier training."""
        if self._trainer is None:
            raise RuntimeError(
                "FastEMATrainerCallback is not attached: call callback.attach(trainer) once, after the Trainer is "
                "built. The Trainer does not tell its callbacks what to evaluate and what to resume from"
            )
        self._detach()
        self._ema = None
        if self._resume_from is not None:
            self._load(kwargs["model"], self._resume_from)
            if self._ema is not None:
                self._attach_to(kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the average where the start is reached."""
        if self._ema is None and state.global_step >= self._start_step and (state.epoch or 0) >= self._start_epoch:
            self._ema = self._build(kwargs["model"])
            self._attach_to(kwargs["optimizer"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the average's metrics to the model's own, for all callbacks that come after this one."""
        if self._evaluation is not None:
            kwargs["metrics"].update(self._average_metrics(kwargs["metrics"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the average of the best checkpoint where the Trainer took its weights."""
        self._detach()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._ema = None
            self._load(kwargs["model"], Path(state.best_model_checkpoint))
            if self._ema is not None and self._is_averaged(args.metric_for_best_model):
                self._ema.copy_to()

    # ---- the Trainer's methods ----

    def _train(self, train: Callable[..., Any], resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        assert self._trainer is not None
        resume = resume_from_checkpoint
        if resume is True:
            resume = get_last_checkpoint(str(self._trainer.args.output_dir))
        self._resume_from = Path(resume) if resume else None
        try:
            return train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._resume_from = None
            self._detach()

    def _evaluate(
        self,
        evaluate: Callable[..., dict[str, float]],
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate the averaged weights, the trained ones, or both."""
        assert self._trainer is not None
        run = functools.partial(evaluate, eval_dataset, ignore_keys, **kwargs)
        several = isinstance(self._trainer.eval_dataset if eval_dataset is None else eval_dataset, dict)
        # Of several data sets, each comes here again by itself.
        if several or self._evaluate_weights == "base":
            return run(metric_key_prefix=metric_key_prefix)
        if self._evaluate_weights == "ema":
            with self._averaged("evaluate"):
                return run(metric_key_prefix=metric_key_prefix)
        if self._ema is None and not self._trainer.is_in_train:
            return run(metric_key_prefix=metric_key_prefix)
        averaged = None
        if self._ema is not None:
            rename = functools.partial(_renamed, metric_key_prefix)
            with _same_random_numbers(), self._hidden(rename), self._averaged("evaluate"):
                averaged = rename(run(metric_key_prefix=metric_key_prefix))
        self._evaluation = (metric_key_prefix, averaged)
        try:
            metrics = run(metric_key_prefix=metric_key_prefix)
            metrics.update(self._average_metrics(metrics))
        finally:
            self._evaluation = None
        return metrics

    def _predict(self, predict: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._predict_weights == "base":
            return predict(*args, **kwargs)
        with self._averaged("predict"):
            return predict(*args, **kwargs)

    def _save_model(self, save: Callable[..., None], output_dir: Any = None, *args: Any, **kwargs: Any) -> None:
        """Save the trained weights, also from inside an evaluation of the averaged ones, and those beside them."""
        assert self._trainer is not None
        ema = self._ema
        with ema.engine.restored() if ema is not None and ema.is_applied else nullcontext():
            save(output_dir, *args, **kwargs)
            if ema is not None and self._trainer.args.should_save:
                folder = Path(output_dir or str(self._trainer.args.output_dir))
                write_average(ema, folder, self._trainer.accelerator.unwrap_model(self._trainer.model))

    # ---- inside ----

    def _attach_to(self, optimizer: Any) -> None:
        """Update the average at every step of the torch optimizer."""
        assert self._ema is not None
        self._handle = self._ema.attach(optimizer)

    def _is_averaged(self, metric: str | None) -> bool:
        """Return whether a metric was measured with the averaged weights."""
        if self._evaluate_weights == "both":
            name = metric or ""
            return (name if name.startswith("eval_") else f"eval_{name}").startswith(f"{_averaged_prefix('eval')}_")
        return self._evaluate_weights == "ema"

    def _build(self, model: nn.Module) -> FastEMA:
        """Return a new average: of a PEFT model, of what trains."""
        arguments = self._ema_args
        if is_peft(model) and arguments.get("policy") is None:
            arguments = {**arguments, "policy": what_trains}
        return FastEMA(model, **arguments)

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _load(self, model: nn.Module, folder: Path) -> None:
        """Build the average that a checkpoint holds; where it holds none, warn, and there is none yet."""
        if (folder / EMA_STATE).is_file():
            ema = self._build(model)
            read_average(ema, folder)
            self._ema = ema
        elif self._begins_before(folder):
            warnings.warn(
                f"the checkpoint {folder} has no average ({EMA_STATE}): one begins anew, as a copy of the weights, "
                "with its schedule at step 0",
                stacklevel=2,
            )

    def _begins_before(self, folder: Path) -> bool:
        """Return whether the average had begun when a checkpoint was written; True where that is not known."""
        file = folder / TRAINER_STATE_NAME
        done = TrainerState.load_from_json(str(file)) if file.is_file() else None
        if done is None:
            return True
        return done.global_step > self._start_step and (done.epoch or 0) > self._start_epoch

    @contextmanager
    def _averaged(self, what: str) -> Iterator[None]:
        """Open a block in which the model has the averaged weights."""
        assert self._trainer is not None
        if self._ema is None:
            if not self._trainer.is_in_train:
                raise RuntimeError(
                    f"trainer.{what} is to use the averaged weights, but there are none: call trainer.train first"
                )
            yield  # not begun: the average is the model
            return
        with self._ema.swapped():
            yield

    @contextmanager
    def _hidden(self, rename: Callable[[dict[str, float]], dict[str, float]]) -> Iterator[None]:
        """Log an evaluation in a block with its metrics renamed, and show it to no callback otherwise."""
        assert self._trainer is not None
        handler, log = self._trainer.callback_handler, self._trainer.log

        def nothing(args: Any, state: Any, control: Any, *_: Any, **__: Any) -> Any:
            return control

        def log_renamed(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            log(rename(logs), *args, **kwargs)

        with (
            replaced(handler, "on_prediction_step", nothing),
            replaced(handler, "on_evaluate", nothing),
            replaced(self._trainer, "log", log_renamed),
        ):
            yield

    def _average_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics of the average; before it has begun, the model's own under its names."""
        assert self._evaluation is not None
        prefix, averaged = self._evaluation
        if averaged is not None:
            return averaged
        averaged_prefix = f"{_averaged_prefix(prefix)}_"
        own = {name: value for name, value in metrics.items() if not name.startswith(averaged_prefix)}
        return _renamed(prefix, own)


def _averaged_prefix(prefix: str) -> str:
    """Map eval → eval_ema; eval_of_one_data_set → eval_ema_of_one_data_set: the Trainer wants `eval_` in front."""
    word, separator, rest = prefix.partition("_")
    return f"{word}_ema{separator}{rest}"


def _renamed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation with `prefix` under the names of the average."""
    averaged = _averaged_prefix(prefix)
    return {
        name if name in AXES else f"{averaged}_{name.removeprefix(f'{prefix}_')}": value
        for name, value in metrics.items()
    }


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Open a block after which all random number generators are as before it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)

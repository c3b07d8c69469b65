"""`FastEMACallback`: an average of the weights beside the trained ones, in Lightning's Trainer.

- **Updates hang on the optimizers' own steps**, not on batches and not on `trainer.global_step`: gradient accumulation
  and steps that AMP skipped need no arithmetic then, since where torch's optimizer did not step, nothing is averaged.
- **The exchange surrounds the whole evaluation loop** as a `with` block: whatever ends the loop, an exception or
  Ctrl+C, restores the trained weights before anybody sees the exception. A checkpoint saved inside holds the trained
  weights too.
- **With `validate="both"` the loop runs twice**, the average first, so that everything a module may do is right in
  both: `self.log` in any hook, torchmetrics that accumulate over the epoch, several dataloaders. Evaluating both per
  batch would mix the two in whatever the module accumulates. See `validation` for what the first run leaves alone.
- **The average is built when training starts**, after Lightning has restored the checkpoint and moved the module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastema.core.checks import checked_count
from fastema.core.hooks import combined_found_inf
from fastema.ema import FastEMA
from fastema.integrations.callbacks import HoldsAverage, checked_choice, ema_arguments, replaced
from fastema.integrations.lightning.carry_over import carried_over, layout_of
from fastema.integrations.lightning.framework import Callback, LightningModule, Trainer, rank_zero_warn
from fastema.integrations.lightning.validation import averaged_names, extra_run, logging_both

Weights: TypeAlias = Literal["base", "ema"]
_Result = TypeVar("_Result")


class FastEMACallback(HoldsAverage, Callback):
    """Keep an exponential moving average of the module's weights beside the trained ones, and evaluate it.

    Validations, tests and predictions take the averaged weights, and the module has the trained ones again afterwards;
    before the average has begun they take the trained weights.

    With `validate="both"` each validation runs twice, and what the module logs appears twice: under its own name for
    the trained weights, and with `_ema` after the leading `val` for the averaged ones: `val_loss` and `val_ema_loss`,
    `val/loss` and `val_ema/loss`; names that do not begin so get `val_ema_` in front. Other callbacks see one
    validation, with the metrics of both. The module's own hooks run in both: learning rates and their schedulers are
    put back after the first run, but whatever else a hook does happens twice (a counter, a file, `trainer.should_stop`,
    a call to `self.logger.experiment`).

    Lightning's checkpoints hold the trained weights as `state_dict`, the averaged ones as `ema_state_dict` under the
    same keys (`module.load_state_dict(checkpoint["ema_state_dict"])`), those with `save_weights_only=True` too, and the
    state that resumes the average exactly. Where the Trainer loads a checkpoint (`ckpt_path=`), for a test too, the
    average is the checkpoint's from then on. Of a checkpoint of `EMAWeightAveraging` both the average and the trained
    weights are read.

    A module with several optimizers (manual optimization) gets one update per training batch in which any of them
    stepped, or, with `optimizer=i`, one per step of that one.

    Args:
        decay: as for `FastEMA`. With several decays the first is evaluated; `callback.ema` has them all.
        start_step: the average begins, as a copy of the weights, once so many optimizer steps are done.
        start_epoch: and not before this epoch, counted from 0.
        validate: "ema", "both" or "base".
        test: the weights that `trainer.test` takes.
        predict: the weights that `trainer.predict` takes.
        optimizer: the index of the one whose steps count, where there are several.
        **ema_args: every keyword of `FastEMA`.

    Raises:
        ValueError: an argument out of range.

    Examples:
        >>> callback = FastEMACallback(decay=0.999, decay_type="warmup")  # Trainer(callbacks=[callback])
        >>> callback.ema is None  # until training starts
        True
    """

    def __init__(
        self,
        decay: Any = 0.999,
        *,
        start_step: int = 0,
        start_epoch: int = 0,
        validate: Literal["ema", "both", "base"] = "ema",
        test: Weights = "ema",
        predict: Weights = "ema",
        optimizer: int | None = None,
        **ema_args: Any,
    ) -> None:
        super().__init__()
        self._start_step = checked_count("start_step", start_step, at_least=0)
        self._start_epoch = checked_count("start_epoch", start_epoch, at_least=0)
        checked_choice("validate", validate, ("ema", "both", "base"))
        checked_choice("test", test, ("ema", "base"))
        checked_choice("predict", predict, ("ema", "base"))
        self._weights = {"fit": validate, "validate": validate, "test": test, "predict": predict}
        if optimizer is not None:
            checked_count("optimizer", optimizer, at_least=0)
        self._optimizer = optimizer
        self._ema_args = ema_arguments(decay, ema_args)
        self._module: LightningModule | None = None  # the one that is averaged
        self._device: torch.device | None = None  # where it was then
        self._layout: dict[str, Any] = {}  # and its tensors
        self._restored: dict[str, Any] | None = None  # a state that waits for the module to be ready
        self._stepped: list[Tensor | None] = []  # with several optimizers: found_inf of each that stepped in this batch
        self._undo = ExitStack()  # undoes at the end of a stage what its setup replaced

    # ---- the stages of the trainer ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and put the averaged weights around the evaluation loop of this stage."""
        stage = str.__str__(stage)  # Lightning's own enum is a str that formats as its name
        self._undo.close()
        if sum(isinstance(callback, FastEMACallback) for callback in trainer.callbacks) > 1:
            raise ValueError("the Trainer has several FastEMACallbacks: give one of them several decays instead")
        if trainer.strategy.restore_checkpoint_after_setup:
            raise ValueError(
                f"FastEMACallback does not work with {type(trainer.strategy).__name__}: it shards the weights, and "
                "a checkpoint would hold the average of one process's shards only"
            )
        if stage == "fit" and self._module is not None and self._module is not pl_module:
            # A new module, such as that of the next fold, gets an average of its own.
            self._ema = self._restored = self._module = None
        loop = {
            "fit": trainer.fit_loop.epoch_loop.val_loop,
            "validate": trainer.validate_loop,
            "test": trainer.test_loop,
            "predict": trainer.predict_loop,
        }[stage]
        run = functools.partial(self._run_averaged, trainer, pl_module, stage, loop, loop.run)
        self._undo.enter_context(replaced(loop, "run", run))
        self._wrap_checkpoint_connector(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue or begin the average, and attach it to the optimizers."""
        count = len(trainer.optimizers)
        if self._optimizer is not None and self._optimizer >= count:
            raise ValueError(f"optimizer={self._optimizer}, but the module has {count}, counted from 0")
        self._prepare(pl_module)
        counting = trainer.optimizers if self._optimizer is None else [trainer.optimizers[self._optimizer]]
        self._stepped = []
        for optimizer in counting:
            hook = self._after_only_step if len(counting) == 1 else self._after_one_of_several_steps
            self._undo.callback(optimizer.register_step_post_hook(hook).remove)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the average where the start is reached."""
        if self._ema is None and trainer.global_step >= self._start_step and trainer.current_epoch >= self._start_epoch:
            self._build(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after a batch in which one of several optimizers stepped."""
        if self._stepped:
            stepped, self._stepped = self._stepped, []
            self._update(combined_found_inf(stepped))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach from the optimizers and the loops; the average stays, and follows the module to the CPU."""
        self._undo.close()
        self._prepare(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach; the trained weights are back in place already."""
        self._undo.close()
        self._restore()

    # ---- checkpoints ----

    def _wrap_checkpoint_connector(self, trainer: Trainer) -> None:
        """Call this callback's hooks for checkpoints of weights only too, for which Lightning calls none."""
        connector = trainer._checkpoint_connector
        if "dump_checkpoint" in vars(connector):
            return  # still wrapped: the trainer may save after the fit
        dump = functools.partial(self._dump_checkpoint, trainer, connector.dump_checkpoint)
        restore = functools.partial(self._restore_callbacks, trainer, connector.restore_callbacks)
        vars(connector).update(dump_checkpoint=dump, restore_callbacks=restore)

    def _dump_checkpoint(
        self, trainer: Trainer, dump: Callable[..., dict[str, Any]], weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint = dump(weights_only)
        if weights_only:
            self.on_save_checkpoint(trainer, trainer.lightning_module, checkpoint)
        return checkpoint

    def _restore_callbacks(self, trainer: Trainer, restore: Callable[[], None]) -> None:
        restore()
        checkpoint = trainer._checkpoint_connector._loaded_checkpoint
        if checkpoint and checkpoint.get("callbacks") is None:
            self.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming exactly needs; empty before the average has begun."""
        if self._ema is not None:
            return self._ema.state_dict()
        return dict(self._restored or {})

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drop the average of the weights that were replaced, and take the checkpoint's."""
        self._ema = self._restored = None
        if "current_model_state" in checkpoint and "averaging_state" in checkpoint:
            # Of Lightning's WeightAveraging: the average is in the place of the weights.
            updates = int(checkpoint["averaging_state"]["n_averaged"])
            if updates > 0:
                self._restored = self._state_of(checkpoint["state_dict"], checkpoint, updates)
            pl_module.load_state_dict(checkpoint["current_model_state"])
        elif "ema_state_dict" in checkpoint and checkpoint.get("callbacks") is None:
            self._restored = self._state_of(checkpoint["ema_state_dict"], checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the module is on the device where it trains."""
        self._ema, self._restored = None, state_dict or None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights as `ema_state_dict`, over the tensors of the state: a file holds them once."""
        if self._ema is not None:
            checkpoint["ema_state_dict"], state = self._with_current(FastEMA.checkpoint_states)
            if "callbacks" in checkpoint:
                checkpoint["callbacks"][self.state_key] = state

    # ---- inside ----

    def _build(self, pl_module: LightningModule) -> FastEMA:
        self._ema = FastEMA(pl_module, **self._ema_args)
        self._module = pl_module
        self._device = pl_module.device
        self._layout = layout_of(pl_module)
        return self._ema

    def _prepare(self, pl_module: LightningModule) -> None:
        """Build the average from a restored state, or anew where the module has moved to another device."""
        state = self._restored
        moved = self._device != pl_module.device
        if self._ema is not None and moved and self._module is pl_module:
            state = self._ema.state_dict()
        if state is not None:
            # A state from `_state_of` has only the tensors that the module saves.
            strict = "decay" in state
            self._build(pl_module).load_state_dict(state, strict=strict)
            self._restored = None

    def _with_current(self, call: Callable[[FastEMA], _Result]) -> _Result:
        """Return `call(average)`; rebuild the average first if the module's tensors have other names or shapes now."""
        assert self._ema is not None and self._module is not None
        try:
            return call(self._ema)
        except RuntimeError:
            if self._ema.is_applied or layout_of(self._module) == self._layout:
                raise
        old = self._ema
        anew = carried_over(old, self._build(self._module), self._module)
        if anew:
            rank_zero_warn(
                f"the module has other weights than before: the average goes on, and begins anew for {', '.join(anew)}"
            )
        return call(self._ema)

    def _update(self, found_inf: Tensor | None) -> None:
        if self._ema is not None:
            self._with_current(lambda ema: ema.update(found_inf=found_inf))

    def _after_only_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimizers look at the gradient scaler's verdict themselves, and skip inside step().
        self._update(getattr(optimizer, "found_inf", None))

    def _after_one_of_several_steps(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped.append(getattr(optimizer, "found_inf", None))

    def _run_averaged(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, loop: Any, run: Callable[[], Any]
    ) -> Any:
        """Run an evaluation loop with the averaged weights, the trained ones, or both."""
        if trainer.sanity_checking:
            return run()
        self._prepare(pl_module)
        weights = self._weights[stage]
        if weights == "base":
            return run()
        ema = self._ema if self._module is pl_module else None
        if ema is None and stage != "fit":
            rank_zero_warn(
                f"FastEMACallback has no average of this module yet: trainer.{stage} takes the trained weights. Train "
                "first, or give ckpt_path= a checkpoint that has one"
            )
            return run()
        if weights == "ema":
            if ema is None:
                return run()
            with self._averaged(trainer):
                return run()
        if ema is None:
            with logging_both(pl_module):
                return run()
        with extra_run(trainer, loop), self._averaged(trainer):
            averaged = run()
        base = run()
        # One dictionary of metrics for each dataloader.
        return [{**own, **averaged_names(other)} for own, other in zip(base, averaged, strict=True)]

    @contextmanager
    def _averaged(self, trainer: Trainer) -> Iterator[None]:
        """Open a block in which the module has the averaged weights; a checkpoint still holds the trained ones."""
        save = trainer.save_checkpoint

        def save_trained(*args: Any, **kwargs: Any) -> None:
            self._restore()
            try:
                save(*args, **kwargs)
            finally:
                self._with_current(FastEMA.apply_shadow)

        with replaced(trainer, "save_checkpoint", save_trained):
            self._with_current(FastEMA.apply_shadow)
            try:
                yield
            finally:
                self._restore()

    def _restore(self) -> None:
        if self._ema is not None and self._ema.is_applied:
            self._ema.restore()

    def _state_of(
        self, averages: dict[str, Any], checkpoint: dict[str, Any], updates: int | None = None
    ) -> dict[str, Any]:
        """Return a state for FastEMA from averaged weights under the module's keys.

        Args:
            checkpoint: Lightning's; its step is that of all optimizers together.
            updates: number of updates, if known.
        """
        step = checkpoint["global_step"] // max(1, len(checkpoint.get("optimizer_states", ())))
        known = step // self._ema_args.get("update_every", 1) if updates is None else updates
        return {"step": step, "num_updates": known, "shadow": dict(averages)}

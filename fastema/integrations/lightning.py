"""`FastEMACallback`: an average of the weights in Lightning's Trainer.

How it is done, and why so:

- **Updates hang on the optimizers' own steps**, not on batches and not on `trainer.global_step`: gradient accumulation
  and steps that AMP skipped need no arithmetic then, since where torch's optimizer did not step, nothing is averaged.
- **Validation runs a second time**, with the averaged weights in the module. Every hook of the module runs in both
  runs, so everything that a module may do is right in both: `self.log` in any hook, torchmetrics that accumulate over
  the epoch, metrics computed in `on_validation_epoch_end`, several dataloaders, `limit_val_batches`. Evaluating both
  per batch would mix the two in whatever the module accumulates. The averaged run comes first, and other callbacks
  see only the second: so `ModelCheckpoint(monitor="val_ema_loss")` and `EarlyStopping` find all metrics at
  their one `on_validation_end`, and never meet averaged weights. The first run leaves no trace in the random number
  generators or in the progress of the loops: training goes on bit for bit as without it.
- **The exchange surrounds the whole loop** as a `with` block: whatever ends the loop, an exception or Ctrl+C, restores
  the trained weights before anybody sees the exception. A checkpoint saved inside holds the trained weights too.
- **The average is built when training starts**, after Lightning has restored the checkpoint and moved the module.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from fastema.checks import checked_count
from fastema.ema import FastEMA
from fastema.integrations.arguments import refuse_early
from fastema.integrations.extras import require

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng
else:
    # The same code under two names; a Trainer of one does not take callbacks of the other.
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        _pl = require("pytorch_lightning", "lightning")
    else:
        _pl = require("lightning.pytorch", "lightning")
    Callback, LightningModule, Trainer = _pl.Callback, _pl.LightningModule, _pl.Trainer
    rank_zero_warn = require(f"{_pl.__name__}.utilities.rank_zero", "lightning").rank_zero_warn
    isolate_rng = require(f"{_pl.__name__}.utilities.seed", "lightning").isolate_rng

Weights: TypeAlias = Literal["base", "ema"]

#: The leading word of a metric's name that says "validation", and what separates it from the rest.
_VALIDATION = re.compile(r"(val|valid|validation)([_/.\- ].*)")


class FastEMACallback(Callback):
    """Keeps an exponential moving average of the module's weights, and validates it.

    With `validate="both"`, what the module logs in its validation appears twice: under its own name for the trained
    weights, and with `_ema` after the leading `val` for the averaged ones: `val_loss` and `val_ema_loss`,
    `val/loss` and `val_ema/loss`; names that do not begin so get `val_ema_` in front. Before the average has begun,
    both are the same. With `validate="ema"` only the averaged weights are validated, under the module's own names.
    Both happen in `trainer.fit` and in `trainer.validate`.

    Lightning's checkpoints hold the trained weights as `state_dict`, the averaged ones as `ema_state_dict` under the
    same keys (`module.load_state_dict(checkpoint["ema_state_dict"])`), and the state that resumes the average exactly.
    Where the Trainer loads a checkpoint (`ckpt_path=`), for a test too, the average is the checkpoint's from then on.

    A module with several optimizers (manual optimization) gets one update per training batch in which any of them
    stepped, or, with `optimizer=i`, one per step of that one.

    Args:
        decay: as for `FastEMA`. With several decays the first is validated; `callback.ema` has them all.
        start_step: the average begins, as a copy of the weights, once so many optimizer steps are done.
        start_epoch: and not before this epoch, counted from 0.
        validate: "both", "ema" or "base".
        test: the weights that `trainer.test` takes.
        predict: the weights that `trainer.predict` takes.
        optimizer: the index of the one whose steps count, where there are several.
        **ema_args: every keyword of `FastEMA`.

    Raises:
        ValueError: an argument out of range.

    Example:
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
        validate: Literal["both", "ema", "base"] = "both",
        test: Weights = "base",
        predict: Weights = "base",
        optimizer: int | None = None,
        **ema_args: Any,
    ) -> None:
        super().__init__()
        self._start_step = checked_count("start_step", start_step, at_least=0)
        self._start_epoch = checked_count("start_epoch", start_epoch, at_least=0)
        for name, value, known in (
            ("validate", validate, ("both", "ema", "base")),
            ("test", test, ("base", "ema")),
            ("predict", predict, ("base", "ema")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
        self._weights = {"fit": validate, "validate": validate, "test": test, "predict": predict}
        if optimizer is not None:
            checked_count("optimizer", optimizer, at_least=0)
        self._optimizer = optimizer
        self._ema_args = {"decay": decay, **ema_args}
        refuse_early(self._ema_args)
        self._ema: FastEMA | None = None
        self._module: LightningModule | None = None  # the one that is averaged
        self._device: torch.device | None = None  # where it was then
        self._restored: dict[str, Any] | None = None  # a state that waits for the module to be ready
        self._stepped = False  # one of several optimizers stepped in this batch
        self._all_skipped: Tensor | None = None  # whether all that stepped have found infinities
        self._undo = ExitStack()  # what a stage of the trainer hung up, taken down at its end

    @property
    def ema(self) -> FastEMA | None:
        """The average; None before it has begun."""
        return self._ema

    def ema_state_dict(self) -> dict[str, Any]:
        """The averaged weights under the module's own keys: `module.load_state_dict(it)` works.

        Raises:
            RuntimeError: the average has not begun.
        """
        if self._ema is None:
            raise RuntimeError("there is no average yet: it begins in trainer.fit, at start_step and start_epoch")
        return self._ema.shadow_state_dict()

    # ---- the stages of the trainer ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work, and puts the averaged weights around the evaluation loop of this stage."""
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
            # The next fold, say: its average has nothing to do with the last one's.
            self._ema = self._restored = self._module = None
        loop = {
            "fit": trainer.fit_loop.epoch_loop.val_loop,
            "validate": trainer.validate_loop,
            "test": trainer.test_loop,
            "predict": trainer.predict_loop,
        }[stage]
        run = functools.partial(self._run_averaged, trainer, pl_module, stage, loop, loop.run)
        self._undo.enter_context(_replaced(loop, "run", run))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continues or begins the average, and attaches it to the optimizers."""
        count = len(trainer.optimizers)
        if self._optimizer is not None and self._optimizer >= count:
            raise ValueError(f"optimizer={self._optimizer}, but the module has {count}, counted from 0")
        self._prepare(pl_module)
        counting = trainer.optimizers if self._optimizer is None else [trainer.optimizers[self._optimizer]]
        self._stepped, self._all_skipped = False, None
        for optimizer in counting:
            hook = self._after_only_step if len(counting) == 1 else self._after_one_of_several_steps
            self._undo.callback(optimizer.register_step_post_hook(hook).remove)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins the average where the start is reached."""
        if self._ema is None and trainer.global_step >= self._start_step and trainer.current_epoch >= self._start_epoch:
            self._build(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages after a batch in which one of several optimizers stepped."""
        if self._stepped:
            skipped, self._stepped, self._all_skipped = self._all_skipped, False, None
            self._update(skipped)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detaches from the optimizers and the loops; the average stays, and follows the module to the CPU."""
        self._undo.close()
        self._prepare(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detaches; the trained weights are back in place already."""
        self._undo.close()
        if self._ema is not None and self._ema.is_applied:
            self._ema.restore()

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """What resuming exactly needs; empty before the average has begun."""
        if self._ema is not None:
            return self._ema.state_dict()
        return dict(self._restored or {})

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forgets the average of the weights that the checkpoint's now replace."""
        self._ema = self._restored = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the average of a checkpoint over as soon as the module is where it trains."""
        self._ema, self._restored = None, state_dict or None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the averaged weights as `ema_state_dict`; they share their memory with the average, on the disk too."""
        if self._ema is not None:
            checkpoint["ema_state_dict"] = self._ema.shadow_state_dict()

    # ---- inside ----

    def _build(self, pl_module: LightningModule) -> None:
        self._ema = FastEMA(pl_module, **self._ema_args)
        self._module = pl_module
        self._device = pl_module.device

    def _prepare(self, pl_module: LightningModule) -> None:
        """Makes what was restored, or averaged before on another device, an average of the module as it is now."""
        state = self._restored
        moved = self._device != pl_module.device
        if self._ema is not None and moved and self._module is pl_module:
            state = self._ema.state_dict()
        if state is not None:
            self._build(pl_module)
            assert self._ema is not None
            self._ema.load_state_dict(state)
            self._restored = None

    def _update(self, found_inf: Tensor | None) -> None:
        if self._ema is not None:
            self._ema.update(found_inf=found_inf)

    def _after_only_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimizers look at the gradient scaler's verdict themselves, and skip inside step().
        self._update(getattr(optimizer, "found_inf", None))

    def _after_one_of_several_steps(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if not self._stepped:
            self._all_skipped = found_inf
        elif found_inf is None or self._all_skipped is None:
            self._all_skipped = None
        else:
            self._all_skipped = torch.minimum(self._all_skipped, found_inf)
        self._stepped = True

    def _run_averaged(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, loop: Any, run: Callable[[], Any]
    ) -> Any:
        """Runs an evaluation loop with the averaged weights, the trained ones, or both."""
        if trainer.sanity_checking:
            return run()
        self._prepare(pl_module)
        weights = self._weights[stage]
        if weights == "base":
            return run()
        ema = self._ema if self._module is pl_module else None
        if ema is None and stage != "fit":
            if weights == "ema":
                raise RuntimeError(
                    f"trainer.{stage} shall take the averaged weights, but there are none: train first, or give "
                    "ckpt_path= a checkpoint of a training with this callback that had reached its start"
                )
            rank_zero_warn(f"FastEMACallback has no average of this module: trainer.{stage} takes the trained weights")
            return run()
        if weights == "ema":
            if ema is None:
                return run()
            with self._averaged(trainer, ema):
                return run()
        if ema is None:
            with _logging(pl_module, own=True, averaged=True):
                return run()
        with (
            isolate_rng(),
            _untouched(loop),
            _logging(pl_module, own=False, averaged=True),
            self._averaged(trainer, ema),
            _replaced(trainer, "callbacks", []),
        ):
            averaged = run()
        base = run()
        # One dictionary of metrics for each dataloader.
        return [{**own, **other} for own, other in zip(base, averaged, strict=True)]

    @contextmanager
    def _averaged(self, trainer: Trainer, ema: FastEMA) -> Iterator[None]:
        """A block in which the module has the averaged weights, and a checkpoint that is saved still the trained."""
        save, callbacks = trainer.save_checkpoint, trainer.callbacks

        def save_trained(*args: Any, **kwargs: Any) -> None:
            ema.restore()
            try:
                # All callbacks have something to save, also those that do not see this run.
                with _replaced(trainer, "callbacks", callbacks):
                    save(*args, **kwargs)
            finally:
                ema.apply_shadow()

        with _replaced(trainer, "save_checkpoint", save_trained), ema.swapped():
            yield


def _averaged_name(name: str) -> str:
    """The name under which a metric of the averaged weights is logged."""
    match = _VALIDATION.fullmatch(name)
    return f"{match[1]}_ema{match[2]}" if match else f"val_ema_{name}"


@contextmanager
def _logging(pl_module: LightningModule, own: bool, averaged: bool) -> Iterator[None]:
    """A block in which `self.log` of the module logs under its own names, those of the average, or both."""
    log = pl_module.log

    def log_as(name: str, *args: Any, **kwargs: Any) -> None:
        if own:
            log(name, *args, **kwargs)
        if averaged:
            log(_averaged_name(name), *args, **kwargs)

    with _replaced(pl_module, "log", log_as):
        yield


@contextmanager
def _untouched(loop: Any) -> Iterator[None]:
    """A block after which the loop has counted nothing, so that checkpoints hold the progress of one run."""
    restarting, loop.restarting = loop.restarting, False
    progress = deepcopy(loop.batch_progress.state_dict())
    seen = getattr(loop, "_seen_batches_per_dataloader", None)
    counts = None if seen is None else dict(seen)
    try:
        yield
    finally:
        loop.restarting = restarting
        loop.batch_progress.load_state_dict(progress)
        seen = getattr(loop, "_seen_batches_per_dataloader", None)
        if seen is not None and counts is not None:
            seen.clear()
            seen.update(counts)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A block in which an attribute of one object is another one."""
    own = vars(owner)
    was = own.get(name)
    was_own = name in own
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if was_own:
            object.__setattr__(owner, name, was)
        else:
            object.__delattr__(owner, name)

"""Lightning's `WeightAveraging` and `EMAWeightAveraging`, with fastema's update and exchange under them.

    from fastema.integrations.lightning import EMAWeightAveraging  # was: from lightning.pytorch.callbacks import ...

They are subclasses of Lightning's and override only what moves weights, so that arguments, cadence, hooks and the
format of checkpoints are Lightning's own, and so is what a subclass may override.

Differences from Lightning:

- The average is a `fastema.swa_utils.AveragedModel`; its docstring lists the differences from torch's (rounding, and
  integer buffers, which are copied instead of frozen).
- The exchange before and after a validation moves pointers, where Lightning copies every tensor three times.
- An exception in a validation leaves the trained weights in the model, and a checkpoint saved inside of a validation
  has the trained weights and the average each in its own place. Lightning leaves and saves them exchanged.
- A fit that ends before the first update leaves the trained weights in the model, and warns; so does a validation
  before it, which takes the initial weights as Lightning's does.
- The callback can be pickled, also before the fit (for `ddp_spawn`).
- A checkpoint of `FastEMACallback` is read: both the trained weights and its average.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from fastema.integrations.lightning.framework import (
    LightningModule,
    Trainer,
    callbacks,
    is_overridden,
    rank_zero_warn,
)
from fastema.swa_utils import AveragedModel, get_ema_avg_fn


class WeightAveraging(callbacks.WeightAveraging):
    """Lightning's `WeightAveraging`: averages the weights after every step for which `should_update()` says so.

    Args:
        device: where the average is kept; None: where the model is.
        use_buffers: average the buffers too; False: copy them.
        **kwargs: for `AveragedModel`: `avg_fn` or `multi_avg_fn`; neither: equal weights (SWA).
    """

    _exchanged: ExitStack | None = None  # while the model holds the average
    _said_not_begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the average when a fit begins."""
        if stage != "fit":
            return
        if getattr(trainer.strategy, "zero_stage_3", False):
            raise ValueError(
                f"{type(self).__name__} averages a copy of the module, whose parameters are empty under DeepSpeed's "
                "ZeRO-3: use stage 1 or 2, or FastEMA(engine) in a training loop of your own"
            )
        if is_overridden("configure_model", pl_module):
            rank_zero_warn(
                "WeightAveraging calls configure_model() to know the layers, and does not shard them: a model that "
                "needs sharding may not fit into memory"
            )
            pl_module.configure_model()
        self._exchanged = None
        self._average_model = AveragedModel(
            pl_module, self._device or pl_module.device, use_buffers=self._use_buffers, **self._kwargs
        )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the model; before its first update that is the initial weights, as in Lightning."""
        if not trainer.sanity_checking and not self._has_begun and not self._said_not_begun:
            self._said_not_begun = True
            rank_zero_warn(
                f"{type(self).__name__} has not averaged yet, and the average is a copy of the initial weights: these "
                "are validated, as with Lightning's own callback. FastEMACallback(start_step=...) validates the "
                "trained weights until the average begins"
            )
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the average into the model, if there is one."""
        if self._has_begun:
            super().on_train_end(trainer, pl_module)
        else:
            rank_zero_warn(
                f"{type(self).__name__} has not averaged in the whole fit: the model keeps its trained weights, "
                "where Lightning's own callback would put the initial ones in their place"
            )

    @property
    def _has_begun(self) -> bool:
        return self._average_model is None or int(self._average_model.n_averaged) > 0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the trained weights back, before any checkpoint of the crash is written."""
        if self._exchanged is not None:
            self._swap_models(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average in `state_dict` and the trained weights in `current_model_state`."""
        if self._exchanged is None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            return
        self._swap_models(pl_module)
        try:
            # The checkpoint's tensors are aliases of the weights and follow every exchange.
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            for key in ("state_dict", "current_model_state"):
                checkpoint[key] = {
                    name: value.clone() if isinstance(value, torch.Tensor) else value
                    for name, value in checkpoint[key].items()
                }
        finally:
            self._swap_models(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the trained weights and the average."""
        if "ema_state_dict" in checkpoint and "current_model_state" not in checkpoint:
            checkpoint = {
                **checkpoint,
                "state_dict": checkpoint["ema_state_dict"],
                "current_model_state": checkpoint["state_dict"],
                "averaging_state": {"n_averaged": torch.tensor(1)},  # not 0: the average has begun
            }
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _swap_models(self, pl_module: LightningModule) -> None:
        if self._exchanged is not None:
            exchanged, self._exchanged = self._exchanged, None
            exchanged.close()
            return
        if isinstance(self._average_model, AveragedModel):
            stack = ExitStack()
            try:
                stack.enter_context(self._average_model.swapped(pl_module))
            except ValueError:  # these two cannot be exchanged by pointer
                pass
            else:
                self._exchanged = stack
                return
        super()._swap_models(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        if self._exchanged is not None:
            raise RuntimeError("the callback cannot be pickled or copied while the model holds the average")
        return self.__dict__


class EMAWeightAveraging(WeightAveraging, callbacks.EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging`: an exponential moving average of the weights, validated in their place.

    Args:
        device: where the average is kept; None: where the model is.
        use_buffers: average the buffers too; False: copy them.
        decay: of the average, in [0, 1].
        update_every_n_steps: update at every so many optimizer steps.
        update_starting_at_step: the first step that updates, counted from 0.
        update_starting_at_epoch: update at the end of each epoch from this one on too, counted from 0.
        **kwargs: for `AveragedModel`.

    Examples:
        >>> callback = EMAWeightAveraging(decay=0.999)  # Trainer(callbacks=[callback])
        >>> callback.should_update(step_idx=0)
        True
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            device,
            use_buffers,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
            update_starting_at_epoch=update_starting_at_epoch,
            **kwargs,
        )
        self._kwargs["avg_fn"] = get_ema_avg_fn(decay)  # Lightning's is a closure, which cannot be pickled

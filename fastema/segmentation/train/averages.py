"""The exponential moving averages of a run: one FastEMA with one or several decays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from fastema import FastEMA
from fastema.advisor import distinct_decays, settle_epochs
from fastema.segmentation.distributed.parallel import ParallelModel
from fastema.segmentation.errors import UserError
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.report.timers import Timers

T = TypeVar("T")


@dataclass(frozen=True)
class SavedAverage:
    """One average as `save_checkpoint(ema=...)` takes it: `ema_net` is this one, `ema` the state of all."""

    is_applied: bool
    state: dict[str, Any]
    weights: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def shadow_state_dict(self) -> dict[str, Any]:
        return self.weights


def forgets_start(options: TrainOptions, steps_per_epoch: int, total_steps: int) -> bool:
    """Return whether the averages forget the weights they start from within an epoch."""
    if options.ema_profiles:
        return True
    decay_type, decay_args = options.ema_decay_type, dict[str, Any](options.ema_decay_args or {})
    try:
        settled = settle_epochs(
            options.decays, steps_per_epoch, decay_type=decay_type, total_steps=total_steps, **decay_args
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"the EMA cannot be set up: {error}") from error
    return max(settled) <= 1


class Averages:
    """The averages of a network, updated after every step that its optimizer makes.

    Args:
        net: with the weights to start from.
        optimizer: of the network.
        options: decays and schedule.
        start_epoch: the averages start before this epoch.
        total_steps: optimizer steps from there to the end of the run, for schedules with an end.
        timers: get the time of every update.

    Attributes:
        decays: of the averages that can differ in this run, each with those that are left out for it.
        names: of the averages, the main one first.
        after_update: called after every update.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        options: TrainOptions,
        start_epoch: int,
        total_steps: int,
        timers: Timers,
    ) -> None:
        self.start_epoch = start_epoch
        self.total_steps = total_steps
        self.names = options.average_names
        self.decays: dict[float, tuple[float, ...]] = {}
        self.after_update: Callable[[], None] | None = None
        decay_type, decay_args = options.ema_decay_type, dict[str, Any](options.ema_decay_args or {})
        decays: list[float] = [options.ema_decay]
        try:
            if options.ema_profiles:
                decay_type, decay_args = "power", {"sigma_rel": list(options.ema_profiles)}
            else:
                self.decays = distinct_decays(options.decays, decay_type, max(1, total_steps), **decay_args)
                decays = list(self.decays)
                self.names = [f"{decay:g}" for decay in decays]
            self.ema = FastEMA(
                net,
                decays if len(decays) > 1 else decays[0],
                decay_type=decay_type,
                total_steps=total_steps,
                **decay_args,
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"the EMA cannot be set up: {error}") from error

        def after_step(*_: object) -> None:
            with timers.timed(timers.update):
                self.ema.update()
            if self.after_update is not None:
                self.after_update()

        # As FastEMA.attach does, but timed. It does not run for a step that a gradient scaler skips.
        optimizer.register_step_post_hook(after_step)

    def decays_now(self) -> list[float]:
        """Return each average's decay in its last update, or before that in its first."""
        decays = self.ema.decay_at(max(1, self.ema.num_updates))
        return list(decays) if isinstance(decays, tuple) else [decays]

    def with_each(self, score: Callable[[], T]) -> list[T]:
        """Call `score` with each average in the network, the main one first."""
        scores = []
        for which in range(len(self.names)):
            with self.ema.swapped(which=which):
                scores.append(score())
        return scores

    def saved(self, parallel: ParallelModel) -> list[SavedAverage]:
        """Return every average for a checkpoint, the main one first. All processes must call this."""
        state = parallel.gather_state(self.ema.state_dict())
        saved = []
        for which, shadow in enumerate(_as_list(state["shadow"])):
            weights = self.ema.shadow_state_dict(which)
            # The same tensors as in the state, so that they are gathered once and stored once.
            weights = {key: shadow[key] if key in shadow else parallel.gather_state(weights[key]) for key in weights}
            saved.append(SavedAverage(self.ema.is_applied, state, weights))
        return saved

    def load(self, state: dict[str, Any]) -> list[str]:
        """Load the averages of a checkpoint.

        As many as before continue in their order with the new decays. Otherwise each takes the saved one of the same
        decay, or one that was the same so far, or starts from the weights where there is none.

        Returns:
            The names of those that start from the weights.
        """
        own = self.ema.state_dict()
        mine, saved = _as_list(own["shadow"]), _as_list(state.get("shadow", {}))
        fresh: list[str] = []
        if len(mine) != len(saved):
            by_decay = dict(zip(_as_list(state.get("decay")), saved, strict=False))
            by_decay |= self._same_so_far(by_decay, state)
            fresh = [name for name, decay in self._named_decays() if decay not in by_decay]
            saved = [by_decay.get(decay, start) for (_, decay), start in zip(self._named_decays(), mine, strict=True)]
        shadow = saved if isinstance(own["shadow"], list) else saved[0]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # another decay: said already, with all that changed
                configured = {key: own[key] for key in ("decay", "decay_type", "decay_args")}
                self.ema.load_state_dict({**state, **configured, "shadow": shadow})
        except ValueError as error:
            raise UserError(f"the EMA cannot be set up: {error}") from error
        return fresh

    def _same_so_far(self, by_decay: dict[float, Any], state: dict[str, Any]) -> dict[float, Any]:
        """Return own decays with the saved average of another decay that was the same in all updates so far."""
        if state.get("decay_type") != "threshold":
            return {}
        own = [decay for _, decay in self._named_decays() if decay not in by_decay]
        groups = distinct_decays([*by_decay, *own], "threshold", max(1, int(state["step"])))
        return {same: by_decay[first] for first, others in groups.items() for same in others if first in by_decay}

    def _named_decays(self) -> Iterator[tuple[str, float]]:
        decays = self.ema.decay
        return zip(self.names, decays if isinstance(decays, tuple) else (decays,), strict=True)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

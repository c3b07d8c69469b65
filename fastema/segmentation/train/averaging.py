"""The exponential moving averages of a run: one FastEMA with one or several decays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from fastema import FastEMA
from fastema.advisor import distinct_decays, settle_epochs
from fastema.errors import UserError
from fastema.posthoc import Snapshots
from fastema.segmentation.distributed.parallel import ParallelModel
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


@contextmanager
def _as_user_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"the EMA cannot be set up: {error}") from error


def forgets_start(options: TrainOptions, steps_per_epoch: int, total_steps: int) -> bool:
    """Return whether the averages forget the weights they start from within an epoch."""
    if options.ema_profiles:
        return True
    schedule: dict[str, Any] = {"decay_type": options.ema_decay_type, **(options.ema_decay_args or {})}
    with _as_user_errors():
        return max(settle_epochs(options.decays, steps_per_epoch, total_steps=total_steps, **schedule)) <= 1


class Averages:
    """The averages of a network: none at first, and once started, updated after every step that its optimizer makes.

    Args:
        net: with the weights to start from, at the start.
        optimizer: of the network.
        options: decays and schedule.
        timers: get the time of every update.
    """

    ema: FastEMA  # once started

    def __init__(self, net: nn.Module, optimizer: Optimizer, options: TrainOptions, timers: Timers) -> None:
        self.names: list[str] = []  # of the averages that have started, the main one first
        # By decay, those left out because they would give the same average in this run.
        self.decays: dict[float, tuple[float, ...]] = {}
        self.start_epoch: int | None = None
        self.total_steps = 0
        self._net, self._optimizer, self._options, self._timers = net, optimizer, options, timers
        self._snapshots: Snapshots | None = None
        self._due: set[int] = set()
        self._before = 0, 0  # of a run that goes on: the steps done, and the length that was planned

    def start(self, epoch: int, total_steps: int, done: int = 0, planned: int = 0) -> None:
        """Start before an epoch.

        Args:
            epoch: from 1.
            total_steps: optimizer steps from here to the end of the run; of a run that goes on, those done and those to
                come.
            done: steps done.
            planned: `total_steps` as it was before the run was interrupted.
        """
        options = self._options
        self.start_epoch, self.total_steps, self._before = epoch, total_steps, (done, planned or total_steps)
        decay_type, decay_args = options.ema_decay_type, dict[str, Any](options.ema_decay_args or {})
        decays, names = [options.ema_decay], options.average_names
        with _as_user_errors():
            if options.ema_profiles:
                decay_type, decay_args = "power", {"sigma_rel": list(options.ema_profiles)}
            else:
                self.decays = distinct_decays(options.decays, decay_type, max(1, total_steps), **decay_args)
                decays = list(self.decays)
                names = [f"{decay:g}" for decay in decays]
            decay = decays if len(decays) > 1 else decays[0]
            self.ema = FastEMA(self._net, decay, decay_type=decay_type, total_steps=total_steps, **decay_args)
        self.names = names

        def after_step(*_: object) -> None:
            with self._timers.timed(self._timers.update):
                self.ema.update()
            if self._snapshots is not None and self.ema.num_updates in self._due:
                self._snapshots.save()

        # As FastEMA.attach does, but timed. It does not run for a step that a gradient scaler skips.
        self._optimizer.register_step_post_hook(after_step)

    def decays_now(self) -> list[float]:
        """Return each average's decay in its last update, or before that in its first."""
        return _as_list(self.ema.decay_at(max(1, self.ema.num_updates))) if self.names else []

    def with_each(self, score: Callable[[], T]) -> list[T]:
        """Call `score` with each average in the network, the main one first."""
        scores = []
        for which in range(len(self.names)):
            with self.ema.swapped(which=which):
                scores.append(score())
        return scores

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def start_snapshots(self, folder: Path) -> str:
        """Save evenly spaced snapshots from now on, if the options want any; return what they will take, once."""
        count = self._options.snapshots
        if self._snapshots is not None or not self.names or not count:
            return ""
        self._snapshots = Snapshots(folder, self.ema, limit=count, verbose=False)
        done, planned = self._before
        self._due = {max(1, round(planned * (i + 1) / count)) for i in range(count)}
        if planned != self.total_steps:  # those that are left, over the steps that are left
            left = count - sum(step <= done for step in self._due)
            ahead = self.total_steps - done
            self._due = {done + max(1, round(ahead * (i + 1) / left)) for i in range(left)}
        return self._snapshots.disk_use().removeprefix("fastema: ")

    def save_last_snapshot(self) -> bool:
        """Save one at the end of the run, whose last steps a scaler may have skipped; return whether there are any."""
        if self._snapshots is not None and self.ema.num_updates not in self._due:
            self._snapshots.save()
        return self._snapshots is not None

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def saved(self, parallel: ParallelModel) -> list[SavedAverage]:
        """Return every average for a checkpoint, the main one first. All processes must call this."""
        if not self.names:
            return []
        state = parallel.gather_state(self.ema.state_dict())
        saved = []
        for which, shadow in enumerate(_as_list(state["shadow"])):
            weights = self.ema.shadow_state_dict(which)
            # The same tensors as in the state, so that they are gathered once and stored once.
            weights = {key: shadow[key] if key in shadow else parallel.gather_state(weights[key]) for key in weights}
            saved.append(SavedAverage(self.ema.is_applied, state, weights))
        return saved

    def load(self, state: dict[str, Any]) -> list[str]:
        """Load the averages of a checkpoint; return the names of those that start from the weights.

        As many as before continue in their order with the new decays. Otherwise each takes the saved one of the same
        decay, or one that was the same so far, or starts from the weights where there is none.
        """
        own = self.ema.state_dict()
        mine, saved = _as_list(own["shadow"]), _as_list(state.get("shadow", {}))
        fresh: list[str] = []
        if len(mine) != len(saved):
            decays = _as_list(self.ema.decay)
            by_decay = dict(zip(_as_list(state.get("decay")), saved, strict=False))
            if state.get("decay_type") == "threshold":  # which makes large decays the same average for a while
                alike = distinct_decays([*by_decay, *decays], "threshold", max(1, int(state["step"])))
                by_decay = {same: by_decay[first] for first in by_decay for same in alike.get(first, ())} | by_decay
            fresh = [name for name, decay in zip(self.names, decays, strict=True) if decay not in by_decay]
            saved = [by_decay.get(decay, start) for decay, start in zip(decays, mine, strict=True)]
        shadow = saved if isinstance(own["shadow"], list) else saved[0]
        configured = {key: own[key] for key in ("decay", "decay_type", "decay_args")}
        with _as_user_errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # another decay: said already, with all that changed
            self.ema.load_state_dict({**state, **configured, "shadow": shadow})
        return fresh


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]

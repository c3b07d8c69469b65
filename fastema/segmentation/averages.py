"""The exponential moving averages of a run: one FastEMA, however many decays, and what the checkpoints need of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastema import FastEMA
from fastema.segmentation.costs import Costs
from fastema.segmentation.errors import UserError
from fastema.segmentation.history import EpochRecord
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.spread import Spread


@dataclass(frozen=True)
class SavedAverage:
    """One of the averages as `save_checkpoint` takes it: `ema_net` is this one, `ema` all of them."""

    is_applied: bool
    state: dict[str, Any]
    weights: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def shadow_state_dict(self) -> dict[str, Any]:
        return self.weights


class Averages:
    """The averages of a network, updated after every step that its optimizer really makes.

    Args:
        net: with the weights that the averages start from.
        optimizer: of the network.
        options: decays and schedule.
        start_epoch: the epoch before which the averages start; a schedule with an end begins here.
        total_steps: optimizer steps from there to the end of the run.
        costs: gets the time of every update.

    Raises:
        UserError: the options do not make an average.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        options: TrainOptions,
        start_epoch: int,
        total_steps: int,
        costs: Costs,
    ) -> None:
        self.start_epoch = start_epoch
        self.total_steps = total_steps
        self.names = [f"{decay:g}" for decay in options.decays]
        several = len(options.decays) > 1
        decay_args: dict[str, Any] = dict(options.ema_decay_args or {})
        try:
            self.ema = FastEMA(
                net,
                options.decays if several else options.decays[0],
                decay_type=options.ema_decay_type,
                total_steps=total_steps,
                **decay_args,
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"the EMA cannot be set up: {error}") from error

        def after_step(*_: object) -> None:
            with costs.timed(costs.update):
                self.ema.update()

        # As FastEMA.attach does, and timed. A gradient scaler that leaves a step out does not come here.
        optimizer.register_step_post_hook(after_step)

    def decays_now(self) -> list[float]:
        """The decay of each average's last update; before the first one, of that."""
        decays = self.ema.decay_at(max(1, self.ema.num_updates))
        return list(decays) if isinstance(decays, tuple) else [decays]

    def each(self) -> Iterator[tuple[int, str]]:
        """Number and name of every average, the main one first."""
        return iter(enumerate(self.names))

    def saved(self, spread: Spread) -> list[SavedAverage]:
        """What a checkpoint needs of every average, the main one first. All processes must call it."""
        state = spread.gathered(self.ema.state_dict())
        saved = []
        for which, shadow in enumerate(_as_list(state["shadow"])):
            weights = self.ema.shadow_state_dict(which)
            # The same tensors as in the state, so that they are gathered once and stored once.
            weights = {key: shadow[key] if key in shadow else spread.gathered(weights[key]) for key in weights}
            saved.append(SavedAverage(self.ema.is_applied, state, weights))
        return saved

    def load(self, state: dict[str, Any]) -> list[str]:
        """Goes on with the averages of a checkpoint.

        As many as before go on in their order, with the new decays. Otherwise each takes the saved one of the same
        decay, and starts from the weights where there is none.

        Returns:
            The names of those that start from the weights.

        Raises:
            UserError: the averages are of another network.
        """
        own = self.ema.state_dict()
        mine, saved = _as_list(own["shadow"]), _as_list(state.get("shadow", {}))
        fresh: list[str] = []
        if len(mine) != len(saved):
            by_decay = dict(zip(_as_list(state.get("decay")), saved, strict=False))
            fresh = [name for name, decay in self._named_decays() if decay not in by_decay]
            mine = [by_decay.get(decay, start) for (_, decay), start in zip(self._named_decays(), mine, strict=True)]
            saved = mine
        shadow = saved if isinstance(own["shadow"], list) else saved[0]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # another decay: said already, with all that changed
                configured = {key: own[key] for key in ("decay", "decay_type", "decay_args")}
                self.ema.load_state_dict({**state, **configured, "shadow": shadow})
        except ValueError as error:
            raise UserError(f"the EMA cannot be set up: {error}") from error
        return fresh

    def _named_decays(self) -> Iterator[tuple[str, float]]:
        decays = self.ema.decay
        return zip(self.names, _as_list(list(decays) if isinstance(decays, tuple) else decays), strict=True)


def evaluate_each(averages: Averages, score: Callable[[], Any]) -> list[Any]:
    """What `score()` says of the network with each of the averages in it."""
    scores = []
    for which, _ in averages.each():
        with averages.ema.swapped(which=which):
            scores.append(score())
    return scores


def average_ious(record: EpochRecord) -> list[float]:
    """The IoU of every average in an epoch, the main one first; empty without one."""
    return [] if record.ema_iou is None else [record.ema_iou, *record.other_ema_ious.values()]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

"""FastEMA: an exponential moving average of a model's weights, kept in one pass and swapped in by pointer.

It keeps no second model. The average lives in shadow storages beside the model's own (`fastema.shadow`); an update is
one kernel over all of them, and validation of the averaged model exchanges the two sides' data pointers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastema import backends
from fastema.checks import (
    checked_count,
    checked_decay,
    checked_device,
    checked_shadow_dtype,
    difference,
    refuse_differences,
)
from fastema.policy import Buffers, Policy, Source, collect, named_tensors
from fastema.schedules import make_schedule
from fastema.shadow import Shadow


class LoadResult(NamedTuple):
    """What `load_state_dict(strict=False)` found: as `nn.Module.load_state_dict` returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class AttachedHandle:
    """What `FastEMA.attach` returns; `remove()` ends the updates."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class FastEMA:
    """An exponential moving average of `model`: `shadow <- decay * shadow + (1 - decay) * live`, once a step.

    The shadow starts as a copy of the model, so build it after the weights are loaded and the model is where and in
    the dtype in which it trains.

    Args:
        model: the module whose parameters and buffers are averaged, or an iterable of (name, tensor).
        decay: in [0, 1]; the average reaches back about 1 / (1 - decay) updates.
        decay_type: the schedule: "constant", "threshold", "exp", "linear", "warmup", or any name registered in
            `fastema.schedules.EMA_DECAY_FUNCTIONS`.
        total_steps: optimizer steps of the whole training; "exp" and "linear" need it.
        update_every: average only at every so many steps, with the same decay.
        update_after_step: up to this step the shadow follows the model exactly (decay 0).
        buffers: "auto" averages running statistics of normalisation layers and copies every other buffer; "average",
            "copy" or "skip" do so to all. Integer and bool tensors are copied.
        policy: `(name, tensor, module) -> "average" | "copy" | "skip" | None` decides per tensor; None: the default.
        dtype: the shadow's; None: float32 for bfloat16 and float16 weights, else the weights' own.
        device: the shadow's; None: where the weights are.
        nonfinite: "skip": an element whose live value is NaN or infinite keeps its shadow; "propagate".
        backend: "auto", "native" or "torch"; None: the environment variable FASTEMA_BACKEND, else "auto".
        **decay_args: for the schedule, e.g. `beta=15` for "exp".

    Raises:
        ValueError: an argument out of range, or a tensor that cannot be averaged; says which and what to do.
        TypeError: an argument that neither FastEMA nor the schedule takes.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = FastEMA(model, decay=0.9)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1.0)
        >>> before = model.bias.item()
        >>> ema.update()
        >>> with ema.swapped():
        ...     round(before - model.bias.item(), 4)
        0.9
        >>> model.bias.item() == before
        True
    """

    def __init__(
        self,
        model: Source,
        decay: float = 0.999,
        *,
        decay_type: str = "constant",
        total_steps: int | None = None,
        update_every: int = 1,
        update_after_step: int = 0,
        buffers: Buffers = "auto",
        policy: Policy | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        nonfinite: Literal["skip", "propagate"] = "skip",
        backend: str | None = None,
        **decay_args: Any,
    ) -> None:
        self._decay = checked_decay(decay)
        self._decay_type = decay_type
        self._total_steps = total_steps
        self._schedule = make_schedule(decay_type, total_steps, decay_args)
        self._update_every = checked_count("update_every", update_every, at_least=1)
        self._update_after_step = checked_count("update_after_step", update_after_step, at_least=0)
        if nonfinite not in ("skip", "propagate"):
            raise ValueError(f'nonfinite must be "skip" or "propagate", got {nonfinite!r}')
        self._guard = nonfinite == "skip"
        self._dtype = checked_shadow_dtype(dtype, self._decay)
        self._device = checked_device(device)
        self._buffers = buffers
        self._policy = policy
        self._backend = backends.default_name() if backend is None else backend
        self._source = model if isinstance(model, nn.Module) else [(name, tensor) for name, tensor in model]
        self._step = 0
        self._num_updates = 0
        self._nonfinite_before = 0  # counted by plans that were rebuilt since
        self._warned_nonfinite = False
        self._shadow = self._build_shadow()

    @classmethod
    def from_params(cls, model: Source, ema_params: dict[str, Any], total_steps: int | None = None) -> FastEMA:
        """Builds from a recipe's dictionary, e.g. `{"decay": 0.9999, "decay_type": "exp", "beta": 15}`.

        Example:
            >>> FastEMA.from_params(torch.nn.Linear(2, 1), {"decay": 0.9, "decay_type": "linear"}, 10).decay_at(5)
            0.45
        """
        return cls(model, total_steps=total_steps, **ema_params)

    # ---- averaging ----

    def update(self, step: int | None = None, found_inf: Tensor | None = None) -> None:
        """Averages the model's weights as they are now. Call it once per optimizer step.

        Args:
            step: the number of optimizer steps so far, from 1, for the schedule; None: an own counter.
            found_inf: float32 scalar on the model's device, as torch's gradient scaler keeps it; where it is not 0, the
                optimizer skipped its step and nothing is averaged.

        Raises:
            RuntimeError: the EMA weights are applied; the model's structure, shapes, dtypes or devices changed.
        """
        self._refuse_while_applied("update()")
        if found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf):
            return  # on a GPU the kernel looks
        step = self._step + 1 if step is None else checked_count("step", step, at_least=1)
        if step % self._update_every == 0:
            weight = 1.0 - self.decay_at(step)
            self._ensure_current()
            self._shadow.update(weight, self._guard, found_inf)
            self._num_updates += 1
        self._step = step

    def attach(self, optimizer: torch.optim.Optimizer) -> AttachedHandle:
        """Calls `update()` after every `optimizer.step()`; a step while the EMA is applied raises instead.

        Returns:
            A handle; `handle.remove()` ends it.
        """

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self._refuse_while_applied("optimizer.step()")

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            # A gradient scaler leaves its verdict on optimizers that skip the step themselves (fused ones).
            self.update(found_inf=getattr(optimizer, "found_inf", None))

        return AttachedHandle(optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))

    # ---- the exchange ----

    def apply_shadow(self, in_place: bool = False) -> None:
        """Puts the averaged weights into the model, by exchanging storage pointers: no byte is copied or allocated.

        Every alias and view of the weights follows, also tensors of a `state_dict()` taken before. Weights of another
        dtype than the shadow (bfloat16 live, float32 shadow) are cast once into scratch memory, freed by `restore()`.
        A backward through a graph recorded before raises until `restore()`.

        Args:
            in_place: exchange the contents instead, for captured CUDA graphs, whose addresses must not move.

        Raises:
            RuntimeError: already applied, or another FastEMA is applied to this model, or a CUDA graph is captured.
            ValueError: `in_place` where it could not be undone exactly.
        """
        self._refuse_while_applied("apply_shadow()")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "apply_shadow() during CUDA graph capture would bake the exchanged addresses into the graph"
            )
        self._ensure_current()
        self._warn_about_nonfinite()
        self._shadow.apply(in_place)

    def restore(self) -> None:
        """Takes the averaged weights out again: every live bit, and every version counter, is as before.

        Raises:
            RuntimeError: they are not applied.
        """
        if not self.is_applied:
            raise RuntimeError("restore() without apply_shadow(): the live weights are in place")
        self._shadow.restore()

    @contextmanager
    def swapped(self, in_place: bool = False) -> Iterator[FastEMA]:
        """A block in which the model has the averaged weights; they leave it however the block ends."""
        self._refuse_while_applied("swapped()")
        try:
            self.apply_shadow(in_place)
            yield self
        finally:
            if self.is_applied:
                self.restore()

    @property
    def is_applied(self) -> bool:
        """Whether the averaged weights are in the model now."""
        return self._shadow.is_applied

    @torch.no_grad()
    def copy_to(self, model: nn.Module | None = None) -> None:
        """Copies the averaged weights into the model, or into another one with the same names and shapes.

        Raises:
            RuntimeError: they are applied.
            ValueError: `model` has other names or shapes; lists the first differences. Nothing is changed.
        """
        self._refuse_while_applied("copy_to()")
        self._ensure_current()
        averages = self._averages_by_name()
        targets = dict(named_tensors(self._source if model is None else model))
        refuse_differences(
            "copy_to() got a model that differs from the averaged one",
            [
                difference(name, average, targets[name], dtypes=False) if name in targets else f"{name!r} is missing"
                for name, average in averages.items()
            ],
        )
        for name, average in averages.items():
            targets[name].copy_(average)

    # ---- numbers ----

    @property
    def decay(self) -> float:
        """The target decay."""
        return self._decay

    @property
    def num_updates(self) -> int:
        """How many updates were averaged."""
        return self._num_updates

    @property
    def backend_name(self) -> str:
        """Who runs the updates: "native" or "torch"; several where devices differ."""
        return self._shadow.backend_name

    def decay_at(self, step: int) -> float:
        """The decay that an update at optimizer step `step` (from 1) uses.

        Raises:
            ValueError: a schedule of your own returned a decay outside [0, 1].
        """
        if step <= self._update_after_step:
            return 0.0
        decay = self._schedule(self._decay, step, self._total_steps)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay_type {self._decay_type!r} gave decay {decay} at step {step}; it must be in [0, 1]")
        return decay

    def window(self) -> float:
        """How many updates the average reaches back: 1 / (1 - decay)."""
        return math.inf if self._decay == 1.0 else 1.0 / (1.0 - self._decay)

    def lag(self, updates_per_epoch: float) -> float:
        """How many epochs the average reaches back.

        Example:
            >>> round(FastEMA(torch.nn.Linear(2, 1), decay=0.9999).lag(updates_per_epoch=400), 6)
            25.0
        """
        if not updates_per_epoch > 0:
            raise ValueError(f"updates_per_epoch must be positive, got {updates_per_epoch}")
        return self.window() / updates_per_epoch

    def nonfinite_count(self) -> int:
        """How many elements the guard has kept so far, because their live value was NaN or infinite.

        On a GPU this waits for the device.
        """
        return self._nonfinite_before + self._shadow.nonfinite_count()

    def synchronize(self) -> None:
        """Waits until the shadow is up to date: nothing to wait for, since updates run on the model's own stream."""

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming exactly needs; right even while applied. Tensors share memory with the EMA.

        Returns:
            `step`, `num_updates`, `decay`, `decay_type`, and `shadow`: the averaged and copied tensors by name, without
            buffers that `nn.Module.state_dict` leaves out and that are only copied anyway.
        """
        self._warn_about_nonfinite()
        return {
            "step": self._step,
            "num_updates": self._num_updates,
            "decay": self._decay,
            "decay_type": self._decay_type,
            "shadow": self._averages_by_name(saved_only=True),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> LoadResult:
        """Loads what `state_dict()` returned, by value.

        Args:
            state: the state, of a FastEMA of the same model.
            strict: names and dtypes must agree; False: load what fits, cast where dtypes differ.

        Raises:
            RuntimeError: the EMA weights are applied.
            ValueError: not a state, or one of another model; lists the first differences. Nothing is changed.
        """
        self._refuse_while_applied("load_state_dict()")
        missing_entries = {"step", "num_updates", "shadow"} - set(state)
        if missing_entries:
            raise ValueError(f"not a FastEMA state: it has no {', '.join(sorted(missing_entries))}")
        self._ensure_current()
        saved: dict[str, Tensor] = state["shadow"]
        own = self._averages_by_name(saved_only=True)
        missing = [name for name in own if name not in saved]
        unexpected = [name for name in saved if name not in own]
        differences = [difference(name, own[name], saved[name], dtypes=strict) for name in own if name in saved]
        if strict:
            differences += [f"{name!r} is missing in the state" for name in missing]
            differences += [f"{name!r} is in the state, not in the model" for name in unexpected]
        refuse_differences("the state is of another model", differences)
        for name, average in own.items():
            if name in saved:
                average.copy_(saved[name])
        self._step = int(state["step"])
        self._num_updates = int(state["num_updates"])
        for key, mine in (("decay", self._decay), ("decay_type", self._decay_type)):
            if state.get(key, mine) != mine:
                warnings.warn(
                    f"the loaded state was made with {key}={state[key]!r}; updates go on with {mine!r}", stacklevel=2
                )
        return LoadResult(missing, unexpected)

    def shadow_state_dict(self) -> dict[str, Any]:
        """The averaged model under the model's own keys: `model.load_state_dict(it)` works.

        Averaged tensors come in the shadow's dtype, what is skipped as it is in the model. Tensors share memory with
        the EMA.
        """
        averages = {_place(entry.tensor): average for entry, average in self._shadow.averages()}
        if isinstance(self._source, nn.Module):
            items: dict[str, Any] = self._source.state_dict()
        else:
            items = {name: tensor.detach() for name, tensor in self._source}
        return {
            key: averages.get(_place(value), value) if isinstance(value, Tensor) else value
            for key, value in items.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the model comes along, and the copy averages the copied model."""
        self._refuse_while_applied("pickling or copying a FastEMA")
        config = {key: value for key, value in self.__dict__.items() if key != "_shadow"}
        config["_nonfinite_before"] = self.nonfinite_count()
        return {"config": config, "averages": self._averages_by_name()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["config"])
        self._shadow = self._build_shadow()
        with torch.no_grad():
            for name, average in self._averages_by_name().items():
                average.copy_(state["averages"][name])

    def __repr__(self) -> str:
        return (
            f"FastEMA(decay={self._decay}, decay_type={self._decay_type!r}, num_updates={self._num_updates}, "
            f"tensors={len(self._shadow.managed)}, backend={self.backend_name!r})"
        )

    # ---- inside ----

    def _averages_by_name(self, saved_only: bool = False) -> dict[str, Tensor]:
        averages = self._shadow.averages()
        return {
            name: average for entry, average in averages if entry.is_saved or not saved_only for name in entry.names
        }

    def _build_shadow(self) -> Shadow:
        managed = collect(self._source, self._buffers, self._policy)
        modules = list(self._source.modules()) if isinstance(self._source, nn.Module) else []
        return Shadow(managed, self._dtype, self._device, self._backend, modules)

    def _ensure_current(self) -> None:
        """Rebuilds the plan where tensors were replaced or moved in memory; the average goes on."""
        if self._shadow.is_current():
            return
        old, new = self._shadow, self._build_shadow()
        was, now = old.averaged_by_name(), new.averaged_by_name()  # what is only copied may come, go and change
        differences = [f"{name!r} is gone" for name in was if name not in now]
        differences += [f"{name!r} is new" for name in now if name not in was]
        for name, (entry, _) in now.items():
            if name in was and was[name][0].layout != entry.layout:
                differences.append(f"{name!r} is now {entry.layout}, was {was[name][0].layout}")
        refuse_differences("the model changed since FastEMA was built; build a new one", differences, RuntimeError)
        with torch.no_grad():
            for name, (_, average) in now.items():
                average.copy_(was[name][1])
        self._nonfinite_before += old.nonfinite_count()
        self._shadow = new

    def _refuse_while_applied(self, what: str) -> None:
        if self._shadow.is_applied:
            raise RuntimeError(f"{what} while the EMA weights are applied: call restore(), or leave the block, first")
        self._shadow.refuse_foreign(what)

    def _warn_about_nonfinite(self) -> None:
        """Once, and only where looking does not wait for a device."""
        if self._warned_nonfinite or not self._shadow.is_on_cpu:
            return
        count = self.nonfinite_count()
        if count:
            self._warned_nonfinite = True
            warnings.warn(
                f"{count} elements kept their average so far because the live weight was NaN or infinite: the training "
                "itself has gone wrong",
                stacklevel=3,
            )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from every other, whichever alias of it is at hand."""
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype

"""FastEMA: an exponential moving average of a model's weights, kept in one pass and swapped in by pointer.

It keeps no second model. The average lives in shadow storages beside the model's own (`fastema.shadow`); an update is
one kernel over all of them, and validation of the averaged model exchanges the two sides' data pointers.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastema import backends, compiled, state
from fastema.checks import checked_count, checked_device, checked_shadow_dtype
from fastema.clock import DeviceClock
from fastema.decays import Decays
from fastema.policy import Buffers, Policy, Source, checked_source, collect
from fastema.shadow import Shadow
from fastema.threads import OneThread, one_thread
from fastema.uncut import Step, run_uncut


class LoadResult(NamedTuple):
    """What `load_state_dict(strict=False)` found, as `nn.Module.load_state_dict` returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class AttachedHandle:
    """What `FastEMA.attach` returns; `remove()` ends the updates."""

    def __init__(self, *handles: Any, then: Callable[[], None]) -> None:
        self._handles = handles
        self._then = then

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._then()


class FastEMA:
    """An exponential moving average of `model`: `shadow <- decay * shadow + (1 - decay) * live`, once a step.

    The shadow starts as a copy of the model, so build it after the weights are loaded and the model is where and in
    the dtype in which it trains.

    Args:
        model: the module whose parameters and buffers are averaged, or an iterable of (name, tensor).
        decay: in [0, 1]; the average reaches back about 1 / (1 - decay) updates. Several decays keep several averages
            in one read of the weights; then `which` chooses, and numbers come as tuples.
        decay_type: the schedule: "constant", "threshold", "exp", "linear", "warmup", or any name registered in
            `fastema.schedules.EMA_DECAY_FUNCTIONS`.
        total_steps: optimizer steps of the whole training; "exp" and "linear" need it.
        update_every: average only at every so many steps, with the same decay.
        update_after_step: up to this step the shadow follows the model exactly (decay 0).
        buffers: "auto" averages running statistics of normalisation layers and copies every other buffer; "average",
            "copy" or "skip" do so to all. Integer and bool tensors are copied.
        policy: `(name, tensor, module) -> "average" | "copy" | "skip" | None` decides per tensor; None: the default.
        dtype: the shadow's; None: float32 for bfloat16 and float16 weights, else the weights' own.
        device: the shadow's; None: where the weights are. "cpu" for weights on a GPU: each update copies them to pinned
            host memory (one buffer of the weights' bytes) on a stream of its own, and a thread averages them there.
        nonfinite: "skip": an element whose live value is NaN or infinite keeps its shadow; "propagate". What is NaN
            already when FastEMA is built stays so.
        capturable: keep step and weight in device memory, so that `update()` can be part of a captured CUDA graph. A
            graph holds addresses of the FastEMA: keep that as long as the graph is replayed; a replay after its end
            writes to freed memory. Where the model's tensors are replaced, graphs of before go on averaging the old
            ones, which FastEMA therefore keeps: capture again.
        backend: "auto", "native", "triton" or "torch"; None: the environment variable FASTEMA_BACKEND, else "auto".
        **decay_args: for the schedule, e.g. `beta=15` for "exp".

    Raises:
        ValueError: an argument out of range, or a tensor that cannot be averaged; says which and what to do.
        TypeError: an argument that neither FastEMA nor the schedule takes.
        RuntimeError: another FastEMA is applied to the model.

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
        decay: float | Sequence[float] = 0.999,
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
        capturable: bool = False,
        backend: str | None = None,
        **decay_args: Any,
    ) -> None:
        self._decays = Decays(decay, decay_type, total_steps, update_after_step, decay_args)
        self._update_every = checked_count("update_every", update_every, at_least=1)
        if nonfinite not in ("skip", "propagate"):
            raise ValueError(f'nonfinite must be "skip" or "propagate", got {nonfinite!r}')
        self._guard = nonfinite == "skip"
        self._dtype = checked_shadow_dtype(dtype, max(self._decays.targets))
        self._device = checked_device(device)
        self._buffers = buffers
        self._policy = policy
        self._backend = backends.default_name() if backend is None else backend
        self._source = checked_source(model)
        self._capturable = capturable
        self._attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._one_thread = OneThread()
        self._step = 0
        self._num_updates = 0
        self._captured: list[Shadow] = []  # before a rebuild: graphs captured then hold their addresses
        self._nonfinite_before = 0  # counted by the FastEMA that this is a copy of
        self._warned_nonfinite = False
        self._shadow = self._build_shadow()
        self._clock = self._build_clock()
        self._handle = compiled.register(self._update_operands)
        self._warm_up()

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
            found_inf: float32 scalar on a device of the model, as torch's gradient scaler keeps it; where it is not 0,
                the optimizer skipped its step and nothing is averaged. On a GPU the kernel looks, and only with
                `capturable=True` does the step not count either.

        Raises:
            RuntimeError: the EMA weights are applied; the model's structure, shapes, dtypes or devices changed.
        """
        if torch.compiler.is_compiling():
            compiled.update(*self._shadow.operands(), self._handle, step, found_inf)
            return
        with self._one_thread:
            self._refuse_while_applied("update()")
            self._ensure_current()
            self._advance(step, found_inf, self._shadow.update)

    @one_thread
    def _update_operands(
        self, shadows: list[Tensor], lives: list[Tensor], step: int | None, found_inf: Tensor | None
    ) -> None:
        """`update()` for `fastema.compiled`, on what stands in for the shadows and the weights in its graph."""
        self._refuse_while_applied("update()")
        self._advance(step, found_inf, partial(self._shadow.update_operands, shadows, lives))

    def _advance(self, step: int | None, found_inf: Tensor | None, average: Callable[..., None]) -> None:
        """Counts the step, and has `average` called with the weights where one is due."""
        if found_inf is not None and not isinstance(found_inf, Tensor):
            raise TypeError(f"found_inf must be a float32 scalar tensor or None, got {found_inf!r}")
        if self._clock is not None:
            if step is not None:
                raise ValueError("capturable=True counts its own steps on the device: call update() without step")
            skip = self._clock.advance(found_inf)
            average([0.0] * len(self._decays), self._guard, skip, self._clock.weights)
            return
        if found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf):
            return
        step = self._step + 1 if step is None else checked_count("step", step, at_least=1)
        if step % self._update_every == 0:
            average([1.0 - decay for decay in self._decays.at(step)], self._guard, found_inf)
            self._num_updates += 1
        self._step = step

    def attach(self, *optimizers: torch.optim.Optimizer) -> AttachedHandle:
        """Calls `update()` after every `optimizer.step()`; a step while the EMA is applied raises instead.

        Only steps that happen count: not those that a gradient scaler or Accelerate leaves out, and one with a closure
        counts once.

        With a shadow in host memory the next step waits for the copy of the weights (after an `update()` of your own
        the next kernel does, and so the forward). Until then nothing but the attached optimizers may write to their
        weights: where you clamp them or load others after a step, call `synchronize()` before.

        Args:
            *optimizers: one; or several that step in turn, then the EMA is updated when the last of them has stepped.
                Attached one by one, each of them would update it. Accelerate's wrapper is seen through.

        Returns:
            A handle; `handle.remove()` ends it.
        """
        if not optimizers:
            raise TypeError("attach() needs an optimizer")

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self._refuse_while_applied("optimizer.step()")
            if self._shadow.offloaded:
                self._shadow.order_writes()

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            # A gradient scaler leaves its verdict on optimizers that skip the step themselves (fused ones).
            self.update(found_inf=getattr(optimizer, "found_inf", None))

        inner = [_without_wrappers(optimizer) for optimizer in optimizers]
        handles = [optimizer.register_step_pre_hook(before) for optimizer in inner]
        handles.append(inner[-1].register_step_post_hook(after))

        def forget() -> None:
            self._attached.difference_update(inner)
            self._leave_to_steps(self._shadow)

        self._attached.update(inner)
        self._leave_to_steps(self._shadow)
        return AttachedHandle(*handles, then=forget)

    # ---- the exchange ----

    @one_thread
    def apply_shadow(self, in_place: bool = False, which: int = 0) -> None:
        """Puts the averaged weights into the model, by exchanging storage pointers: no byte is copied or allocated.

        Every alias and view of the weights follows, also tensors of a `state_dict()` taken before. Weights of another
        dtype than the shadow (bfloat16 live, float32 shadow) are cast once into scratch memory, freed by `restore()`.
        A backward through a graph recorded before raises until `restore()`. What is written to the model now, such as
        BatchNorm statistics by a forward in train mode, is written to the average. NumPy arrays of weights hold raw
        addresses and do not follow.

        A compiled model follows without a recompilation. CUDA graph trees (`mode="reduce-overhead"`) record once more
        for the average's addresses and keep both recordings; scratch memory has new ones each time. Graphs that you
        captured yourself need `in_place=True`.

        Args:
            in_place: exchange the contents instead, for captured CUDA graphs, whose addresses must not move.
            which: which of several averages.

        Raises:
            RuntimeError: already applied, or another FastEMA is applied to this model, or a CUDA graph is captured; or
                the model is compiled with inductor's `freezing`, which makes constants of weights.
            ValueError: `in_place` where it could not be undone exactly; no such average.
        """
        self._refuse_while_applied("apply_shadow()")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "apply_shadow() during CUDA graph capture would bake the exchanged addresses into it: swap outside"
            )
        self._checked_which(which)
        self._ensure_current()
        modules = self._source.modules() if isinstance(self._source, nn.Module) else ()
        compiled.refuse_freezing((entry.whole for entry in self._shadow.managed), modules)
        self._warn_about_nonfinite()
        torch.clear_autocast_cache()  # it holds casts of the live weights
        self._shadow.apply(which, in_place)

    @one_thread
    def restore(self) -> None:
        """Takes the averaged weights out again: every live bit, and every version counter, is as before.

        Raises:
            RuntimeError: they are not applied.
        """
        if not self.is_applied:
            raise RuntimeError("restore() without apply_shadow(): the live weights are in place")
        torch.clear_autocast_cache()  # it holds casts of the averages
        self._shadow.restore()

    @contextmanager
    def swapped(self, in_place: bool = False, which: int = 0) -> Iterator[FastEMA]:
        """A block in which the model has the averaged weights; they leave it however the block ends."""
        self._refuse_while_applied("swapped()")
        try:
            self.apply_shadow(in_place, which)
            yield self
        finally:
            if self.is_applied:
                self.restore()

    @property
    def is_applied(self) -> bool:
        """Whether averaged weights are in the model now."""
        return self._shadow.is_applied

    @one_thread
    def copy_to(self, model: nn.Module | None = None, which: int = 0) -> None:
        """Copies the averaged weights into the model, or into another one with the same names and shapes.

        Raises:
            RuntimeError: they are applied.
            ValueError: `model` has other names or shapes; lists the first differences. Nothing is changed.
        """
        self._refuse_while_applied("copy_to()")
        self._ensure_current()
        state.copy_averages(self._shadow, self._checked_which(which), self._source if model is None else model)
        torch.clear_autocast_cache()

    # ---- numbers ----

    @property
    def decay(self) -> Any:
        """The target decay, or the tuple of them."""
        return self._decays.one_or_all(self._decays.targets)

    @property
    def num_updates(self) -> int:
        """How many updates were averaged. With `capturable=True` this waits for the device."""
        return self._num_updates if self._clock is None else int(self._clock.num_updates)

    @property
    def backend_name(self) -> str:
        """Who runs the updates: "native", "triton" or "torch"; several where devices differ."""
        return self._shadow.backend_name

    def decay_at(self, step: int) -> Any:
        """The decay that an update at optimizer step `step` (from 1) uses, or the tuple of them.

        Raises:
            ValueError: a schedule of your own returned a decay outside [0, 1].
        """
        return self._decays.one_or_all(self._decays.at(step))

    def window(self) -> Any:
        """How many updates the average reaches back: 1 / (1 - decay), or the tuple of them."""
        return self._decays.one_or_all(self._decays.windows())

    def lag(self, updates_per_epoch: float) -> Any:
        """How many epochs the average reaches back, or the tuple of them.

        Example:
            >>> round(FastEMA(torch.nn.Linear(2, 1), decay=0.9999).lag(updates_per_epoch=400), 6)
            25.0
        """
        if not updates_per_epoch > 0:
            raise ValueError(f"updates_per_epoch must be positive, got {updates_per_epoch}")
        return self._decays.one_or_all([window / updates_per_epoch for window in self._decays.windows()])

    def nonfinite_count(self) -> int:
        """How many elements the guard has kept so far, because their live value was NaN or infinite.

        On a GPU this waits for the device.
        """
        return self._nonfinite_before + self._shadow.nonfinite_count()

    def synchronize(self) -> None:
        """Waits until the shadow is up to date: for a shadow in host memory of weights on a GPU.

        Nothing else needs it: other updates run on the model's own stream, and every method here waits by itself. Call
        it before tensors of an earlier `state_dict()` are read again.

        Raises:
            RuntimeError: the latest average failed in its thread. Told once; the averages before it stand.
        """
        self._shadow.synchronize()

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming exactly needs; right even while applied. Tensors share memory with the EMA.

        Returns:
            `step`, `num_updates`, `decay`, `decay_type`, and `shadow`: the averaged and copied tensors by name, without
            buffers that `nn.Module.state_dict` leaves out and that are only copied anyway. With several decays `decay`
            and `shadow` are lists. Of a sharded model they are DTensors as its own, for torch.distributed.checkpoint.
        """
        self._warn_about_nonfinite()
        shadows = [state.averages_by_name(self._shadow, which, saved_only=True) for which in range(len(self._decays))]
        return {
            "step": self._step if self._clock is None else int(self._clock.step),
            "num_updates": self.num_updates,
            **self._decays.config(),
            "shadow": shadows if self._decays.several else shadows[0],
        }

    @one_thread
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> LoadResult:
        """Loads what `state_dict()` returned, by value.

        Args:
            state_dict: the state, of a FastEMA of the same model. A sharded one takes its part of whole tensors.
            strict: names and dtypes must agree; False: load what fits, cast where dtypes differ.

        Raises:
            RuntimeError: the EMA weights are applied.
            ValueError: not a state, or one of another model; lists the first differences. Nothing is changed.
        """
        self._refuse_while_applied("load_state_dict()")
        if not isinstance(state_dict, dict):
            raise ValueError(f"not a FastEMA state: it is a {type(state_dict).__name__}, not a dict")
        absent = {"step", "num_updates", "shadow"} - set(state_dict)
        if absent:
            raise ValueError(f"not a FastEMA state: it has no {', '.join(sorted(absent))}")
        saved = state_dict["shadow"] if isinstance(state_dict["shadow"], list) else [state_dict["shadow"]]
        if not all(isinstance(averages, dict) for averages in saved):
            raise ValueError("not a FastEMA state: its shadow does not hold tensors by name")
        counters = [checked_count(key, int(state_dict[key]), at_least=0) for key in ("step", "num_updates")]
        config = self._decays.config()
        other = {key: value for key, value in config.items() if state_dict.get(key, value) != value}
        self._ensure_current()
        missing, unexpected, steps = state.loading(self._shadow, saved, strict)
        with torch.no_grad():
            run_uncut([*steps, *self._counting(*counters)])
        for key, value in other.items():
            warnings.warn(
                f"the loaded state was made with {key}={state_dict[key]!r}; updates go on with {value!r}", stacklevel=3
            )
        return LoadResult(missing, unexpected)

    def shadow_state_dict(self, which: int = 0) -> dict[str, Any]:
        """The averaged model under the model's own keys: `model.load_state_dict(it)` works.

        Averaged tensors come in the shadow's dtype, what is skipped as it is in the model. Tensors share memory with
        the EMA.

        Raises:
            RuntimeError: the model's structure, shapes, dtypes or devices changed.
        """
        if not self.is_applied:
            self._ensure_current()  # it finds averages by the memory of the tensors
        return state.model_state(self._source, self._shadow, self._checked_which(which))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the model comes along, and the copy averages the copied model."""
        self._refuse_while_applied("pickling or copying a FastEMA")
        if self._shadow.is_sharded:
            raise TypeError(
                "a FastEMA of a sharded model cannot be pickled or copied: torch.distributed.checkpoint.save() its "
                "state_dict(), and build a new one"
            )
        left_out = ("_shadow", "_clock", "_handle", "_attached", "_captured")
        config = {key: value for key, value in self.__dict__.items() if key not in left_out}
        config["_nonfinite_before"] = self.nonfinite_count()
        counters = (self._step, self._num_updates)
        if self._clock is not None:
            counters = (int(self._clock.step), int(self._clock.num_updates))
        averages = [state.averages_by_name(self._shadow, which) for which in range(len(self._decays))]
        return {"config": config, "counters": counters, "averages": averages}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__dict__.update(pickled["config"])
        self._attached = weakref.WeakSet()
        self._captured = []
        self._shadow = self._build_shadow()
        self._clock = self._build_clock()
        self._handle = compiled.register(self._update_operands)
        run_uncut(self._counting(*pickled["counters"]))
        with torch.no_grad():
            for which, averages in enumerate(pickled["averages"]):
                for name, average in state.averages_by_name(self._shadow, which).items():
                    average.copy_(averages[name])
        self._warm_up()

    def __repr__(self) -> str:
        return (
            f"FastEMA(decay={self.decay}, decay_type={self._decays.type!r}, num_updates={self.num_updates}, "
            f"tensors={len(self._shadow.managed)}, backend={self.backend_name!r})"
        )

    # ---- inside ----

    def _build_shadow(self) -> Shadow:
        managed = collect(self._source, self._buffers, self._policy)
        modules = list(self._source.modules()) if isinstance(self._source, nn.Module) else []
        shadow = Shadow(managed, len(self._decays), self._dtype, self._device, self._backend, modules)
        self._leave_to_steps(shadow)
        return shadow

    def _leave_to_steps(self, shadow: Shadow) -> None:
        """The hooks of attached optimizers order what those write: see `Shadow.leave_to_steps`."""
        groups = [group for optimizer in self._attached for group in optimizer.param_groups]
        shadow.leave_to_steps(parameter for group in groups for parameter in group["params"])

    def _build_clock(self) -> DeviceClock | None:
        if not self._capturable:
            return None
        devices = {entry.tensor.device for entry in self._shadow.managed}
        if len(devices) > 1 or (self._device is not None and self._device not in devices):
            raise ValueError(f"capturable=True needs model and shadow on one device, got {sorted(map(str, devices))}")
        (device,) = devices
        if device.type != "cpu" and self.backend_name == "torch":
            raise ValueError(
                "capturable=True needs fastema's own kernels on a GPU: the torch backend waits for the device"
            )
        return DeviceClock(self._decays, self._update_every, device)

    def _checked_which(self, which: int) -> int:
        if checked_count("which", which, at_least=0) >= len(self._decays):
            raise ValueError(f"which must be below {len(self._decays)}, the number of averages; got {which}")
        return which

    def _counting(self, step: int, num_updates: int) -> list[Step]:
        """Steps that set the counters."""
        steps: list[Step] = [partial(setattr, self, "_step", step), partial(setattr, self, "_num_updates", num_updates)]
        if self._clock is not None:
            counters = (self._clock.step, step), (self._clock.num_updates, num_updates)
            steps += [partial(Tensor.fill_, counter, value) for counter, value in counters]
        return steps

    def _ensure_current(self) -> None:
        """Rebuilds the plan where tensors were replaced or moved in memory; the average goes on."""
        if self._shadow.is_current():
            return
        new = self._build_shadow()
        state.carry_over(self._shadow, new)
        if self._clock is not None and not self._shadow.is_on_cpu:
            self._captured.append(self._shadow)
        self._shadow = new
        self._warm_up()

    def _warm_up(self) -> None:
        """Compile and load what a captured `update()` launches, by one that skips: in the capture it is too late."""
        if self._clock is not None:
            skip = torch.ones((), dtype=torch.float32, device=self._clock.step.device)
            self._shadow.update([0.0] * len(self._decays), self._guard, skip, self._clock.weights)

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


def _without_wrappers(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that really steps. Accelerate's wrapper is an Optimizer by name, but runs no hooks of its own."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer

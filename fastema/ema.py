"""FastEMA, an exponential moving average of a model's weights.

There is no second model. The average is in shadow storages beside the model's own (`fastema.core.shadow`). An update is
one kernel launch over all of them. To evaluate the average, the data pointers of the two sides are swapped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastema import backends
from fastema.backends.contract import UpdateArgs
from fastema.core import compiled, state, swap
from fastema.core.averages import Averages
from fastema.core.checks import OneThread, checked_count, checked_device, checked_shadow_dtype, first_few, one_thread
from fastema.core.compiled import clear_caches
from fastema.core.counters import DeviceSchedule
from fastema.core.decays import Decays
from fastema.core.hooks import AttachedHandle, AttachedOptimizers
from fastema.core.pairs import Pair, Rule
from fastema.core.policy import (
    Buffers,
    Policy,
    Source,
    checked_source,
    collect,
    frozen_parameters,
    named_tensors,
)
from fastema.memory.atomic_steps import Step, run_atomically
from fastema.memory.streams import is_capturing
from fastema.schedules import takes_argument

# Attributes that a pickle or a copy rebuilds.
_REBUILT = frozenset(("_shadow", "_device_schedule", "_decays", "_one_thread", "_attached", "_captured"))


class FastEMA:
    """An exponential moving average of `model`: `shadow <- decay * shadow + (1 - decay) * live`, once a step.

    The shadow starts as a copy of the model: build it after the weights are loaded, and the model has its final device
    and dtype.

    Args:
        model: the module whose parameters and buffers are averaged, or an iterable of (name, tensor). Where a parameter
            of a module is replaced, the new one is averaged from then on. Named tensors are fixed: exactly these are
            averaged, also if their module has others later.
        decay: in [0, 1]. The average covers about the last 1 / (1 - decay) updates. A sequence keeps one average for
            each decay, all updated in one read of the weights; `which` selects one, and numbers come as tuples.
        decay_type: the schedule: "threshold" (the default; until 0.1.0 it was "constant"), "constant", "exp", "linear",
            "warmup", "debiased", "power", "half_life", "half_life_fraction", or any name registered in
            `fastema.schedules.EMA_DECAY_FUNCTIONS`. A sequence of names gives each average its own schedule.
        total_steps: optimizer steps of the whole training; "exp" and "linear" need it.
        update_every: average at every so many optimizer steps. Schedules with a target decay are unaffected; "power"
            and the half-lives take the steps in between into account, so that their profiles do not change.
        update_after_step: up to this step the shadow is a copy of the model (decay 0).
        buffers: "auto" averages the running statistics of normalisation layers and copies all other buffers. "average",
            "copy" or "skip" applies to all buffers. Integer and bool tensors are always copied.
        policy: `(name, tensor, module) -> "average" | "copy" | "skip" | None`, the rule of a tensor; None: the default.
            It is asked when FastEMA is built, and again where tensors were replaced or moved, or a parameter that is
            not averaged begins to need a gradient. What is averaged once stays averaged, frozen or not; what the policy
            averages from then on starts as a copy, with a warning.
        dtype: dtype of the shadow; None: float32 for bfloat16 and float16 weights, else the weights' own.
        device: device of the shadow; None: where the weights are. "cpu" for weights on a GPU: each update copies them
            to pinned host memory (one buffer of the weights' size) on a side stream, and a thread averages them there.
        nonfinite: "skip": an element whose live value is NaN or infinite leaves its average unchanged; one whose
            average is (it was built or loaded so) takes the live value. "propagate": both are averaged like any other
            number, and only an update with decay 0, a copy, ends a NaN.
        capturable: keep step and weight in device memory, so that `update()` can be part of a captured CUDA graph. The
            graph holds addresses of this FastEMA: keep it alive as long as the graph is replayed. Where tensors of the
            model are replaced, older graphs still average the old ones: capture again.
        backend: "auto", "native", "triton" or "torch"; None: the environment variable FASTEMA_BACKEND, else "auto".
        **decay_args: arguments of the schedule, e.g. `beta=15` for "exp"; `sigma_rel` or `gamma` for "power";
            `half_life` or `half_life_fraction`. A sequence of one of the last four keeps one average for each value.

    Raises:
        ValueError: an argument out of range, or a tensor that cannot be averaged; says which and what to do.
        TypeError: an argument that neither FastEMA nor the schedule takes.
        RuntimeError: another FastEMA is applied to the model.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = FastEMA(model, decay=0.9, decay_type="constant")
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

    _may_split = True  # float32 averages of bfloat16 weights may be kept in two planes, which hides them

    def __init__(
        self,
        model: Source,
        decay: float | Sequence[float] = 0.999,
        *,
        decay_type: str | Sequence[str] = "threshold",
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
        self._skip_nonfinite = nonfinite == "skip"
        self._dtype = checked_shadow_dtype(dtype, self._decays.highest)
        self._device = checked_device(device)
        self._buffers = buffers
        self._policy = policy
        self._backend = backends.default_name() if backend is None else backend
        self._source = checked_source(model)
        self._capturable = capturable
        self._attached = AttachedOptimizers(self._before_step, self._after_step, self._defer_copies)
        self._replaced: set[str] = set()  # names of copied buffers that the model reassigns
        self._one_thread = OneThread()
        self._step = 0
        self._num_updates = 0
        self._last_update = 0  # the optimizer step of the latest update
        self._captured: list[Averages] = []  # shadows before a rebuild: captured graphs hold their addresses
        self._nonfinite_before = 0  # count of the FastEMA that this one was copied from
        self._warned_nonfinite = False
        self._shadow = self._build_shadow()
        self._device_schedule = self._build_device_schedule()
        self._at_last_swap = (0, self._shadow.versions())  # (number of updates, versions of the weights)
        self._warm_up()

    @classmethod
    def from_params(cls, model: Source, ema_params: dict[str, Any], total_steps: int | None = None) -> FastEMA:
        """Build from a recipe's dictionary, e.g. `{"decay": 0.9999, "decay_type": "exp", "beta": 15}`.

        Missing or None values default as in super-gradients: decay 0.9999, decay_type "exp". A `beta` that the schedule
        does not take is ignored. `exp_activation=False` means "constant".

        Raises:
            ValueError: a whole `training_params`; its pair "ema_params" is what is expected here.

        Examples:
            >>> FastEMA.from_params(torch.nn.Linear(2, 1), {"decay": 0.9, "decay_type": "linear"}, 10).decay_at(5)
            0.45
        """
        if "ema_params" in ema_params or isinstance(ema_params.get("ema"), bool):
            raise ValueError(
                f"from_params() needs the dictionary of the average, and got a whole training_params "
                f"({first_few([repr(name) for name in ema_params])}): pass training_params['ema_params'], and build no "
                "average where training_params['ema'] is false"
            )
        params = {"decay": 0.9999, **{name: value for name, value in ema_params.items() if value is not None}}
        decay_type = "exp" if params.pop("exp_activation", True) else "constant"
        params.setdefault("decay_type", decay_type)
        if not takes_argument(params["decay_type"], "beta"):
            params.pop("beta", None)
        return cls(model, total_steps=total_steps, **params)

    # ---- averaging ----

    def update(
        self,
        step: int | None = None,
        found_inf: Tensor | None = None,
        decay: float | Sequence[float] | None = None,
    ) -> None:
        """Average the model's weights as they are now. Call it once per optimizer step.

        Args:
            step: number of optimizer steps so far, from 1, for the schedule; None: count here. "debiased", "power" and
                the half-lives give an average that was not updated for long little weight, or none. They warn where
                the first step given is late: load the average of earlier steps by `load_state_dict()`.
            found_inf: float32 scalar on a device of the model, as torch's gradient scaler has it. Not 0: the optimizer
                skipped its step, and nothing is averaged. On a GPU the kernel reads it, and the step still counts
                unless `capturable=True`.
            decay: in [0, 1], for this update only, in place of the schedule; one number, or one per average. Not
                allowed with `capturable=True`.

        Raises:
            RuntimeError: the EMA weights are applied; the model's structure, shapes, dtypes or devices changed.
            ValueError: `decay` is outside [0, 1], not as many as there are averages, or given to a schedule that has no
                target decay ("power", the half-lives).
        """
        if torch.compiler.is_compiling():
            compiled.update(*self._shadow.operands(), self._compiled_handle(), step, found_inf)
            return
        with self._one_thread:
            self._refuse_while_applied("update()")
            average: Callable[[UpdateArgs], None] = self._average
            if self._device_schedule is not None:
                self._ensure_current()  # it may raise, so before the device counts the step
                average = self._shadow.plans.update
            self._update(average, step, found_inf, decay)

    @one_thread
    def _update_operands(
        self, shadows: list[Tensor], lives: list[Tensor], step: int | None, found_inf: Tensor | None
    ) -> None:
        """Update the tensors that a compiled graph has for shadows and weights; see `fastema.core.compiled`."""
        self._refuse_while_applied("update()")
        self._update(partial(self._shadow.update_operands, shadows, lives), step, found_inf, None)

    def _update(
        self, average: Callable[[UpdateArgs], None], step: int | None, found_inf: Tensor | None, decay: Any
    ) -> None:
        """Count a step and average with its decay; `average` is called as `Plans.update`."""
        if found_inf is not None and not isinstance(found_inf, Tensor):
            raise TypeError(f"found_inf must be a float32 scalar tensor or None, got {found_inf!r}")
        if self._device_schedule is not None:
            if step is not None or decay is not None:
                raise ValueError(
                    "capturable=True counts its own steps on the device: call update() without step or decay"
                )
            skip = self._device_schedule.advance(found_inf)
            average(UpdateArgs([0.0] * len(self._decays), self._skip_nonfinite, skip, self._device_schedule.weights))
            return
        if found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf):
            return
        if step is None:
            step = self._step + 1
        elif checked_count("step", step, at_least=1) > self._update_every and self._step == 0 and decay is None:
            self._decays.warn_of_a_late_start(step, self._update_every)
        if step % self._update_every == 0:
            if decay is None:
                decays = self._decays.at(step, self._last_update)
            else:
                decays = self._decays.checked(decay, "update(decay=)")
            average(UpdateArgs([1.0 - each for each in decays], self._skip_nonfinite, found_inf))
            self._num_updates += 1
            self._last_update = step
        self._step = step

    def _average(self, args: UpdateArgs) -> None:
        """Average the model's tensors; where they were replaced or moved, rebuild the plan first."""
        outcome = self._shadow.update_watched(args)
        if outcome == "moved":
            self._ensure_current()
            outcome = self._shadow.update_watched(args)
            if outcome == "moved":
                raise RuntimeError("the model's tensors are being replaced during update(): nothing was averaged")
        if outcome == "averages moved":
            self._shadow.copy_to_new_memory()
            self._shadow.follow_averages()

    def _compiled_handle(self) -> int:
        return compiled.register(self._update_operands)

    # torch.compiler.assume_constant_result() sets this too, but would import the whole compiler.
    _compiled_handle._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def attach(self, *optimizers: torch.optim.Optimizer) -> AttachedHandle:
        """Call `update()` after every `optimizer.step()`; a step while the EMA is applied raises instead.

        Steps that a gradient scaler or Accelerate skips are not counted. A step with a closure counts once, and so does
        an optimizer that is attached twice. The optimizer does not keep this FastEMA alive: if it is deleted, the
        updates end.

        If the shadow is in host memory, the next step waits for the copy of the weights (after an `update()` of your
        own the next kernel does, and so the forward). Until then only the attached optimizers may write to them: call
        `synchronize()` before you clamp or load weights after a step.

        Args:
            *optimizers: one, or a DeepSpeed engine; or several that make one step together, in any order (a GAN's two,
                or one for each parameter, stepped in backward): the EMA is updated once each of them has stepped. The
                wrappers of Accelerate and opacus are unwrapped.

        Returns:
            A handle; `handle.remove()` ends it.

        Raises:
            TypeError: something that has no step hooks: a schedule-free or Lookahead wrapper, a list, a module.
        """
        return self._attached.add(optimizers, self._shadow.versions())

    def _before_step(self) -> None:
        self._refuse_while_applied("optimizer.step()")
        self._shadow.plans.order_writes()

    def _after_step(self, found_inf: Tensor | None) -> None:
        self.update(found_inf=found_inf)
        if not torch.compiler.is_compiling():
            self._attached.at_last_step = self._num_updates, self._shadow.versions_of_few()

    def _defer_copies(self) -> None:
        self._shadow.defer_copies_until_step(self._attached.parameters())

    # ---- the swap ----

    @one_thread
    def apply_shadow(self, in_place: bool = False, which: int = 0) -> None:
        """Put the averaged weights into the model by swapping storage pointers: nothing is copied or allocated.

        Every alias and view of the weights follows, also tensors of a `state_dict()` taken before. A bfloat16 weight
        gets its float32 average rounded to nearest (ties away from zero), at no cost either: the average is kept in two
        16-bit planes, of which the high one takes the weight's place. Averages that differ from the weights in another
        way (float16 weights, a `dtype` or `device` of their own) are cast once into scratch memory, freed by
        `restore()`.

        A backward through a graph recorded before raises until `restore()`. Writes to the model (BatchNorm statistics
        in train mode) go to the average. NumPy arrays of weights hold raw addresses: they show the trained weights.

        A compiled model follows without recompilation. CUDA graph trees (`mode="reduce-overhead"`) record once more,
        for the addresses of the average; scratch memory has new addresses each time. Graphs that you captured need
        `in_place=True`.

        Args:
            in_place: swap the contents instead, for captured CUDA graphs, whose addresses must not move.
            which: which of several averages.

        Raises:
            RuntimeError: already applied, or another FastEMA is applied to this model, or a CUDA graph is captured; or
                the model is compiled with inductor's `freezing`, which makes constants of weights.
            ValueError: `in_place` where it could not be undone exactly; no such average.
        """
        self._refuse_while_applied("apply_shadow()")
        if is_capturing():
            raise RuntimeError(
                "apply_shadow() during CUDA graph capture would bake the exchanged addresses into it: swap outside"
            )
        self._checked_which(which)
        self._ensure_current()
        modules = self._source.modules() if isinstance(self._source, nn.Module) else ()
        compiled.refuse_freezing((pair.whole for pair in self._shadow.pairs), modules)
        self._warn_about_nonfinite()
        self._attached.warn(self._shadow, self._num_updates)
        self._warn_about_tensors_unused()
        self._shadow.apply(which, in_place)

    @one_thread
    def restore(self) -> None:
        """Put the trained weights back, bit for bit, with their version counters.

        A tensor that was replaced or moved meanwhile (`model.half()`, `.cpu()`, `p.data = ...`) gets its trained values
        by copy, in its present dtype and on its present device, with a warning.

        Raises:
            RuntimeError: the averaged weights are not applied.
            SwapError: a tensor cannot take its trained value: it is gone, or has another shape or memory that was
                resized. Nothing is changed; `error.live` has the trained values by name.
        """
        if not self.is_applied:
            raise RuntimeError("restore() without apply_shadow(): the live weights are in place")
        self._shadow.restore()

    @contextmanager
    def swapped(self, in_place: bool = False, which: int = 0) -> Iterator[FastEMA]:
        """Open a block in which the model has the averaged weights; it always ends with the trained ones restored."""
        self._refuse_while_applied("swapped()")
        try:
            self.apply_shadow(in_place, which)
            yield self
        finally:
            if self.is_applied:
                self.restore()

    @property
    def is_applied(self) -> bool:
        """True while averaged weights are in the model."""
        return self._shadow.is_applied

    @one_thread
    def copy_to(self, model: nn.Module | None = None, which: int = 0) -> None:
        """Copy the averaged weights into the model, or into another one with the same names and shapes.

        bfloat16 weights get what `apply_shadow()` shows of a float32 average.

        Raises:
            RuntimeError: they are applied.
            ValueError: `model` has other names or shapes; lists the first differences. Nothing is changed.
        """
        self._refuse_while_applied("copy_to()")
        self._ensure_current()
        state.copy_averages(self._shadow, self._checked_which(which), self._source if model is None else model)
        clear_caches()  # they hold what was computed from the old weights

    # ---- numbers ----

    @property
    def source(self) -> Source:
        """The module that is averaged, or the list of (name, tensor)."""
        return self._source

    @property
    def decay(self) -> Any:
        """The target decay, or the tuple of them; schedules without a target, such as "power", ignore it."""
        return self._decays.one_or_all(self._decays.targets)

    @one_thread
    def set_decay(self, decay: float | Sequence[float]) -> None:
        """Set the target decay from the next update on. It is saved in the state.

        With `capturable=True` the table on the device is rewritten in place, so that captured graphs use the new decay.

        Args:
            decay: in [0, 1]; one for all averages, or one for each.

        Raises:
            ValueError: out of range, another number of them; a schedule without a target ("power", the half-lives); or
                `capturable=True` and the table is too short for a schedule that takes longer to settle.

        Examples:
            >>> ema = FastEMA(torch.nn.Linear(2, 1), decay=0.99)
            >>> ema.set_decay(0.999)
            >>> ema.decay
            0.999
        """
        decays = self._decays.with_targets(self._decays.checked(decay, "set_decay()"))
        checked_shadow_dtype(self._dtype, decays.highest)
        run_atomically(self._replacing_decays(decays))

    @property
    def num_updates(self) -> int:
        """Number of updates that were averaged. With `capturable=True` this waits for the device."""
        return self._num_updates if self._device_schedule is None else int(self._device_schedule.num_updates)

    @property
    def backend_name(self) -> str:
        """Name of the backend: "native", "triton" or "torch"; several where devices differ."""
        return self._shadow.plans.backend_name

    def decay_at(self, step: int) -> Any:
        """Return the decay that an update at optimizer step `step` (from 1) uses, or the tuple of them.

        Raises:
            ValueError: a schedule of your own returned a decay outside [0, 1].
        """
        return self._decays.one_or_all(self._decays.at(step, (step - 1) // self._update_every * self._update_every))

    def window(self) -> Any:
        """Return how many updates the average covers: 1 / (1 - decay), or the tuple of them.

        A schedule without a target, such as "power", counts with its present decay.
        """
        return self._decays.one_or_all(self._decays.windows(max(1, self._counted()[0])))

    def lag(self, updates_per_epoch: float) -> Any:
        """Return how many epochs the average covers, or the tuple of them.

        Examples:
            >>> round(FastEMA(torch.nn.Linear(2, 1), decay=0.9999).lag(updates_per_epoch=400), 6)
            25.0
        """
        if not updates_per_epoch > 0:
            raise ValueError(f"updates_per_epoch must be positive, got {updates_per_epoch}")
        windows = self._decays.windows(max(1, self._counted()[0]))
        return self._decays.one_or_all([window / updates_per_epoch for window in windows])

    def nonfinite_count(self) -> int:
        """Return how many elements were not averaged so far because the live value or the average was NaN or infinite.

        A live value is counted once for all averages. `nonfinite="propagate"` counts none.
        On a GPU this waits for the device.
        """
        return self._nonfinite_before + self._shadow.nonfinite_count()

    def synchronize(self) -> None:
        """Wait until a shadow in host memory, of weights on a GPU, is up to date.

        All methods here wait by themselves. Call it before you read tensors of an earlier `state_dict()`.

        Raises:
            RuntimeError: the latest average failed in its thread; raised once. Earlier averages are intact.
        """
        self._shadow.plans.synchronize()

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resumes this average exactly; correct also while the weights are applied.

        Tensors share memory with the EMA, but for float32 averages of bfloat16 weights, which are copies. Taken while
        applied, those in the model are copies, which stay right.

        Returns:
            `step`, `num_updates`, `last_update` (its step), `decay`, `decay_type`, `decay_args`, and `shadow`: the
            averaged and copied tensors by name, without buffers that `nn.Module.state_dict` leaves out and that are
            only copied anyway. With several averages `decay` and `shadow` are lists. Of a sharded model they are
            DTensors as its own, for torch.distributed.checkpoint.
        """
        self._warn_about_nonfinite()
        return self._state([self._shadow.averages(which) for which in range(len(self._decays))])

    def _state(self, averages: list[list[tuple[Pair, Tensor]]]) -> dict[str, Any]:
        shadows = [state.by_name(each, saved_only=True) for each in averages]
        return {**self._counters(), "shadow": shadows if self._decays.several else shadows[0]}

    def _counters(self) -> dict[str, Any]:
        step, num_updates, last_update = self._counted()
        return {"step": step, "num_updates": num_updates, "last_update": last_update, **self._decays.config()}

    @one_thread
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> state.LoadResult:
        """Load what `state_dict()` returned, by value. The state's decay and schedule go on, whatever this one's were.

        Args:
            state_dict: the state, of a FastEMA of the same model. A sharded one takes its part of whole tensors.
            strict: names and dtypes must agree, but what the policy skips now and the state has is averaged again;
                False: load what fits, cast where dtypes differ, and warn of parameters that the state does not have.

        Raises:
            RuntimeError: the EMA weights are applied.
            ValueError: not a state, or one of another model (with `strict=False`: no name fits); lists the first
                differences. Nothing is changed.
        """
        self._refuse_while_applied("load_state_dict()")
        saved = state.saved_averages(state_dict)
        # A state of 0.1.0 does not tell its last update.
        last = int(state_dict["step"]) // self._update_every * self._update_every
        counters = [
            checked_count(key, int(state_dict.get(key, last)), at_least=0)
            for key in ("step", "num_updates", "last_update")
        ]
        self._ensure_current()
        shadow = self._shadow_for(saved) if strict and saved else self._shadow
        result, steps = state.loading(shadow, saved, strict)
        decays, own = self._decays.of_state(state_dict), self._decays.config()
        checked_shadow_dtype(self._dtype, decays.highest)
        with torch.no_grad():
            if shadow is not self._shadow:
                self._replace_shadow(shadow)
            run_atomically([*steps, *self._counting(*counters), *self._replacing_decays(decays)])
        self._shadow.plans.note_writes()
        for key, value in decays.config().items():
            if value != own[key]:
                warnings.warn(
                    f"the loaded state was made with {key}={value!r} and goes on with it, not with {own[key]!r}",
                    stacklevel=3,
                )
        return result

    def shadow_state_dict(self, which: int = 0) -> dict[str, Any]:
        """Return the averaged weights under the model's own keys: `model.load_state_dict(it)` works.

        Where FastEMA was built of a wrapped model (DDP, DataParallel, `torch.compile`, a DeepSpeed engine), the keys
        are those of the model inside. Averaged tensors come in the shadow's dtype, what is skipped as it is in the
        model. Tensors share memory with the EMA, but for float32 averages of bfloat16 weights, which are copies.

        Raises:
            RuntimeError: the model's structure, shapes, dtypes or devices changed.
        """
        which = self._checked_which(which)
        if not self.is_applied:
            self._ensure_current()  # it finds averages by the memory of the tensors
        return self._model_state(which, self._shadow.averages(which))

    def full_state_dict(self, which: int = 0) -> dict[str, Any]:
        """Return copies of the averaged weights in the CPU's memory, whole also where the model is sharded.

        Every process must call it. That of rank 0 gets the weights under the model's own keys, the others get nothing.

        Raises:
            RuntimeError: the model's structure, shapes, dtypes or devices changed.

        Examples:
            >>> model = torch.nn.Linear(2, 1)
            >>> list(FastEMA(model).full_state_dict())
            ['weight', 'bias']
        """
        return state.gathered(self.shadow_state_dict(which), self._source)

    def _model_state(self, which: int, averages: list[tuple[Any, Tensor]]) -> dict[str, Any]:
        is_in = self.is_applied and self._shadow.applied == which
        return state.model_state(self._source, self._shadow, averages, is_in, partial(self.swapped, which=which))

    def checkpoint_states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return `shadow_state_dict()` and `state_dict()` over the same tensors, so that a file holds them once."""
        if not self.is_applied:
            self._ensure_current()
        self._warn_about_nonfinite()
        averages = [self._shadow.averages(which) for which in range(len(self._decays))]
        return self._model_state(0, averages[0]), self._state(averages)

    def live_state_dict(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return the trained weights under the same keys, also while the averaged ones are applied.

        Args:
            model: the averaged model, in a wrapper or not; None: the one that FastEMA was built of.
        """
        source: Source = self._source if model is None else model
        if not self.is_applied:
            return state.own_state(source)
        return state.live_state(source, self._shadow, self._restored_meanwhile)

    @contextmanager
    def _restored_meanwhile(self) -> Iterator[None]:
        in_place, which = self._shadow.is_in_place, self._shadow.applied
        self.restore()
        try:
            yield
        finally:
            self.apply_shadow(in_place, which)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy; a copy averages the copied model."""
        self._refuse_while_applied("pickling or copying a FastEMA")
        if self._shadow.is_sharded:
            raise TypeError(
                "a FastEMA of a sharded model cannot be pickled or copied: torch.distributed.checkpoint.save() its "
                "state_dict(), and build a new one"
            )
        config = {key: value for key, value in self.__dict__.items() if key not in _REBUILT}
        config["_nonfinite_before"] = self.nonfinite_count()
        averages = [state.averages_by_name(self._shadow, which) for which in range(len(self._decays))]
        # Plain values only: a pickle must not name our classes by module path.
        return {
            "config": config,
            "decays": self._decays.arguments(),
            "counters": self._counted(),
            "averages": averages,
            "averaged": self._shadow.averaged_names(),
        }

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        config = dict(pickled["config"])
        self.__dict__.update(config)
        self._decays = Decays(**pickled["decays"])
        self._one_thread = OneThread()
        self._attached = AttachedOptimizers(self._before_step, self._after_step, self._defer_copies)
        self._captured = []
        self._pickled = pickled
        if state.is_complete(self._source):
            self._build_from_pickle()

    def __getattr__(self, name: str) -> Any:
        # A module that holds its own FastEMA is still empty while it is unpickled: built at the first use.
        if name in ("_shadow", "_device_schedule") and "_pickled" in self.__dict__:
            self._build_from_pickle()
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _build_from_pickle(self) -> None:
        pickled = self.__dict__["_pickled"]
        counters = pickled["counters"]
        self._shadow = self._build_shadow(dict.fromkeys(pickled["averaged"], "average"))
        self._device_schedule = self._build_device_schedule()
        run_atomically(self._counting(*counters))
        for which, averages in enumerate(pickled["averages"]):
            state.fill(self._shadow, which, averages)
        self._at_last_swap = (self._num_updates, self._shadow.versions())
        del self._pickled
        self._warm_up()

    def __repr__(self) -> str:
        return (
            f"FastEMA(decay={self.decay}, decay_type={self._decays.type!r}, num_updates={self.num_updates}, "
            f"tensors={len(self._shadow.pairs)}, backend={self.backend_name!r})"
        )

    # ---- private ----

    def _build_shadow(self, kept: Mapping[str, Rule | None] = MappingProxyType({})) -> Averages:
        pairs = collect(self._source, self._buffers, self._policy, self._replaced, kept)
        frozen = [] if self._policy is None else frozen_parameters(self._source, pairs)
        count = len(self._decays)
        return Averages(self._source, pairs, count, self._dtype, self._device, self._backend, self._may_split, frozen)

    def _build_device_schedule(self) -> DeviceSchedule | None:
        if not self._capturable:
            return None
        devices = {pair.live.device for pair in self._shadow.pairs}
        if self._device is not None:
            devices.add(self._device)
        if len(devices) > 1:
            raise ValueError(f"capturable=True needs model and shadow on one device, got {sorted(map(str, devices))}")
        (device,) = devices
        if device.type != "cpu" and self.backend_name == "torch":
            raise ValueError(
                "capturable=True needs fastema's own kernels on a GPU: the torch backend waits for the device"
            )
        return DeviceSchedule(self._decays, self._update_every, device)

    def _checked_which(self, which: int) -> int:
        if checked_count("which", which, at_least=0) >= len(self._decays):
            raise ValueError(f"which must be below {len(self._decays)}, the number of averages; got {which}")
        return which

    def _counted(self) -> tuple[int, int, int]:
        """Return steps, updates, and the step of the latest update; waits for the device with `capturable=True`."""
        if self._device_schedule is not None:
            return self._device_schedule.counted()
        return self._step, self._num_updates, self._last_update

    def _counting(self, step: int, num_updates: int, last_update: int) -> list[Step]:
        """Return the steps that set the counters."""
        counters = {"_step": step, "_num_updates": num_updates, "_last_update": last_update}
        on_device = [] if self._device_schedule is None else self._device_schedule.counting(step, num_updates)
        return [*(partial(setattr, self, name, value) for name, value in counters.items()), *on_device]

    def _replacing_decays(self, decays: Decays) -> list[Step]:
        """Return the calls that replace the decays; raise if the device's table cannot hold them."""
        if decays is self._decays:
            return []
        on_device: list[Step] = [] if self._device_schedule is None else [self._device_schedule.replacing(decays)]
        return [*on_device, partial(setattr, self, "_decays", decays)]

    def _shadow_for(self, saved: list[dict[str, Tensor]]) -> Averages:
        """Return a shadow that also has what a state has and the policy skips now, such as frozen weights."""
        shadow = self._shadow
        own = {name for pair in shadow.pairs for name in pair.names}
        others = [name for name, _ in named_tensors(self._source) if name in saved[0] and name not in own]
        if self._policy is None or not others:
            return shadow
        new = self._build_shadow({**dict.fromkeys(shadow.averaged_names(), "average"), **dict.fromkeys(others)})
        state.carry_over(shadow, new, may_begin=True)
        return new

    def _replace_shadow(self, new: Averages) -> None:
        new.plans.note_writes()
        if self._device_schedule is not None and not self._shadow.is_on_cpu:
            self._captured.append(self._shadow)  # captured graphs still use it
        self._shadow = new
        self._attached.at_last_step = None  # versions of other tensors
        self._defer_copies()
        self._warm_up()

    def _ensure_current(self) -> None:
        """Rebuild the plan if tensors were replaced or moved in memory; keep the averages."""
        if self._shadow.is_current():
            return
        self._shadow.refuse_resized()
        self._shadow.follow_averages()
        if self._shadow.is_current():
            return
        state.refuse_averages_as_weights(self._source, self._shadow)
        self._replaced |= state.replaced_buffers(self._shadow)
        new = self._build_shadow(dict.fromkeys(self._shadow.averaged_names(), "average"))
        begun = state.carry_over(self._shadow, new, may_begin=self._policy is not None)
        self._replace_shadow(new)
        if begun:
            warnings.warn(
                f"{first_few([repr(name) for name in begun], 5)} are averaged from now on, starting as a copy: the "
                "policy says so, and did not before",
                stacklevel=4,
            )

    def _warm_up(self) -> None:
        """Compile and load the kernels by an update that skips: inside a capture that is not possible."""
        schedule = self._device_schedule
        if schedule is not None:
            skip = torch.ones((), dtype=torch.float32, device=schedule.step.device)
            args = UpdateArgs([0.0] * len(self._decays), self._skip_nonfinite, skip, schedule.weights)
            self._shadow.plans.update(args)

    def _refuse_while_applied(self, what: str) -> None:
        if not swap.entered:  # no model has averages in it
            return
        if self._shadow.is_applied:
            raise RuntimeError(f"{what} while the EMA weights are applied: call restore(), or leave the block, first")
        self._shadow.refuse_foreign(what)

    def _warn_about_tensors_unused(self) -> None:
        """Warn if named tensors were averaged and none has changed: their model may have other tensors now."""
        if isinstance(self._source, nn.Module) or self._device_schedule is not None:
            return
        (updates, versions), now = self._at_last_swap, (self._num_updates, self._shadow.versions())
        self._at_last_swap = now
        if now[0] > updates and now[1] == versions:
            warnings.warn(
                "none of the named tensors that this FastEMA averages has changed, although update() was called: it "
                "follows those tensors, and the swap changes nothing in a model that has others by now "
                "(load_state_dict(assign=True), a new head). Build FastEMA from the model itself, which it follows",
                stacklevel=4,
            )

    def _warn_about_nonfinite(self) -> None:
        """Warn once of nonfinite elements, if reading the count does not wait for a device."""
        if self._warned_nonfinite or not self._shadow.is_on_cpu:
            return
        count = self.nonfinite_count()
        if count:
            self._warned_nonfinite = True
            warnings.warn(
                f"{count} elements kept their average so far because the live weight was NaN or infinite (the training "
                "itself has gone wrong), or took the live weight because the average was (it was built before the "
                "weights were initialised, or loaded so)",
                stacklevel=3,
            )

"""FastEMA, an exponential moving average of a model's weights.

There is no second model. The average is in shadow storages beside the model's own (`fastema.core.averages`). An update
is one kernel launch over all of them. To evaluate the average, the data pointers of the two sides are swapped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastema.core import compiled, state
from fastema.core.checks import OneThread, checked_count, checked_device, checked_shadow_dtype, one_thread
from fastema.core.counters import DeviceCounter, counter_of, load_steps, state_of
from fastema.core.decays import Decays, arguments_of
from fastema.core.engine import Engine
from fastema.core.hooks import AttachedHandle, AttachedOptimizers
from fastema.core.pairs import Pair
from fastema.core.policy import Buffers, Policy, Source
from fastema.memory.atomic_steps import run_atomically


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
            `fastema.schedules.EMA_DECAY_FUNCTIONS`.
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

    Attributes:
        engine, counter: the averages, and the steps and decays, for adapters of other libraries.

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

    def __init__(
        self,
        model: Source,
        decay: float | Sequence[float] = 0.999,
        *,
        decay_type: str = "threshold",
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
        decays = Decays(decay, decay_type, total_steps, update_after_step, decay_args)
        update_every = checked_count("update_every", update_every, at_least=1)
        if nonfinite not in ("skip", "propagate"):
            raise ValueError(f'nonfinite must be "skip" or "propagate", got {nonfinite!r}')
        dtype, own_device = checked_shadow_dtype(dtype, decays.highest), checked_device(device)
        self.engine = Engine(
            model, len(decays), buffers=buffers, policy=policy, dtype=dtype, device=own_device, backend=backend
        )
        self._begin(decays, update_every, nonfinite == "skip", capturable, (0, 0, 0))

    def _begin(
        self, decays: Decays, update_every: int, skip_nonfinite: bool, capturable: bool, counted: tuple[int, int, int]
    ) -> None:
        """Begin to count; the engine is there."""
        device = self.engine.only_device() if capturable else None
        self.engine.keeps_replaced = capturable
        self.counter = counter_of(decays, update_every, skip_nonfinite, device)
        run_atomically(self.counter.set_steps(*counted))
        self._attached = AttachedOptimizers(self._before_step, self._after_step, self._defer_copies)
        self._one_thread = OneThread()
        self.engine.when_replaced(self._go_on)
        self._warm_up()

    @classmethod
    def from_params(cls, model: Source, ema_params: dict[str, Any], total_steps: int | None = None) -> FastEMA:
        """Build from a recipe's dictionary, e.g. `{"decay": 0.9999, "decay_type": "exp", "beta": 15}`.

        Missing or None values default as in super-gradients: decay 0.9999, decay_type "exp". A `beta` that the schedule
        does not take is ignored. `exp_activation=False` means "constant".

        Raises:
            ValueError: a whole `training_params`; its entry "ema_params" is what is expected here.

        Examples:
            >>> FastEMA.from_params(torch.nn.Linear(2, 1), {"decay": 0.9, "decay_type": "linear"}, 10).decay_at(5)
            0.45
        """
        return cls(model, total_steps=total_steps, **arguments_of(ema_params))

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
            compiled.update(*self.engine.averages.operands(), self._compiled_handle(), step, found_inf)
            return
        with self._one_thread:
            engine, counter = self.engine, self.counter
            engine.refuse_while_applied("update()")
            if counter.on_device:
                engine.ensure_current()  # it may raise, so before the device counts the step
            args = counter.begin(step, found_inf, decay)
            if args is not None:
                engine.update(args)
                counter.end()

    @one_thread
    def _update_operands(
        self, shadows: list[Tensor], lives: list[Tensor], step: int | None, found_inf: Tensor | None
    ) -> None:
        """Update the tensors that a compiled graph has for shadows and weights; see `fastema.core.compiled`."""
        self.engine.refuse_while_applied("update()")
        args = self.counter.begin(step, found_inf, None)
        if args is not None:
            self.engine.averages.update_operands(shadows, lives, args)
            self.counter.end()

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
        return self._attached.add(optimizers, self.engine.averages.versions())

    def _before_step(self) -> None:
        self.engine.refuse_while_applied("optimizer.step()")
        self.engine.averages.plans.order_writes()

    def _after_step(self, found_inf: Tensor | None) -> None:
        self.update(found_inf=found_inf)
        if not torch.compiler.is_compiling():
            self._attached.at_last_step = self.counter.known_updates, self.engine.averages.versions_of_few()

    def _defer_copies(self) -> None:
        self.engine.averages.defer_copies_until_step(self._attached.parameters())

    def _go_on(self) -> None:
        """Go on with averages that were built anew."""
        self._attached.at_last_step = None  # versions of other tensors
        self._defer_copies()
        self._warm_up()

    def _warm_up(self) -> None:
        """Compile and load the kernels by an update that skips: inside a capture that is not possible."""
        if isinstance(self.counter, DeviceCounter):
            self.engine.averages.plans.update(self.counter.skipping())

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
        self.engine.prepare_swap(which)
        self.engine.warn_of_nonfinite()
        self._attached.warn(self.engine.averages, self.counter.known_updates)
        if not self.counter.on_device:
            self.engine.warn_of_unused_tensors(self.counter.known_updates)
        self.engine.averages.apply(which, in_place)

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
        self.engine.averages.restore()

    @contextmanager
    def swapped(self, in_place: bool = False, which: int = 0) -> Iterator[FastEMA]:
        """Open a block in which the model has the averaged weights; it always ends with the trained ones restored."""
        self.engine.refuse_while_applied("swapped()")
        try:
            self.apply_shadow(in_place, which)
            yield self
        finally:
            if self.is_applied:
                self.restore()

    @property
    def is_applied(self) -> bool:
        """True while averaged weights are in the model."""
        return self.engine.averages.is_applied

    @one_thread
    def copy_to(self, model: nn.Module | None = None, which: int = 0) -> None:
        """Copy the averaged weights into the model, or into another one with the same names and shapes.

        bfloat16 weights get what `apply_shadow()` shows of a float32 average.

        Raises:
            RuntimeError: they are applied.
            ValueError: `model` has other names or shapes; lists the first differences. Nothing is changed.
        """
        self.engine.refuse_while_applied("copy_to()")
        self.engine.copy_to(self.source if model is None else model, which)

    # ---- numbers ----

    @property
    def source(self) -> Source:
        """The module that is averaged, or the list of (name, tensor)."""
        return self.engine.source

    @property
    def decay(self) -> Any:
        """The target decay, or the tuple of them; schedules without a target, such as "power", ignore it."""
        decays = self.counter.decays
        return decays.one_or_all(decays.targets)

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
        decays = self.counter.decays
        decays = decays.with_targets(decays.checked(decay, "set_decay()"))
        checked_shadow_dtype(self.engine.dtype, decays.highest)
        run_atomically(self.counter.replace_steps(decays))

    @property
    def num_updates(self) -> int:
        """Number of updates that were averaged. With `capturable=True` this waits for the device."""
        return self.counter.counted()[1]

    @property
    def backend_name(self) -> str:
        """Name of the backend: "native", "triton" or "torch"; several where devices differ."""
        return self.engine.averages.plans.backend_name

    def decay_at(self, step: int) -> Any:
        """Return the decay that an update at optimizer step `step` (from 1) uses, or the tuple of them.

        Raises:
            ValueError: a schedule of your own returned a decay outside [0, 1].
        """
        decays, every = self.counter.decays, self.counter.update_every
        return decays.one_or_all(decays.at(step, (step - 1) // every * every))

    def window(self) -> Any:
        """Return how many updates the average covers: 1 / (1 - decay), or the tuple of them.

        A schedule without a target, such as "power", counts with its present decay.
        """
        decays = self.counter.decays
        return decays.one_or_all(decays.windows(max(1, self.counter.counted()[0])))

    def lag(self, updates_per_epoch: float) -> Any:
        """Return how many epochs the average covers, or the tuple of them.

        Examples:
            >>> round(FastEMA(torch.nn.Linear(2, 1), decay=0.9999).lag(updates_per_epoch=400), 6)
            25.0
        """
        if not updates_per_epoch > 0:
            raise ValueError(f"updates_per_epoch must be positive, got {updates_per_epoch}")
        decays = self.counter.decays
        windows = decays.windows(max(1, self.counter.counted()[0]))
        return decays.one_or_all([window / updates_per_epoch for window in windows])

    def nonfinite_count(self) -> int:
        """Return how many elements were not averaged so far because the live value or the average was NaN or infinite.

        A live value is counted once for all averages. `nonfinite="propagate"` counts none.
        On a GPU this waits for the device.
        """
        return self.engine.nonfinite_count()

    def synchronize(self) -> None:
        """Wait until a shadow in host memory, of weights on a GPU, is up to date.

        All methods here wait by themselves. Call it before you read tensors of an earlier `state_dict()`.

        Raises:
            RuntimeError: the latest average failed in its thread; raised once. Earlier averages are intact.
        """
        self.engine.averages.plans.synchronize()

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
        self.engine.warn_of_nonfinite()
        return self._state([self.engine.averages.averages(which) for which in range(self.engine.count)])

    def _state(self, averages: list[list[tuple[Pair, Tensor]]]) -> dict[str, Any]:
        shadows = [state.by_name(each, saved_only=True) for each in averages]
        return {**state_of(self.counter), "shadow": shadows if self.counter.decays.several else shadows[0]}

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
        self.engine.refuse_while_applied("load_state_dict()")
        saved = state.saved_averages(state_dict)
        own = self.counter.decays.config()
        decays, counts = load_steps(self.counter, state_dict)
        result, averages, values = self.engine.load(saved, strict)
        checked_shadow_dtype(self.engine.dtype, decays.highest)
        with torch.no_grad():
            if averages is not self.engine.averages:
                self.engine.replace(averages)
            run_atomically([*values, *counts])
        averages.plans.note_writes()
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
        return self.engine.model_state(self.engine.checked_which(which))

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
        return state.gathered(self.shadow_state_dict(which), self.source)

    def checkpoint_states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return `shadow_state_dict()` and `state_dict()` over the same tensors, so that a file holds them once."""
        if not self.is_applied:
            self.engine.ensure_current()
        self.engine.warn_of_nonfinite()
        averages = [self.engine.averages.averages(which) for which in range(self.engine.count)]
        return self.engine.model_state(0, averages[0]), self._state(averages)

    def live_state_dict(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return the trained weights under the same keys, also while the averaged ones are applied.

        Args:
            model: the averaged model, in a wrapper or not; None: the one that FastEMA was built of.
        """
        return self.engine.live_state(model)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy; a copy averages the copied model."""
        self.engine.refuse_while_applied("pickling or copying a FastEMA")
        pickled, counter = self.engine.pickled(), self.counter
        pickled["config"] |= {"_capturable": counter.on_device, "_update_every": counter.update_every}
        pickled["config"] |= {"_skip_nonfinite": counter.skip_nonfinite}
        return {**pickled, "decays": counter.decays.arguments(), "counters": counter.counted()}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self._pickled = pickled
        if state.is_complete(pickled["config"]["_source"]):
            self._build_from_pickle()

    def __getattr__(self, name: str) -> Any:
        # A module that holds its own FastEMA is still empty while it is unpickled: built at the first use.
        if name in ("engine", "counter") and "_pickled" in self.__dict__:
            self._build_from_pickle()
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _build_from_pickle(self) -> None:
        pickled = self.__dict__.pop("_pickled")
        config = pickled["config"]
        self.engine = Engine.unpickled(pickled)
        settings = config["_update_every"], config["_skip_nonfinite"], config["_capturable"]
        self._begin(Decays(**pickled["decays"]), *settings, pickled["counters"])

    def __repr__(self) -> str:
        return (
            f"FastEMA(decay={self.decay}, decay_type={self.counter.decays.type!r}, num_updates={self.num_updates}, "
            f"tensors={len(self.engine.averages.pairs)}, backend={self.backend_name!r})"
        )

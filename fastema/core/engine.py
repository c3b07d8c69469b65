"""The averages of one model, under FastEMA and the adapters: built anew where its tensors were replaced."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastema import backends
from fastema.backends.contract import UpdateArgs
from fastema.core import compiled, state, swap
from fastema.core.averages import Averages
from fastema.core.checks import checked_count, first_few
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
from fastema.memory.atomic_steps import Step
from fastema.memory.streams import is_capturing

#: Arguments that a pickle keeps.
_PICKLED = ("source", "buffers", "policy", "dtype", "device", "backend", "replaced")


class Engine:
    """The averages of one model.

    Args:
        source, buffers, policy, dtype, device, backend: as in FastEMA.
        count: how many averages, one for each decay.
        may_split: True if float32 averages of bfloat16 tensors may be kept in two planes, which hides them.
        kept: rules that hold by name whatever the policy says.
        replaced: names of copied buffers that the model reassigns.

    Raises:
        ValueError, TypeError, RuntimeError: as FastEMA.
    """

    def __init__(
        self,
        source: Source,
        count: int = 1,
        *,
        buffers: Buffers = "auto",
        policy: Policy | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        backend: str | None = None,
        may_split: bool = True,
        kept: Mapping[str, Rule | None] = MappingProxyType({}),
        replaced: Iterable[str] = (),
    ) -> None:
        self.source = checked_source(source)
        self.count = count
        self.buffers: Buffers = buffers
        self.policy = policy
        self.dtype = dtype
        self.device = device
        self.backend = backends.default_name() if backend is None else backend
        self.may_split = may_split
        self.replaced = set(replaced)
        self.nonfinite_before = 0  # the count of the average that this one was copied from
        self.keeps_replaced = False  # True: captured graphs hold the addresses of averages that others replace
        self._captured: list[Averages] = []
        self._when_replaced: Callable[[], Callable[[], None] | None] | None = None
        self._warned_of_nonfinite = False
        self.averages = self._built(kept)
        self._at_last_swap = (0, self.averages.versions())  # (number of updates, versions of the weights)

    def when_replaced(self, call: Callable[[], None]) -> None:
        """Call a bound method whenever other averages have taken the place of these; its object is not kept alive."""
        self._when_replaced = weakref.WeakMethod(call)

    def _built(self, kept: Mapping[str, Rule | None]) -> Averages:
        pairs = collect(self.source, self.buffers, self.policy, self.replaced, kept)
        frozen = [] if self.policy is None else frozen_parameters(self.source, pairs)
        return Averages(self.source, pairs, self.count, self.dtype, self.device, self.backend, self.may_split, frozen)

    # ---- every step ----

    def update(self, args: UpdateArgs) -> None:
        """Average the model's tensors as they are now; where they were replaced or moved, build the plans anew first.

        Raises:
            RuntimeError: the model's structure, shapes, dtypes or devices changed.
        """
        outcome = self.averages.update_watched(args)
        if outcome == "moved":
            self.ensure_current()
            outcome = self.averages.update_watched(args)
            if outcome == "moved":
                raise RuntimeError("the model's tensors are being replaced during update(): nothing was averaged")
        if outcome == "averages moved":
            self.averages.copy_to_new_memory()
            self.averages.follow_averages()

    def ensure_current(self) -> None:
        """Build the averages anew if tensors were replaced or moved in memory; keep their values.

        Raises:
            RuntimeError: the model's structure, shapes, dtypes or devices changed.
        """
        averages = self.averages
        if averages.is_current():
            return
        averages.refuse_resized()
        averages.follow_averages()
        if averages.is_current():
            return
        state.refuse_averages_as_weights(self.source, averages)
        self.replaced |= state.replaced_buffers(averages)
        new = self._built(dict.fromkeys(averages.averaged_names(), "average"))
        begun = state.carry_over(averages, new, may_begin=self.policy is not None)
        self.replace(new)
        if begun:
            warnings.warn(
                f"{first_few([repr(name) for name in begun], 5)} are averaged from now on, starting as a copy: the "
                "policy says so, and did not before",
                stacklevel=4,
            )

    def replace(self, new: Averages) -> None:
        """Let other averages take the place of these."""
        new.plans.note_writes()
        if self.keeps_replaced and not self.averages.is_on_cpu:
            self._captured.append(self.averages)  # captured graphs still use it
        self.averages = new
        call = None if self._when_replaced is None else self._when_replaced()
        if call is not None:
            call()

    def nonfinite_count(self) -> int:
        """Return how many elements were not averaged so far; on a GPU this waits."""
        return self.nonfinite_before + self.averages.nonfinite_count()

    def warn_of_nonfinite(self) -> None:
        """Warn once of nonfinite elements, if reading the count does not wait for a device."""
        if self._warned_of_nonfinite or not self.averages.is_on_cpu:
            return
        count = self.nonfinite_count()
        if count:
            self._warned_of_nonfinite = True
            warnings.warn(
                f"{count} elements kept their average so far because the live weight was NaN or infinite (the training "
                "itself has gone wrong), or took the live weight because the average was (it was built before the "
                "weights were initialised, or loaded so)",
                stacklevel=3,
            )

    def warn_of_unused_tensors(self, updates: int) -> None:
        """Warn if named tensors were averaged and none has changed: their model may have other tensors now."""
        if isinstance(self.source, nn.Module):
            return
        (before, versions), now = self._at_last_swap, (updates, self.averages.versions())
        self._at_last_swap = now
        if now[0] > before and now[1] == versions:
            warnings.warn(
                "none of the named tensors that this FastEMA averages has changed, although update() was called: it "
                "follows those tensors, and the swap changes nothing in a model that has others by now "
                "(load_state_dict(assign=True), a new head). Build FastEMA from the model itself, which it follows",
                stacklevel=4,
            )

    def only_device(self) -> torch.device:
        """Return the device of model and averages, for a counter in its memory.

        Raises:
            ValueError: there are several, or its kernels cannot read a counter.
        """
        devices = {pair.live.device for pair in self.averages.pairs}
        if self.device is not None:
            devices.add(self.device)
        if len(devices) > 1:
            raise ValueError(f"capturable=True needs model and shadow on one device, got {sorted(map(str, devices))}")
        (device,) = devices
        if device.type != "cpu" and self.averages.plans.backend_name == "torch":
            raise ValueError(
                "capturable=True needs fastema's own kernels on a GPU: the torch backend waits for the device"
            )
        return device

    # ---- the swap ----

    @property
    def is_applied(self) -> bool:
        """True while averages are in the model."""
        return self.averages.is_applied

    def refuse_while_applied(self, what: str) -> None:
        """Raise RuntimeError while any averages are in the model, or these are in another one."""
        if not swap.entered:  # no model has averages in it
            return
        if self.averages.is_applied:
            raise RuntimeError(f"{what} while the EMA weights are applied: call restore(), or leave the block, first")
        self.averages.refuse_foreign(what)

    def checked_which(self, which: int) -> int:
        """Return the index of an average, or raise ValueError."""
        if checked_count("which", which, at_least=0) >= self.count:
            raise ValueError(f"which must be below {self.count}, the number of averages; got {which}")
        return which

    def prepare_swap(self, which: int = 0) -> None:
        """Check that average `which` can be put into the model, and bring the averages up to date.

        Raises:
            RuntimeError, ValueError: as `FastEMA.apply_shadow`.
        """
        self.refuse_while_applied("apply_shadow()")
        if is_capturing():
            raise RuntimeError(
                "apply_shadow() during CUDA graph capture would bake the exchanged addresses into it: swap outside"
            )
        self.checked_which(which)
        self.ensure_current()
        modules = self.source.modules() if isinstance(self.source, nn.Module) else ()
        compiled.refuse_freezing((pair.whole for pair in self.averages.pairs), modules)

    @contextmanager
    def swapped(self, which: int = 0) -> Iterator[None]:
        """Open a block in which average `which` is in the model."""
        self.prepare_swap(which)
        try:
            self.averages.apply(which, in_place=False)
            yield
        finally:
            if self.is_applied:
                self.averages.restore()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Open a block in which the trained weights are in the model, where averages are outside of it."""
        averages = self.averages
        in_place, which = averages.is_in_place, averages.applied
        averages.restore()
        try:
            yield
        finally:
            self.prepare_swap(which)
            self.averages.apply(which, in_place)

    def copy_to(self, target: Source, which: int = 0) -> None:
        """Copy average `which` into the tensors of the same names.

        Raises:
            ValueError: a name is missing there, or a shape differs.
        """
        self.ensure_current()
        state.copy_averages(self.averages, self.checked_which(which), target)
        compiled.clear_caches()  # they hold what was computed from the old weights

    # ---- states ----

    def model_state(self, which: int, averages: list[tuple[Pair, Tensor]] | None = None) -> dict[str, Any]:
        """Return the averaged model under its own keys.

        Args:
            averages: of every tensor; None: those that `Averages.averages(which)` returns.
        """
        if not self.is_applied:
            self.ensure_current()  # averages are found by the memory of the tensors
        if averages is None:
            averages = self.averages.averages(which)
        is_in = self.is_applied and self.averages.applied == which
        return state.model_state(self.source, self.averages, averages, is_in, partial(self.swapped, which))

    def live_state(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return the trained model under its own keys, also while averages are in it."""
        source: Source = self.source if model is None else model
        if not self.is_applied:
            return state.own_state(source)
        return state.live_state(source, self.averages, self.restored)

    def load(self, saved: list[dict[str, Tensor]], strict: bool) -> tuple[state.LoadResult, Averages, list[Step]]:
        """Prepare to load saved averages, one dictionary for each.

        Returns:
            The names that are on one side only; the averages that are to take the place of these, or these; and the
            steps that load them.

        Raises:
            ValueError, RuntimeError: as `FastEMA.load_state_dict`; nothing is changed.
        """
        self.ensure_current()
        averages = self._with_saved(saved) if strict and saved else self.averages
        result, steps = state.load_steps(averages, saved, strict)
        return result, averages, steps

    def _with_saved(self, saved: list[dict[str, Tensor]]) -> Averages:
        """Return averages that also have what a state has and the policy skips now, such as frozen weights."""
        averages = self.averages
        own = {name for pair in averages.pairs for name in pair.names}
        others = [name for name, _ in named_tensors(self.source) if name in saved[0] and name not in own]
        if self.policy is None or not others:
            return averages
        new = self._built({**dict.fromkeys(averages.averaged_names(), "average"), **dict.fromkeys(others)})
        state.carry_over(averages, new, may_begin=True)
        return new

    # ---- pickles: plain values only, since a pickle must not name our classes by module path ----

    def pickled(self) -> dict[str, Any]:
        """Return what `unpickled()` builds the same averages from.

        Raises:
            TypeError: the model is sharded.
        """
        if self.averages.is_sharded:
            raise TypeError(
                "a FastEMA of a sharded model cannot be pickled or copied: torch.distributed.checkpoint.save() its "
                "state_dict(), and build a new one"
            )
        config = {f"_{name}": getattr(self, name) for name in _PICKLED}
        config |= {"_nonfinite_before": self.nonfinite_count(), "_warned_nonfinite": self._warned_of_nonfinite}
        averages = [state.averages_by_name(self.averages, which) for which in range(self.count)]
        return {
            "config": config,
            "averages": averages,
            "averaged": self.averages.averaged_names(),
        }

    @classmethod
    def unpickled(cls, pickled: dict[str, Any]) -> Engine:
        """Return the engine of which `pickled` was."""
        config, averages = pickled["config"], pickled["averages"]
        arguments = {name: config[f"_{name}"] for name in _PICKLED}
        averaged = pickled.get("averaged", ())  # 0.2.0 asks the policy alone
        engine = cls(**arguments, count=len(averages), kept=dict.fromkeys(averaged, "average"))
        engine.nonfinite_before, engine._warned_of_nonfinite = config["_nonfinite_before"], config["_warned_nonfinite"]
        for which, values in enumerate(averages):
            state.fill(engine.averages, which, values)
        return engine

"""Hooks on optimizers: one update for each training step, also where several optimizers make the step."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


class AttachedOptimizers:
    """The optimizers whose steps update one average. Nothing here keeps one of them, or the average, alive."""

    def __init__(self) -> None:
        self._groups: weakref.WeakKeyDictionary[torch.optim.Optimizer, StepGroup] = weakref.WeakKeyDictionary()
        self._versions: int | None = None  # of the weights at `add()`; None: an optimizer has stepped since

    def add(
        self,
        optimizers: Sequence[Any],
        versions: int,
        before: Callable[[], None],
        after: Callable[[Tensor | None], None],
        changed: Callable[[], None],
    ) -> AttachedHandle:
        """Attach optimizers that make one training step together; one that is attached already leaves its group.

        Args:
            versions: of the weights: see `Shadow.versions`.
            before, after: see `StepGroup`.
            changed: bound method, called whenever other optimizers are attached.

        Raises:
            TypeError: no optimizer, or one without step hooks.
        """
        if not optimizers:
            raise TypeError("attach() needs an optimizer")
        inner = list(dict.fromkeys(checked_optimizer(optimizer) for optimizer in optimizers))
        for optimizer in inner:
            if optimizer in self._groups:
                self._groups[optimizer].discard(optimizer)
        group = StepGroup(inner, before, after)
        self._groups.update(dict.fromkeys(inner, group))
        self._versions = versions
        changed()
        return AttachedHandle(self, group, changed)

    def remove(self, group: StepGroup) -> None:
        """Detach a group's optimizers, except those that were attached again since."""
        group.clear()
        for optimizer in [optimizer for optimizer, own in self._groups.items() if own is group]:
            del self._groups[optimizer]

    def parameters(self) -> list[Tensor]:
        """Return what the attached optimizers write to."""
        return [each for optimizer in self._groups for part in optimizer.param_groups for each in part["params"]]

    def note_step(self) -> None:
        self._versions = None

    def warn_about_steps_unseen(self, versions: Callable[[], int]) -> None:
        """Warn if the weights changed while no attached optimizer called step(), as with SAM."""
        if self._versions is None or self._versions == versions():
            return
        self._versions = None
        warnings.warn(
            "an optimizer is attached, and the weights changed, but its step() was never called: the average is as it "
            "was. Where the optimizer steps in another way (SAM's first_step and second_step), call update() yourself",
            stacklevel=4,
        )


class AttachedHandle:
    """Handle of `FastEMA.attach`; `remove()` ends the updates."""

    def __init__(self, attached: AttachedOptimizers, group: StepGroup, changed: Callable[[], None]) -> None:
        self._attached = weakref.ref(attached)
        self._group = group
        self._changed = weakref.WeakMethod(changed)

    def remove(self) -> None:
        """Detach the optimizers; those that were attached again since stay attached."""
        self._group.clear()
        attached, changed = self._attached(), self._changed()
        if attached is not None and changed is not None:
            attached.remove(self._group)
            changed()


class StepGroup:
    """Optimizers that make one training step together: `after` is called once each of them has stepped.

    The hooks keep nothing alive: once the owner of the two methods is deleted, they do nothing.

    Args:
        optimizers: with step hooks.
        before: bound method, called before every step of any optimizer.
        after: bound method `(found_inf)`, called once all have stepped; for `found_inf` see `combined_found_inf`.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        before: Callable[[], None],
        after: Callable[[Tensor | None], None],
    ) -> None:
        self._before = weakref.WeakMethod(before)
        self._after = weakref.WeakMethod(after)
        self._found_inf: dict[int, Tensor | None] = {}  # by id of the optimizers that have stepped
        self._handles: dict[int, list[Any]] = {
            id(optimizer): [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            for optimizer in optimizers
        }

    def discard(self, optimizer: torch.optim.Optimizer) -> None:
        """Take one optimizer out."""
        self._found_inf.pop(id(optimizer), None)
        for handle in self._handles.pop(id(optimizer), ()):
            handle.remove()

    def clear(self) -> None:
        """Take all optimizers out."""
        self._found_inf.clear()
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        before = self._before()
        if before is not None:
            before()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        after = self._after()
        if after is None or id(optimizer) not in self._handles:
            return
        # A gradient scaler sets it on optimizers that skip the step themselves (fused ones).
        self._found_inf[id(optimizer)] = getattr(optimizer, "found_inf", None)
        if len(self._found_inf) == len(self._handles):
            found, self._found_inf = list(self._found_inf.values()), {}
            after(combined_found_inf(found))


def combined_found_inf(found_inf: Sequence[Tensor | None]) -> Tensor | None:
    """Return a scalar that is not 0 if all optimizers skipped their step; None if one of them cannot skip."""
    known = [each for each in found_inf if each is not None]
    return reduce(torch.minimum, known) if len(known) == len(found_inf) else None


def checked_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer whose `step()` runs hooks: the one inside Accelerate's wrapper.

    Raises:
        TypeError: it has no step hooks.
    """
    accelerate = sys.modules.get("accelerate.optimizer")
    while accelerate is not None and isinstance(optimizer, accelerate.AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    # torch marks the step() that runs hooks; timm's Lookahead inherits the hooks' dictionaries but never runs them.
    has_hooks = hasattr(optimizer, "_optimizer_step_post_hooks") and getattr(type(optimizer).step, "hooked", False)
    if not (isinstance(optimizer, torch.optim.Optimizer) and has_hooks):
        raise TypeError(
            f"attach() needs a torch.optim.Optimizer with step hooks, got a {type(optimizer).__name__}. Wrappers that "
            "step by themselves (schedule-free, Lookahead) run none: call update() after their step() instead. Give "
            "several optimizers one by one: attach(first, second)"
        )
    return optimizer

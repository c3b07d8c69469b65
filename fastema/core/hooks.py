"""Hooks on optimizers: one update for each training step, also where several optimizers make the step."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

#: Wrappers that step the optimizer inside exactly where the training steps: module, class, attribute.
_WRAPPERS = (
    ("accelerate.optimizer", "AcceleratedOptimizer", "optimizer"),
    ("opacus.optimizers", "DPOptimizer", "original_optimizer"),
)
#: Fewer writes to one weight between a step and a swap may be a clamp and a normalisation, or another tool's swap.
_CHANGES_OF_A_TRAINING = 5


class AveragedWeights(Protocol):
    """State what the warnings ask of `fastema.core.averages.Averages`."""

    def versions(self) -> int: ...
    def versions_of_few(self) -> list[int]: ...
    def has(self, tensor: Tensor) -> bool: ...


class AttachedOptimizers:
    """The optimizers whose steps update one average. Nothing here keeps one of them, or the average, alive.

    Args:
        before: bound method, called before every step of any optimizer.
        after: bound method `(found_inf=)`, called after each training step; for `found_inf` see `combined_found_inf`.
        changed: bound method, called after optimizers were attached or removed.
    """

    def __init__(self, before: Callable[[], None], after: Callable[..., None], changed: Callable[[], None]) -> None:
        self.before, self.after = weakref.WeakMethod(before), weakref.WeakMethod(after)
        self.changed = weakref.WeakMethod(changed)
        self.at_add: int | None = None  # versions of the weights; None: an optimizer has stepped since
        #: Updates and versions of a few weights after the last training step; None: not known, or warned already.
        self.at_last_step: tuple[int, list[int]] | None = None
        self._are_the_models: bool = True  # False: not looked at yet
        self._handles: weakref.WeakKeyDictionary[torch.optim.Optimizer, AttachedHandle] = weakref.WeakKeyDictionary()

    def add(self, optimizers: Sequence[Any], versions: int) -> AttachedHandle:
        """Attach optimizers that make one training step together; one that was attached leaves its former group.

        Args:
            versions: of the weights: see `Averages.versions`.

        Raises:
            TypeError: no optimizer, or one without step hooks.
        """
        if not optimizers:
            raise TypeError("attach() needs an optimizer")
        inner = list(dict.fromkeys(checked_optimizer(optimizer) for optimizer in optimizers))
        for optimizer in inner:
            if optimizer in self._handles:
                self._handles[optimizer].discard(optimizer)
        handle = AttachedHandle(inner, self)
        self._handles.update(dict.fromkeys(inner, handle))
        self.at_add, self.at_last_step, self._are_the_models = versions, None, False
        _call(self.changed)
        return handle

    def parameters(self, of: AttachedHandle | None = None) -> list[Tensor]:
        """Return what the attached optimizers write to, or those of one handle."""
        attached = [optimizer for optimizer, handle in self._handles.items() if optimizer in (of or handle)]
        return [each for optimizer in attached for group in optimizer.param_groups for each in group["params"]]

    def warn(self, weights: AveragedWeights, updates: int) -> None:
        """Warn if updates and the training have come apart: steps that are not seen, or of something else."""
        if not self._are_the_models:
            self._are_the_models = True
            self._warn_about_other_parameters(weights)
        message = None
        if self.at_add is not None:
            if self.at_add != weights.versions():
                self.at_add = None
                message = (
                    "an optimizer is attached, and the weights changed, but its step() was never called: the average "
                    "is as it was. Where the optimizer steps in another way (SAM's first_step and second_step), call "
                    "update() yourself; where another one trains now, attach it too"
                )
        elif self.at_last_step is not None and self.at_last_step[0] == updates:
            changes = map(int.__sub__, weights.versions_of_few(), self.at_last_step[1])
            if max(changes, default=0) >= _CHANGES_OF_A_TRAINING:
                self.at_last_step = None
                message = (
                    "the weights changed several times since the last step() of an attached optimizer, and no update() "
                    "followed: the average is as it was then. Where another optimizer trains now (a second stage), "
                    "attach it too: ema.attach(optimizer)"
                )
        if message is not None:
            warnings.warn(message, stacklevel=4)

    def _warn_about_other_parameters(self, weights: AveragedWeights) -> None:
        """Warn if what is attached writes to no tensor of the model."""
        for handle in dict.fromkeys(self._handles.values()):
            parameters = self.parameters(handle)
            if parameters and not any(weights.has(each) for each in parameters):
                warnings.warn(
                    "an attached optimizer trains no tensor of the averaged model: it steps copies (as after "
                    "deepspeed.initialize, once for each of its parameter groups), or another model. Updates come "
                    "at its steps, and may average weights that are not written yet. With DeepSpeed attach the engine; "
                    "else call update() yourself, once after each step of the training, instead of attach()",
                    stacklevel=5,
                )


class AttachedHandle:
    """Handle of `FastEMA.attach`, and the hooks of its optimizers, which make one training step together."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], attached: AttachedOptimizers) -> None:
        self._attached = attached
        self._found_inf: dict[int, Tensor | None] = {}  # by id of the optimizers that have stepped
        self._hooks: dict[int, list[Any]] = {
            id(optimizer): [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            for optimizer in optimizers
        }

    def remove(self) -> None:
        """End the updates. Optimizers that were attached again since stay attached."""
        for hook in [hook for hooks in self._hooks.values() for hook in hooks]:
            hook.remove()
        self._hooks.clear()
        if not self._attached.parameters():  # what trains from now on is not to be averaged, or by update()
            self._attached.at_add = self._attached.at_last_step = None
        _call(self._attached.changed)

    def discard(self, optimizer: torch.optim.Optimizer) -> None:
        """Take one optimizer out."""
        self._found_inf.pop(id(optimizer), None)
        for hook in self._hooks.pop(id(optimizer), ()):
            hook.remove()

    def __contains__(self, optimizer: torch.optim.Optimizer) -> bool:
        return id(optimizer) in self._hooks

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        _call(self._attached.before)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer not in self:
            return
        # A gradient scaler sets it on optimizers that skip the step themselves (fused ones).
        found_inf = getattr(optimizer, "found_inf", None)
        if len(self._hooks) > 1:
            self._found_inf[id(optimizer)] = found_inf
            if len(self._found_inf) < len(self._hooks):
                return
            found, self._found_inf = list(self._found_inf.values()), {}
            found_inf = combined_found_inf(found)
        self._attached.at_add = None
        _call(self._attached.after, found_inf=found_inf)


def _call(method: weakref.WeakMethod[Any], **arguments: Any) -> None:
    """Call a bound method, unless its object was deleted."""
    bound = method()
    if bound is not None:
        bound(**arguments)


def combined_found_inf(found_inf: Sequence[Tensor | None]) -> Tensor | None:
    """Return a scalar that is not 0 if all optimizers skipped their step; None if one of them cannot skip."""
    known = [each for each in found_inf if each is not None]
    return reduce(torch.minimum, known) if len(known) == len(found_inf) else None


def checked_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer whose `step()` runs hooks: the one inside the wrapper of Accelerate or opacus.

    Raises:
        TypeError: it has no step hooks.
    """
    for module, name, inside in _WRAPPERS:
        wrapper = getattr(sys.modules.get(module), name, None)  # nothing is one where its module was not imported
        while wrapper is not None and isinstance(optimizer, wrapper):
            optimizer = getattr(optimizer, inside)
    if is_engine(optimizer):
        return steps_of(optimizer)
    # torch marks the step() that runs hooks; timm's Lookahead inherits the hooks' dictionaries but never runs them.
    has_hooks = hasattr(optimizer, "_optimizer_step_post_hooks") and getattr(type(optimizer).step, "hooked", False)
    if not (isinstance(optimizer, torch.optim.Optimizer) and has_hooks):
        raise TypeError(
            f"attach() needs a torch.optim.Optimizer with step hooks, got a {type(optimizer).__name__}. Wrappers that "
            "step by themselves (schedule-free, Lookahead) run none: call update() after their step() instead. With "
            "DeepSpeed attach the engine. Give several optimizers one by one: attach(first, second)"
        )
    return optimizer


# ---- the steps of a DeepSpeed engine, with the hooks that torch's optimizers have ----


def is_engine(module: Any) -> bool:
    """Return True for what `deepspeed.initialize()` makes of a model."""
    package = sys.modules.get("deepspeed.runtime.engine")
    return package is not None and isinstance(module, package.DeepSpeedEngine)


def steps_of(engine: Any) -> Any:
    """Return the steps of an engine, always the same object.

    Raises:
        TypeError: the engine steps by itself.
    """
    if type(engine).__name__ == "PipelineEngine":
        raise TypeError("a PipelineEngine steps inside train_batch(): call update() after it instead of attach()")
    if not isinstance(vars(engine).get("_fastema_steps"), EngineSteps):
        engine._fastema_steps = EngineSteps(engine)
    return engine._fastema_steps


class EngineSteps:
    """Calls hooks around those calls of an engine's `step()` that are steps of its optimizer."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._step = engine.step
        self._before: OrderedDict[int, Callable[..., None]] = OrderedDict()
        self._after: OrderedDict[int, Callable[..., None]] = OrderedDict()
        engine.step = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._engine.is_gradient_accumulation_boundary():
            for hook in list(self._before.values()):
                hook(self, args, kwargs)
        result = self._step(*args, **kwargs)
        if self._engine.was_step_applied():
            for hook in list(self._after.values()):
                hook(self, args, kwargs)
        return result

    def register_step_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        return _registered(hook, self._before)

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        return _registered(hook, self._after)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self._engine.module.parameters())}]


def _registered(hook: Callable[..., None], hooks: OrderedDict[int, Callable[..., None]]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle

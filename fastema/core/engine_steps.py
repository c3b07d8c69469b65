"""The steps of a DeepSpeed engine, with the hooks that torch's optimizers have.

DeepSpeed's own optimizer steps once for each parameter group, and before the model has its new weights. The engine's
`step()` returns after that, and tells whether it stepped: not while gradients are accumulated, nor where a gradient
overflowed in float16.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle


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

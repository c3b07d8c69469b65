"""The parts that the callbacks for Lightning and for the Hugging Face Trainer share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from fastema.ema import FastEMA

_Result = TypeVar("_Result")

# What an evaluation reports without having measured it.
AXES = ("step", "epoch")

# Arguments about the model or its device, which are not known yet: not checked here.
_UNCHECKED = ("policy", "device", "backend", "capturable")


class HoldsAverage:
    """Base of the callbacks: an average that begins during training."""

    _ema: FastEMA | None = None

    @property
    def ema(self) -> FastEMA | None:
        """The average; None before it has begun."""
        return self._ema

    def ema_state_dict(self) -> dict[str, Any]:
        """Return the averaged weights under the model's own keys: `model.load_state_dict(it)` works.

        Raises:
            RuntimeError: the average has not begun.
        """
        if self._ema is None:
            raise RuntimeError("there is no average yet: it begins in the training, at start_step and start_epoch")
        return self._with_current(FastEMA.shadow_state_dict)

    def _with_current(self, call: Callable[[FastEMA], _Result]) -> _Result:
        """Return `call(average)`; Lightning's callback rebuilds the average first if the module changed."""
        assert self._ema is not None
        return call(self._ema)


def ema_arguments(decay: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for FastEMA, checked before the data is prepared.

    Raises:
        ValueError, TypeError: what FastEMA would raise.
    """
    arguments = {"decay": decay, **given}
    FastEMA([("", torch.zeros(1))], **{name: value for name, value in arguments.items() if name not in _UNCHECKED})
    return arguments


def checked_choice(name: str, value: str, known: Sequence[str]) -> str:
    """Return `value`, one of those known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
    return value


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of `owner` inside a block."""
    own = vars(owner)
    was = own.get(name)
    was_own = name in own
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if was_own:
            object.__setattr__(owner, name, was)
        else:
            object.__delattr__(owner, name)

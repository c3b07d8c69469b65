"""Torch's averaging functions: which one a function is, and the weight that it gives the live model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.optim import swa_utils
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

# Torch's own, whatever `fastema.swa_utils.patch()` puts in their places later.
TORCH_FACTORIES: dict[str, Callable[..., Any]] = {
    name: getattr(swa_utils, name)
    for name in ("get_ema_multi_avg_fn", "get_swa_multi_avg_fn", "get_ema_avg_fn", "get_swa_avg_fn")
}


class AveragingFunction:
    """One of torch's averaging functions, as an object that can be pickled and that tells its rule."""

    __module__ = "fastema.swa_utils"  # for pickles

    def __init__(self, factory: str, decay: Any = None) -> None:
        self.factory = factory
        self.decay = decay
        self._function = TORCH_FACTORIES[factory](*(() if decay is None else (decay,)))
        functools.update_wrapper(self, self._function)  # its name, its documentation and its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return AveragingFunction, (self.factory, self.decay)

    def __deepcopy__(self, memo: dict[int, Any]) -> AveragingFunction:
        return self  # as a function is

    def __repr__(self) -> str:
        return f"{self.factory}({'' if self.decay is None else self.decay})"

    def weight(self, num_averaged: int, device_type: str) -> float:
        """Return the weight of the live model in the next average."""
        if self.decay is not None:
            return 1 - self.decay
        # As torch, the default uses the multi function where foreach operations have kernels.
        has_foreach = self is DEFAULT and device_type in _get_foreach_kernels_supported_devices()
        if self.factory == "get_swa_multi_avg_fn" or has_foreach:
            # Torch divides tensors here, so that the weight is rounded to float32 even for float64 parameters.
            return (1 / torch.tensor(num_averaged + 1, device="cpu")).item()
        return 1 / (num_averaged + 1)


def _codes(function: Any) -> list[Any]:
    """Return the code of a function and of what it wraps, outermost first."""
    codes = []
    while isinstance(function, FunctionType):
        codes.append(function.__code__)
        function = getattr(function, "__wrapped__", None)
    return codes


_TORCH_CODES = {
    name: _codes(factory(0.5) if "_ema_" in name else factory()) for name, factory in TORCH_FACTORIES.items()
}


def recognise(function: Any) -> AveragingFunction | None:
    """Return `function` as an `AveragingFunction` if it is ours or torch's; None: it is the user's."""
    if isinstance(function, AveragingFunction):
        known = function
    else:
        # torch's are closures; all that one factory makes share their code objects, and no others do.
        codes = _codes(function)
        factory = next((name for name, torch_codes in _TORCH_CODES.items() if codes == torch_codes), None)
        if factory is None:
            return None
        inner = inspect.unwrap(function)
        cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
        known = AveragingFunction(factory, cells["decay"].cell_contents if "decay" in cells else None)
    # A decay that is a tensor may be on a GPU, where reading it would wait.
    return known if known.decay is None or isinstance(known.decay, (int, float)) else None


DEFAULT = AveragingFunction("get_swa_avg_fn")

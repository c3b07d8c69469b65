"""The reference of an average in plain NumPy: fastema is not imported, and torch only gives the values.

Arrays are long double (80 bits where the machine has them), so that the reference is exact beside float64 too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

_UNIT = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def exact(tensor: Tensor) -> Array:
    """The values of a tensor; complex numbers as pairs in a last dimension."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj().to(torch.complex128))
    return tensor.resolve_neg().cpu().double().numpy().astype(np.longdouble)


def averaged(shadow: Array, live: Array, weight: float, skip_nonfinite: bool = True) -> Array:
    """The rule as the mathematician writes it, and what becomes of numbers that are none."""
    with np.errstate(invalid="ignore", over="ignore"):
        result = live if weight == 1 else shadow + np.longdouble(weight) * (live - shadow)
    if not skip_nonfinite:
        return result
    return np.where(np.isfinite(live), np.where(np.isfinite(shadow), result, live), shadow)


def tolerance(shadow: Array, live: Array, dtype: torch.dtype) -> Array:
    """Return how far one update in `dtype` may be from `averaged`, element by element.

    The difference, the weight and the fused multiply-add are each rounded once in the opmath type (half an eps of
    |shadow| + |live| in all, taken twice for good measure), and the result once in `dtype`.
    """
    dtype = _UNIT.get(dtype, dtype)
    opmath = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    stored = torch.finfo(dtype)
    magnitude = np.abs(shadow) + np.abs(live)
    return opmath.eps * magnitude + stored.eps / 2 * np.maximum(np.abs(shadow), np.abs(live)) + stored.smallest_normal


def assert_within(got: Tensor, expected: Array, allowed: Array, what: str = "") -> None:
    """Every element of `got` is within `allowed` of `expected`; NaN and infinity only where expected."""
    values = exact(got)
    assert values.shape == expected.shape, f"{what}: shape {values.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    same_kind = np.where(finite, np.isfinite(values), np.isnan(values) | (values == expected))
    with np.errstate(invalid="ignore"):
        wrong = ~same_kind | (finite & (np.abs(values - expected) > allowed))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} elements are off, the first at {where}: "
            f"got {values[where]!r}, expected {expected[where]!r} +- {allowed[where]!r}"
        )


class ReferenceEMA:
    """The averages of named tensors over many updates, with the error that has built up at most."""

    def __init__(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        self.averages = {name: exact(tensor) for name, tensor in tensors.items()}
        self._dtypes = dict(dtypes)
        self._allowed = {name: np.zeros_like(value) for name, value in self.averages.items()}

    def update(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        for name, tensor in tensors.items():
            shadow, live = self.averages[name], exact(tensor)
            step = np.nan_to_num(tolerance(shadow, live, self._dtypes[name]), nan=0.0, posinf=0.0)
            self._allowed[name] = self._allowed[name] + step
            self.averages[name] = averaged(shadow, live, 1.0 - decay)

    def check(self, got: Mapping[str, Tensor]) -> None:
        for name, expected in self.averages.items():
            assert_within(got[name], expected, self._allowed[name], name)


def threshold(decay: float, step: int, total: int) -> float:
    return min(decay, (1 + step) / (10 + step))


def exponential(decay: float, step: int, total: int, beta: float = 15.0) -> float:
    return decay * (1 - math.exp(-beta * step / total))


def warmup(decay: float, step: int, total: int, inv_gamma: float = 1.0, power: float = 2 / 3) -> float:
    return min(decay, 1 - (1 + max(0, step - 1) / inv_gamma) ** (-power))


def debiased(decay: float, step: int, total: int) -> float:
    exact = Fraction(decay)
    return float(1 - (Fraction(1, step) if decay == 1.0 else (1 - exact) / (1 - exact**step)))


#: decay_type -> (decay, step, total_steps) -> decay; written from the contract, not from the code.
SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "constant": lambda decay, step, total: decay,
    "threshold": threshold,
    "exp": exponential,
    "linear": lambda decay, step, total: decay * step / total,
    "warmup": warmup,
    "debiased": debiased,
    "power": lambda decay, step, total: (1 - 1 / step) ** (GAMMA + 1),
    "half_life": lambda decay, step, total: 0.5 ** (1 / 7),
    "half_life_fraction": lambda decay, step, total: 0.5 ** (1 / (0.05 * step)),
}

#: What the schedules above are built with.
GAMMA = 6.94
ARGUMENTS: dict[str, dict[str, Any]] = {"power": {"gamma": GAMMA}, "half_life": {"half_life": 7}}

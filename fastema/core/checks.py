"""Checks of arguments, and the wording of their errors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from fastema.core.text import first_few

_SHOWN = 5  # differences that an error lists
_SHADOW_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STALL_DECAY = 0.99


def checked_decay(decay: object) -> float:
    """Return `decay` as a float in [0, 1]."""
    if isinstance(decay, bool) or not isinstance(decay, Real):
        raise ValueError(f"decay must be a number in [0, 1], got {decay!r}")
    if not 0.0 <= float(decay) <= 1.0:  # NaN fails too
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    return float(decay)


def checked_decays(decay: float | Sequence[float]) -> tuple[tuple[float, ...], bool]:
    """Return the decays, and whether they came as a sequence."""
    if isinstance(decay, Sequence) and not isinstance(decay, str):
        if not decay:
            raise ValueError("decay must be a number in [0, 1] or several of them, got an empty sequence")
        return tuple(checked_decay(each) for each in decay), True
    return (checked_decay(decay),), False


def checked_count(name: str, value: int, at_least: int) -> int:
    """Return `value` as an int that is not too small."""
    try:
        count = None if isinstance(value, bool) else operator.index(value)  # NumPy's integers are no int
    except TypeError:
        count = None
    if count is None or count < at_least:
        raise ValueError(f"{name} must be an int of at least {at_least}, got {value!r}")
    return count


def checked_shadow_dtype(dtype: torch.dtype | None, decay: float) -> torch.dtype | None:
    """Return `dtype`; raise ValueError if an average in it would stand still.

    Rounded to nearest, a 16-bit shadow drops every change below half a unit in its last place (2^-9 of the value for
    bfloat16): from decay 0.99 on it stands still while the weights move on.
    """
    if dtype is None:
        return None
    if dtype not in _SHADOW_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _SHADOW_DTYPES))}, or None; got {dtype!r}")
    if dtype.itemsize == 2 and decay >= _STALL_DECAY:
        raise ValueError(
            f"a {dtype} shadow stands still at decay {decay}: each update is smaller than its rounding. Leave "
            "dtype=None (a float32 shadow, also for 16-bit weights), or use a decay below 0.99"
        )
    return dtype


def checked_device(device: torch.device | str | int | None) -> torch.device | None:
    """Return `device` with its index: "cuda" becomes the current CUDA device."""
    if device is None:
        return None
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError("device='meta' holds no values: the shadow needs real memory")
    return device


def difference(name: str, expected: Tensor, got: Tensor, dtypes: bool) -> str | None:
    """Describe how `got` differs in shape, or in dtype, if that counts; None where it does not."""
    if not isinstance(got, Tensor):
        return f"{name!r} is a {type(got).__name__}, not a tensor"
    if expected.shape != got.shape:
        return f"{name!r} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if dtypes and expected.dtype != got.dtype:
        return f"{name!r} has dtype {got.dtype}, expected {expected.dtype}"
    return None


def refuse_differences(what: str, differences: Iterable[str | None], error: type[Exception] = ValueError) -> None:
    """Raise `error` with the first few differences, if there are any."""
    found = [text for text in differences if text is not None]
    if found:
        raise error(f"{what}: {first_few(found, _SHOWN, '; ')}")

"""Checks of arguments, and the wording of their errors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from numbers import Real
from threading import get_ident
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

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


# ---- wording that several messages share ----


def first_few(items: Sequence[object], shown: int = 3, separator: str = ", ") -> str:
    """Join the first items, and say how many more there are.

    Examples:
        >>> first_few("abcde", 2)
        'a, b, and 3 more'
    """
    more = len(items) - shown
    return separator.join(map(str, items[:shown])) + (f"{separator}and {more} more" if more > 0 else "")


def counted(count: int, thing: str) -> str:
    """Return a count and what is counted, in the plural if there are several or none.

    Examples:
        >>> counted(1, "mask"), counted(1200, "mask")
        ('1 mask', '1,200 masks')
    """
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


# ---- one thread at a time: a second one gets an error at once, since waiting would hide the mistake ----

Method = TypeVar("Method", bound=Callable[..., Any])


class OneThread:
    """A block that only one thread may be in.

    It is no lock: Ctrl-C on the way in or out must not block this thread, nor a fork its child.
    """

    def __init__(self) -> None:
        self._holder: dict[str, int] = {}

    def __enter__(self) -> None:
        me = get_ident()
        if self._holder.setdefault("thread", me) != me:  # tests and sets in one step
            raise RuntimeError(
                "another thread is in update(), apply_shadow(), restore(), copy_to() or load_state_dict() of this "
                "FastEMA right now: call them from one thread, or hold a lock of your own around them"
            )

    def __exit__(self, *exception: object) -> None:
        self._holder.pop("thread", None)


def one_thread(method: Method) -> Method:
    """Decorate a method so that `self._one_thread` keeps other threads out while it runs."""

    @wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._one_thread:
            return method(self, *args, **kwargs)

    return cast(Method, alone)

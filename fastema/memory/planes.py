"""A float32 tensor in two planes of 16 bits: `high`, the nearest bfloat16, ties away from zero, and `low`, the rest.

bits = (high << 16) + low, as in csrc/ema_math.h. `join(*split(x))` has the bits of x; of a NaN it keeps the sign alone.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from fastema.memory.atomic_steps import Step

_INFINITY, _MAGNITUDE, _SIGN = 0x7F800000, 0x7FFFFFFF, -0x80000000


def join(high: Tensor, low: Tensor) -> Tensor:
    """Return the float32 values of two planes, bfloat16 and int16.

    A user may have written a zero or an infinity to `high`: where that and a stale `low` make a NaN, `high` counts.
    """
    upper = high.view(torch.int16).to(torch.int32) << 16
    bits = upper + low
    return torch.where(_is_nan(bits), upper, bits).view(torch.float32)


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the planes of float32 values: bfloat16 and int16."""
    bits = values.view(torch.int32)
    bits = torch.where(_is_nan(bits), (bits & _SIGN) | 0x7FC00000, bits)
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return high, bits.to(torch.int16)


def fill_steps(high: Tensor, low: Tensor, values: Tensor) -> list[Step]:
    """Return steps for `run_atomically` that split values of any dtype and device into planes, without temporaries."""
    wide = values.to(torch.float32)
    is_nan = wide.isnan()
    if is_nan.any():
        wide = torch.where(is_nan, torch.full_like(wide, torch.nan).copysign(wide), wide)
    halves = wide.unsqueeze(-1).view(torch.int16).unbind(-1)
    lower, upper = halves if sys.byteorder == "little" else reversed(halves)
    target = high.view(torch.int16)
    return [
        partial(Tensor.copy_, low, lower),
        partial(Tensor.bitwise_right_shift_, low, 15),  # -1 where it is negative
        partial(Tensor.copy_, target, upper),
        partial(Tensor.sub_, target, low),
        partial(Tensor.copy_, low, lower),
    ]


def _is_nan(bits: Tensor) -> Tensor:
    return (bits & _MAGNITUDE) > _INFINITY

"""What the callbacks check of FastEMA's arguments before there is a model."""

from __future__ import annotations

from typing import Any

import torch

from fastema.ema import FastEMA

# Said of the model itself or of its device, which are not known yet.
_LATER = ("policy", "device", "backend", "capturable")


def refuse_early(ema_args: dict[str, Any]) -> None:
    """Raises what FastEMA would raise of these arguments: now, and not after the data has been prepared."""
    FastEMA([("", torch.zeros(1))], **{name: value for name, value in ema_args.items() if name not in _LATER})

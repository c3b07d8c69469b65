"""Automatic mixed precision: what runs in 16 bits, and the scaling that float16 gradients need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastema.segmentation.errors import UserError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The precision of forward and backward; weights, moments and averages stay float32.

    Attributes:
        amp: "none", "bf16" or "fp16".
        device: where the training runs.

    Raises:
        UserError: the device does not do it.
    """

    amp: str
    device: torch.device

    def __post_init__(self) -> None:
        if self.amp == "fp16" and self.device.type != "cuda":
            raise UserError(
                f"--amp fp16 needs a CUDA device, and this run is on {self.device}: float16 gradients must be scaled, "
                "and a CPU gains nothing from it. Use --amp bf16, or none"
            )
        if self.amp == "bf16" and self.device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise UserError(f"{torch.cuda.get_device_name(self.device)} has no bfloat16: use --amp fp16, or none")

    def autocast(self) -> torch.autocast:
        """The context of a forward."""
        return torch.autocast(self.device.type, dtype=_DTYPES.get(self.amp), enabled=self.amp in _DTYPES)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss of a float16 run, and passes everything else through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")

"""Precision and optimizer of a run: one AdamW for both stages, which never loses its moments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastema.segmentation.distributed.parallel import clip_gradients
from fastema.segmentation.errors import UserError
from fastema.segmentation.model.network import SegmentationNet
from fastema.segmentation.train.stages import BACKBONE_SHARE

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# A scaler starts at 2^16 and halves at every overflow: this low, the gradients overflow at any scale.
_LOWEST_SCALE = 2.0**-10


@dataclass(frozen=True)
class Precision:
    """Automatic mixed precision of forward and backward; weights, moments and averages stay float32.

    Attributes:
        amp: "none", "bf16" or "fp16".
        device: of the training.
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
        """Return the context of a forward."""
        return torch.autocast(self.device.type, dtype=_DTYPES.get(self.amp), enabled=self.amp in _DTYPES)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler, which is disabled without float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")


class NotFiniteError(Exception):
    """A loss or gradient became NaN or infinite. The weights are those of the last step."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(f"the {name} became {value}")


class TrainOptimizer:
    """AdamW with gradient clipping and scaling.

    Args:
        net: on its device.
        weight_decay: for weights; biases and normalisation, of one dimension, have none.
        clip_grad: limit of the gradient's norm; 0 for none.
        precision: of the forward.
    """

    def __init__(self, net: SegmentationNet, weight_decay: float, clip_grad: float, precision: Precision) -> None:
        self.scaler = precision.scaler()
        self._parameters = list(net.parameters())
        self._limit = clip_grad or math.inf
        self._weight_decays = [weight_decay, 0.0, weight_decay, 0.0]
        self._shares = [1.0, 1.0, BACKBONE_SHARE, BACKBONE_SHARE]
        # Always four groups, even if one is empty, so that checkpoints are alike.
        self.adamw = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": decay, "lr": 0.0}
                for parameters, decay in zip(_groups(net), self._weight_decays, strict=True)
            ]
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a share of the step's loss."""
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> None:
        """Make a step at the decoder's learning rate `rate` and clear the gradients.

        With float16, a step whose gradients overflow does not happen, and the optimizer's hooks do not run.

        Raises:
            NotFiniteError: the gradients are not finite; no weight has changed.
        """
        for group, share in zip(self.adamw.param_groups, self._shares, strict=True):
            group["lr"] = rate * share
        self.scaler.unscale_(self.adamw)
        norm = clip_gradients(self._parameters, self._limit)
        if not self.scaler.is_enabled():  # a scaler expects overflows, and lowers its scale
            checked_finite(norm, "gradient")
        self.scaler.step(self.adamw)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < _LOWEST_SCALE:
            raise NotFiniteError("gradient", math.inf)
        self.adamw.zero_grad(set_to_none=True)

    def load(self, checkpoint: dict[str, Any], origin: object) -> None:
        """Load a checkpoint's moments; the options stay this run's."""
        try:
            self.adamw.load_state_dict(checkpoint["optimizer"])
        except ValueError as error:
            raise UserError(
                f"{origin} cannot be resumed from: its optimizer does not fit this network ({error}); an older version "
                "of fastema train had other parameter groups"
            ) from error
        for group, decay in zip(self.adamw.param_groups, self._weight_decays, strict=True):
            group["weight_decay"] = decay
        if self.scaler.is_enabled() and checkpoint.get("scaler"):  # a run without float16 saved none
            self.scaler.load_state_dict(checkpoint["scaler"])


def checked_finite(value: Tensor, name: str) -> float:
    """Return a scalar's value; raise `NotFiniteError` if it is NaN or infinite."""
    number = float(value.item())
    if not math.isfinite(number):
        raise NotFiniteError(name, number)
    return number


def _groups(net: SegmentationNet) -> list[list[nn.Parameter]]:
    """Return decoder weights, decoder others, backbone weights, backbone others."""
    backbone = {id(parameter) for parameter in net.backbone.parameters()}
    groups: list[list[nn.Parameter]] = [[], [], [], []]
    for parameter in net.parameters():
        groups[2 * (id(parameter) in backbone) + (parameter.ndim <= 1)].append(parameter)
    return groups

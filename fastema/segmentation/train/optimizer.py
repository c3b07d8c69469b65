"""One AdamW for the whole run. Stages, unfreezing and schedules never rebuild it, so it never loses its moments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastema.segmentation.distributed.parallel import clip_gradients
from fastema.segmentation.errors import UserError
from fastema.segmentation.model.network import SegmentationNet
from fastema.segmentation.train.precision import Precision
from fastema.segmentation.train.stages import BACKBONE_SHARE

# A scaler starts at 2^16 and halves at every overflow: this far down, it is not the scale that makes them.
_LOWEST_SCALE = 2.0**-10


class NotFiniteError(Exception):
    """A loss or gradient became NaN or infinite. The weights are still those of the last step."""

    def __init__(self, what: str, value: float) -> None:
        super().__init__(f"the {what} became {value}")


class Optimisation:
    """Optimizer, gradient clipping and scaling, for the parameters of one network.

    Args:
        net: on its device already.
        weight_decay: AdamW's, for weights; biases and normalisation have one dimension and go without.
        clip_grad: the limit of the gradient's norm; 0: none.
        precision: of the forward that the gradients come from.
    """

    def __init__(self, net: SegmentationNet, weight_decay: float, clip_grad: float, precision: Precision) -> None:
        self.scaler = precision.scaler()
        self._parameters = list(net.parameters())
        self._limit = clip_grad or math.inf
        self._weight_decays = [weight_decay, 0.0, weight_decay, 0.0]
        self._shares = [1.0, 1.0, BACKBONE_SHARE, BACKBONE_SHARE]
        # Four groups, an empty one too: every checkpoint has the same.
        self.optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": decay, "lr": 0.0}
                for parameters, decay in zip(_groups(net), self._weight_decays, strict=True)
            ]
        )

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a share of the step's loss."""
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> None:
        """An optimizer step at learning rate `rate` (the decoder's) with the gradients so far, which are then cleared.

        With float16 a step whose gradients overflow is left out; the optimizer's hooks then do not run either.

        Raises:
            NotFiniteError: the gradients are not finite; no weight has been changed.
        """
        for group, share in zip(self.optimizer.param_groups, self._shares, strict=True):
            group["lr"] = rate * share
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self._parameters, self._limit)
        # A scaler expects overflows: it looks itself, and lowers its scale.
        if not self.scaler.is_enabled():
            checked_finite(norm, "gradient")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < _LOWEST_SCALE:
            raise NotFiniteError("gradient", math.inf)
        self.optimizer.zero_grad(set_to_none=True)

    def load(self, checkpoint: dict[str, Any], origin: object) -> None:
        """Goes on with a checkpoint's moments; the options of this run stay.

        Raises:
            UserError: they are of other parameter groups.
        """
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as error:
            raise UserError(
                f"{origin} cannot be resumed from: its optimizer does not fit this network ({error}); an older version "
                "of fastema train had other parameter groups"
            ) from error
        for group, decay in zip(self.optimizer.param_groups, self._weight_decays, strict=True):
            group["weight_decay"] = decay
        # Of a run without float16 there is nothing to load, and a scaler starts where a new one does.
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])


def checked_finite(value: Tensor, what: str) -> float:
    """The number; raises `NotFiniteError` if it is none."""
    number = float(value.item())
    if not math.isfinite(number):
        raise NotFiniteError(what, number)
    return number


def _groups(net: SegmentationNet) -> list[list[nn.Parameter]]:
    """Decoder weights, decoder others, backbone weights, backbone others."""
    backbone = {id(parameter) for parameter in net.backbone.parameters()}
    groups: list[list[nn.Parameter]] = [[], [], [], []]
    for parameter in net.parameters():
        groups[2 * (id(parameter) in backbone) + (parameter.ndim <= 1)].append(parameter)
    return groups

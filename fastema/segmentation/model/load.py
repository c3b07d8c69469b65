"""Build a network from a checkpoint of `fastema train`, whose options say how it is built.

The trained weights are under `net`, the averaged ones under `ema_net` if there was an EMA (of several averages, the
main one), and the options under `options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastema import FastEMA
from fastema.checkpoint import CheckpointError, load_checkpoint, load_weights
from fastema.core.checks import first_few
from fastema.errors import UserError
from fastema.segmentation.model.network import Architecture, SegmentationNet, check_input_size, create_net

BASE, AVERAGED = "net", "ema_net"

_EXPECTED = (
    "A checkpoint of fastema train is expected; one of your own needs save_checkpoint(path, net=model, options=...) "
    "with the options backbone, num_experts, top_k and img_size"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of `fastema train`, read and checked."""

    path: Path
    content: Mapping[str, Any]
    architecture: Architecture
    img_size: int  # side of the network's square images, pixels
    weights: tuple[str, ...]  # `net`, then `ema_net` if there was an EMA
    epoch: int | None  # epochs that it was trained for; None if the file does not say

    @property
    def options(self) -> Mapping[str, Any]:
        """The run's options, as plain values."""
        return self.content["options"]


def read_checkpoint(path: Path, img_size: int | None = None) -> Checkpoint:
    """Read a checkpoint and check that a network can be built from it; `img_size` replaces the one of its training."""
    content = load_checkpoint(path)
    weights = tuple(name for name in (BASE, AVERAGED) if isinstance(content.get(name), Mapping))
    names = first_few([repr(name) for name in content], 6) or "nothing in it"
    if BASE not in weights:
        kind = f"a dict with {names}"
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            kind = f"a bare state_dict of {len(content)} tensors ({first_few(list(content), 2)})"
        raise UserError(f"{path} has no weights under 'net': it is {kind}. {_EXPECTED}")
    options = content.get("options")
    if not isinstance(options, Mapping):
        raise UserError(f"{path} does not say how its network is built: it has {names}, but no 'options'. {_EXPECTED}")
    expected = {field.name: str if field.name == "backbone" else int for field in fields(Architecture)}
    wrong = [
        f"{name} {options[name]!r}" if name in options else f"no {name}"
        for name, kind in {**expected, "img_size": int}.items()
        if type(options.get(name)) is not kind
    ]
    if wrong:
        raise UserError(
            f"{path} was written by another version of fastema: its options have {', '.join(wrong)}. "
            "Use the version that it was trained with, or train again"
        )
    epoch = content.get("epoch")
    architecture = Architecture(**{name: options[name] for name in expected})
    size = options["img_size"] if img_size is None else img_size
    return Checkpoint(path, content, architecture, size, weights, epoch if isinstance(epoch, int) else None)


def load_net(checkpoint: Checkpoint, device: torch.device, weights: str) -> SegmentationNet:
    """Build the network with the weights `net` or `ema_net`, in evaluation mode."""
    if weights not in checkpoint.weights:
        raise UserError(f"{checkpoint.path} has no {weights}: it was trained without --use-ema")
    net, _ = create_net(checkpoint.architecture, pretrained=False)
    _load(net, checkpoint, weights)
    if checkpoint.img_size != checkpoint.options["img_size"]:
        check_input_size(net, checkpoint.architecture.backbone, checkpoint.img_size)
    return net.to(device).eval()


def load_both(checkpoint: Checkpoint, device: torch.device) -> tuple[SegmentationNet, FastEMA | None]:
    """Build the network with its trained weights, and a FastEMA that holds the averaged ones, to be swapped in.

    The FastEMA is None where the checkpoint has no EMA. It holds `ema_net` only, and is not to be updated.
    """
    if AVERAGED not in checkpoint.weights:
        return load_net(checkpoint, device, BASE), None
    net = load_net(checkpoint, device, AVERAGED)
    ema = FastEMA(net)  # starts as a copy of the model
    _load(net, checkpoint, BASE)
    return net, ema


def _load(net: SegmentationNet, checkpoint: Checkpoint, weights: str) -> None:
    try:
        load_weights(net, {BASE: checkpoint.content[weights]}, prefer="net")
    except CheckpointError as error:
        differences = str(error).removeprefix("'net' of the checkpoint ")
        raise UserError(
            f"{weights} of {checkpoint.path} {differences}. Its options say {checkpoint.architecture}: the file was "
            "written by another version of fastema, or by another program"
        ) from error

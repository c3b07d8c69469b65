"""Make torchvision importable next to a CPU-only torch, which timm needs: importing this module does it.

torchvision built for CUDA cannot load its compiled half there, and its Python half then fails to import because two
operators have no schema. The schemas are defined here, after the real import failed for that reason; what else is wrong
with torchvision raises.
"""

from __future__ import annotations

import importlib
import sys
import warnings

import torch

try:
    importlib.import_module("torchvision")
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    # Drop what the failed import left half made, so that the next one starts again.
    for _name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_name]
    # Kept for the life of the process: a torch library undefines its operators when it is collected.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        # Images are read with Pillow here.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        importlib.import_module("torchvision")

"""Lightning's names, from whichever of its two packages the process uses.

`lightning.pytorch` and `pytorch_lightning` are the same code under two names, and a Trainer of one does not take
callbacks of the other.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fastema.extras import require

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng
else:
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        _package = require("pytorch_lightning", "lightning")
    else:
        _package = require("lightning.pytorch", "lightning")
    Callback, LightningModule, Trainer = _package.Callback, _package.LightningModule, _package.Trainer
    callbacks = require(f"{_package.__name__}.callbacks", "lightning")
    is_overridden = require(f"{_package.__name__}.utilities.model_helpers", "lightning").is_overridden
    _rank_zero = require(f"{_package.__name__}.utilities.rank_zero", "lightning")
    rank_zero_info, rank_zero_warn = _rank_zero.rank_zero_info, _rank_zero.rank_zero_warn
    isolate_rng = require(f"{_package.__name__}.utilities.seed", "lightning").isolate_rng

__all__ = [
    "Callback",
    "LightningModule",
    "Trainer",
    "callbacks",
    "is_overridden",
    "isolate_rng",
    "rank_zero_info",
    "rank_zero_warn",
]

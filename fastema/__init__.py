"""fastema: exponential moving averages of model weights, at the speed of memory."""

import sys
import warnings

with warnings.catch_warnings():
    # torch says so at its first import where NumPy is absent, which neither of the two needs.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch  # noqa: F401

from fastema.core import threads as _threads
from fastema.core.decay import decays as _decays
from fastema.core.swap.swap import SwapError
from fastema.ema import FastEMA
from fastema.importing import ImportedAverage, import_average
from fastema.schedules import EMA_DECAY_FUNCTIONS, IDecayFunction

# Pickles of 0.1.0 name classes by these modules.
sys.modules.setdefault("fastema.decays", _decays)
sys.modules.setdefault("fastema.threads", _threads)

__version__ = "0.2.0"
__all__ = [
    "EMA_DECAY_FUNCTIONS",
    "FastEMA",
    "IDecayFunction",
    "ImportedAverage",
    "SwapError",
    "__version__",
    "import_average",
]

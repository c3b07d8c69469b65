"""fastema: exponential moving averages of model weights, at the speed of memory."""

import warnings

with warnings.catch_warnings():
    # torch says so at its first import where NumPy is absent, which neither of the two needs.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch  # noqa: F401

from fastema.core.swap import SwapError
from fastema.ema import FastEMA
from fastema.importing import ImportedAverage, import_average
from fastema.schedules import EMA_DECAY_FUNCTIONS, IDecayFunction

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

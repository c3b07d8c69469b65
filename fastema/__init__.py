"""fastema: exponential moving averages of model weights, at the speed of memory."""

from fastema.ema import FastEMA
from fastema.schedules import EMA_DECAY_FUNCTIONS, IDecayFunction

__version__ = "0.1.0"
__all__ = ["EMA_DECAY_FUNCTIONS", "FastEMA", "IDecayFunction", "__version__"]

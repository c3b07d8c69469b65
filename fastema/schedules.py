"""Decay schedules, and their registry `EMA_DECAY_FUNCTIONS`, to which a name of your own may be added.

class HalfWay(IDecayFunction):
    def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
        return decay / 2

EMA_DECAY_FUNCTIONS["half_way"] = HalfWay
"""

from fastema.core.decay.schedules import *  # noqa: F403

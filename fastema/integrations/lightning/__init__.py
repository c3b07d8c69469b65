"""Averages of the weights in Lightning's Trainer.

- `EMAWeightAveraging` is Lightning's callback of that name with a faster step: change the import, and nothing else.
  The model holds the average in validations and after the fit; `WeightAveraging` is its base class, as there.
- `FastEMACallback` leaves the trained weights in the model, keeps the average beside them, takes every argument of
  `FastEMA`, and can validate both (`validate="both"`).
"""

from __future__ import annotations

from typing import Any

from fastema.integrations.lightning import framework
from fastema.integrations.lightning.callback import FastEMACallback

if hasattr(framework.callbacks, "EMAWeightAveraging"):
    from fastema.integrations.lightning.weight_averaging import EMAWeightAveraging, WeightAveraging
else:

    def __getattr__(name: str) -> Any:
        if name in ("EMAWeightAveraging", "WeightAveraging"):
            raise ImportError(
                f"this version of lightning has no {name} to take the place of: update lightning to 2.6 or later, or "
                "use FastEMACallback"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["EMAWeightAveraging", "FastEMACallback", "WeightAveraging"]

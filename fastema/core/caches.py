"""What is computed from the weights and kept beside them: caches are cleared at a swap, merged adapters are noticed.

What cannot be found out here is in docs/what-a-swap-cannot-reach.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize


def clear_caches() -> None:
    """Forget what was computed from the weights: autocast's casts, and parametrized weights inside `cached()`."""
    torch.clear_autocast_cache()
    if parametrize._cache:
        parametrize._cache.clear()


class Merges:
    """Which adapters of a model are merged into its weights, as layers of PEFT and loralib tell by a flag `merged`.

    A merge adds to the weights what depends on the adapter's own, so that both have to be of one side: a layer that is
    merged on one side of a swap only would be damaged for good by its next unmerge.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._layers = [module for module in modules if _can_merge(module)]
        self._at_entry: list[bool] = []

    def enter(self) -> None:
        """Note what is merged.

        Raises:
            RuntimeError: a layer is, so that a swap would not reach what is merged into it.
        """
        if not self._layers:
            return
        self._at_entry = [bool(layer.merged) for layer in self._layers]
        if any(self._at_entry):
            raise RuntimeError(
                f"averaged weights cannot be swapped in while an adapter is merged into a {self._name(True)}: the "
                "weights hold what the trained adapter added to them. Unmerge it first (PEFT: model.unmerge_adapter(); "
                "loralib: model.train())"
            )

    def changed(self) -> str | None:
        """Return what to say where a layer was merged since `enter()` and still is; None: none was."""
        if not self._layers or [bool(layer.merged) for layer in self._layers] == self._at_entry:
            return None
        return (
            f"an adapter was merged into a {self._name(True)}, whose weights and adapter are averages: unmerge it "
            "(PEFT: model.unmerge_adapter(); loralib: model.train())"
        )

    def _name(self, merged: bool) -> str:
        return next((type(layer).__name__ for layer in self._layers if bool(layer.merged) == merged), "layer")


def _can_merge(module: nn.Module) -> bool:
    has_flag = "merged" in vars(module) or hasattr(type(module), "merged")
    return has_flag and isinstance(module.merged, bool) and any(_ways_to_merge(module))


def _ways_to_merge(module: nn.Module) -> Iterator[bool]:
    yield callable(getattr(type(module), "unmerge", None))  # PEFT
    yield "merge_weights" in vars(module)  # loralib

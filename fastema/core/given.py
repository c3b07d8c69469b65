"""Tensors of an averaged module and of the live model, paired by position, for `fastema.swa_utils`.

`PairedModules` is built once, with one plan over all pairs and a watch that notices replaced or moved tensors. The
averaged module's own tensors are the shadow. Pairs that are not equal contiguous memory use torch's operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastema import backends
from fastema.backends import contract
from fastema.core.given_pairs import UseTorchFallback, pairs_of
from fastema.core.given_swap import swap_of
from fastema.core.given_update import Update
from fastema.core.swap import Swap, entered, refuse_foreign
from fastema.core.tensors import refuse_elsewhere, why_no_storage

_TRAVERSALS = ("parameters", "named_parameters", "buffers", "named_buffers", "named_modules", "_named_members")


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model under each of their names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


class PairedModules:
    """The paired tensors of an AveragedModel and a live model, valid while both hold the same tensors.

    Args:
        averaged: the AveragedModel; not referenced.
        model: the live model; referenced weakly, so that its weights can be freed.
        use_buffers: as in torch.
        forget: called when the model is deleted.

    Raises:
        UseTorchFallback: the modules cannot be watched, or not be paired.
        ValueError: the elements of a live tensor are not in it.
    """

    def __init__(self, averaged: nn.Module, model: nn.Module, use_buffers: bool, forget: Callable[[Any], None]) -> None:
        roots = (averaged, averaged.module, model)
        if any(getattr(type(root), walk) is not getattr(nn.Module, walk) for root in roots for walk in _TRAVERSALS):
            raise UseTorchFallback  # an overridden traversal may return other tensors later
        modules = [*averaged.modules(), *model.modules()]
        dicts = [slots for module in modules for slots in (module._parameters, module._buffers, module._modules)]
        if not all(isinstance(slots, dict) for slots in dicts):
            raise UseTorchFallback  # TorchScript stores them elsewhere
        refuse_elsewhere("AveragedModel", tensors_by_name(model).items())
        self.pairs, self._counts = pairs_of(averaged, model, use_buffers)
        self.is_regular = all(pair.is_regular for pair in self.pairs)
        self._use_buffers = use_buffers
        self._names: dict[int, list[str]] = {}
        for name, tensor in tensors_by_name(model).items():
            self._names.setdefault(id(tensor), []).append(name)
        self._model = weakref.ref(model, forget)
        self._host = backends.host(backends.default_name())
        tensors = [tensor for pair in self.pairs for tensor in (pair.averaged, pair.live)]
        averages = [pair.averaged for pair in self.pairs]
        self._watch: contract.Watch | None = self._host.Watch(dicts, tensors, averages) if self.is_regular else None
        self._update: Update | None = None
        self._swap: Swap | None = None

    def holds(self, model: nn.Module, use_buffers: bool) -> bool:
        """Return True if these are the pairs of `model` and nothing was replaced."""
        is_same = self._model() is model and self._use_buffers == use_buffers
        return is_same and self._watch is not None and self._watch.holds()

    def is_of(self, model: Any) -> bool:
        """Return True if these are the pairs of `model`, a weak reference."""
        return self._model is model

    def update(self) -> Update:
        """Return the update of the averaged module.

        Raises:
            UseTorchFallback: torch's own code must run.
        """
        if self._update is None:
            if not self.is_regular:
                raise UseTorchFallback
            self._update = Update(self.pairs, self._host)
        return self._update

    def copy_to_new_memory(self) -> None:
        """Copy averages whose memory was replaced in the middle of an update to where they are now."""
        if self._update is not None and self._watch is not None and not self._watch.shadows_hold():
            with torch.inference_mode(False), torch.no_grad():
                self._update.copy_to_new_memory()

    def swap(self) -> Swap:
        """Return the exchange of the two.

        Raises:
            ValueError: they cannot be swapped; says why.
        """
        if self._swap is None:
            if self._counts[0] != self._counts[1]:
                raise ValueError(
                    f"swapped() needs the model that is averaged: it has {self._counts[1]} tensors, the average has "
                    f"{self._counts[0]}"
                )
            model = self._model()
            assert model is not None
            self._swap = swap_of(self.pairs, self._names, self._host, model.modules())
        return self._swap

    def is_unchanged(self) -> bool:
        """Return True if both sides have the same tensors in the same storages; their memory may differ."""
        return self._watch is not None and self._watch.layout_holds()

    def refuse_foreign(self, what: str) -> None:
        """Raise RuntimeError while a swap is entered that has any of these storages."""
        if entered:
            tensors = [tensor for pair in self.pairs for tensor in (pair.averaged, pair.live)]
            storages = {tensor.untyped_storage()._cdata for tensor in tensors if not why_no_storage(tensor)}
            refuse_foreign(what, frozenset(storages))

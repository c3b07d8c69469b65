"""The average of one tensor: where it is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastema.core import sharded
from fastema.core.policy import Managed
from fastema.core.storages import ShadowStorage
from fastema.memory import planes
from fastema.memory.atomic_steps import Step


@dataclass
class Average:
    """The average of a managed tensor, or the copy of one whose rule is "copy"."""

    entry: Managed
    view: Tensor  # of the shadow; of two planes the high one
    low: Tensor | None  # the low plane
    storage: ShadowStorage | None  # None: the model reassigns the tensor, and `view` is a tensor of its own

    @classmethod
    def of(cls, entry: Managed, storage: ShadowStorage | None, which: int) -> Average:
        if storage is None:
            return cls(entry, entry.tensor.detach().clone(), None, None)
        return cls(entry, storage.view_of(entry.tensor, which), storage.low_of(entry.tensor, which), storage)

    def like_model(self, local: Tensor) -> Tensor:
        """Return `local` as the model has the tensor: as a DTensor if that is one."""
        return sharded.as_dtensor_like(self.entry.whole, local.detach())

    def in_model(self) -> Average:
        """Return the average as it is while a swap has put it into the model; itself if its memory stays."""
        if self.storage is None or not self.storage.is_direct:
            return self
        return replace(self, view=self.storage.in_model(self.view))

    def copy_loose(self, skip: Tensor | None) -> None:
        """Copy the tensor that is in the module's slot now, unless `skip` is not 0."""
        live, shadow = self.entry.current().detach(), self.view
        if (shadow.shape, shadow.dtype, shadow.device) != (live.shape, live.dtype, live.device):
            self.view = live.clone()
        elif skip is None:
            shadow.copy_(live)
        else:
            shadow.copy_(torch.where(skip.to(shadow.device) != 0, shadow, live))

    def shown(self) -> Tensor:
        """Return a tensor of the average's dtype and shape, which may have neither its values nor its memory."""
        if self.low is None:
            return self.like_model(self.view)
        return self.like_model(self.low.new_empty((), dtype=torch.float32).expand(self.low.shape))

    def filling(self, value: Tensor | Average) -> list[Step]:
        """Return steps for `run_atomically` that copy a value into the average."""
        if isinstance(value, Average):
            if self.low is not None and value.low is not None:
                high, low = (self.view.detach(), value.view.detach()), (self.low, value.low)
                return [partial(Tensor.copy_, *high), partial(Tensor.copy_, *low)]
            value = value.value()
        target, part = sharded.assignment(self.shown(), value)
        if self.low is None:
            return [partial(Tensor.copy_, target, part)]
        own = slice(target.numel()) if sharded.is_partitioned(self.entry.whole) else ...  # without its padding
        return planes.filling(self.view.detach()[own], self.low[own], part.detach())

    def value(self) -> Tensor:
        """Return the average; of two planes a copy."""
        return self.like_model(self.view if self.low is None else planes.join(self.view, self.low))

"""A tensor of a model and its averages: the one record of a tensor."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastema.backends.contract import Segment
from fastema.core import sharded
from fastema.memory import planes
from fastema.memory.atomic_steps import Step, run_atomically

if TYPE_CHECKING:
    from fastema.core.storages import ShadowStorage

Rule = Literal["average", "copy", "skip"]


@dataclass
class Pair:
    """One tensor of the model with all its names and its rule, and its averages."""

    whole: Tensor  # the tensor in the model; a DTensor if the model is sharded
    rule: Rule
    names: list[str] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list, repr=False)  # [count]; empty until they have memory
    slots: list[tuple[dict[str, Any], str]] = field(default_factory=list)  # (dict, key) of each place in a module
    persistent: bool = True  # False: a buffer that state_dict() leaves out
    loose: bool = False  # a copied buffer that the model reassigns: looked up in its slot at every update
    live: Tensor = field(init=False)  # the local memory: `whole`, or of a sharded tensor the local one
    layout: str = field(init=False)  # description at the time of building, for errors: `tensor.data = ...` changes it

    def __post_init__(self) -> None:
        self.live = sharded.local_part(self.whole)
        lazy = nn.parameter.is_lazy(self.whole)  # a lazy parameter has no shape
        shape = "?" if lazy else tuple(sharded.shape_of(self.whole))
        self.layout = f"{shape} {self.live.dtype} on {self.live.device}{sharded.placement(self.whole)}"

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def copy(self) -> bool:
        """True if it is copied at every update rather than averaged."""
        return self.rule == "copy"

    @property
    def averaged(self) -> Tensor:
        """The only average, or the first one."""
        return self.averages[0].view

    @property
    def is_saved(self) -> bool:
        """True if `state_dict()` includes it: all but copies of non-persistent buffers."""
        return self.persistent or not self.copy

    def current(self) -> Tensor:
        """Return the tensor that is in the slot now."""
        value = self.slots[0][0].get(self.slots[0][1]) if self.slots else None
        return value if isinstance(value, Tensor) else self.whole

    def put(self, tensor: Tensor) -> None:
        """Put `tensor` into every slot."""
        run_atomically([partial(dict.__setitem__, slots, key, tensor) for slots, key in self.slots])

    def keep_in(self, storage: ShadowStorage | None, count: int) -> None:
        """Take the averages in `storage`; None: the model reassigns the tensor, and each is a tensor of its own."""
        if storage is None:
            self.averages = [Average(weakref.ref(self), self.live.detach().clone()) for _ in range(count)]
            return
        self.averages = [
            Average(weakref.ref(self), storage.view_of(self.live, which), storage.low_of(self.live, which), storage)
            for which in range(count)
        ]

    def segment_in(self, given: dict[int, Tensor], live: Tensor) -> Segment:
        """Return the tensor and its averages where a compiled graph has them.

        Args:
            given: by id of a shadow's or a low plane's storage, as bytes or as int16: what the graph has for it.
            live: what the graph has for the live tensor.
        """
        shadows, lows = [], []
        for which, average in enumerate(self.averages):
            assert average.storage is not None
            shadows.append(_same_view(average.view, given[id(average.storage.shadows[which])]))
            if average.low is not None:
                lows.append(_same_view(average.low, given[id(average.storage.lows[which])]))
        return Segment(shadows, live, self.copy, lows)


def _same_view(view: Tensor, flat: Tensor) -> Tensor:
    """Return the place in `flat` that `view` has in its storage."""
    return flat.view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset())


@dataclass
class Average:
    """One average of a tensor, or the copy of one whose rule is "copy": where it is kept."""

    whose: weakref.ref[Pair] = field(repr=False)  # weak: an average is freed at once, not when the collector comes
    view: Tensor  # of the shadow; of two planes the high one
    low: Tensor | None = None  # the low plane
    storage: ShadowStorage | None = None  # None: `view` is a tensor of its own

    @property
    def pair(self) -> Pair:
        """The record of the tensor."""
        pair = self.whose()
        assert pair is not None
        return pair

    def like_model(self, local: Tensor) -> Tensor:
        """Return `local` as the model has the tensor: as a DTensor if that is one."""
        return sharded.as_dtensor_like(self.pair.whole, local.detach())

    def in_model(self) -> Average:
        """Return the average as it is while a swap has put it into the model; itself if its memory stays."""
        if self.storage is None or not self.storage.is_direct:
            return self
        return replace(self, view=self.storage.in_model(self.view))

    def copy_loose(self, skip: Tensor | None) -> None:
        """Copy the tensor that is in the module's slot now, unless `skip` is not 0."""
        live, shadow = self.pair.current().detach(), self.view
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

    def fill_steps(self, value: Tensor | Average) -> list[Step]:
        """Return steps for `run_atomically` that copy a value into the average."""
        if isinstance(value, Average):
            if self.low is not None and value.low is not None:
                high, low = (self.view.detach(), value.view.detach()), (self.low, value.low)
                return [partial(Tensor.copy_, *high), partial(Tensor.copy_, *low)]
            value = value.value()
        target, part = sharded.assignment(self.shown(), value)
        if self.low is None:
            return [partial(Tensor.copy_, target, part)]
        own = slice(target.numel()) if sharded.is_partitioned(self.pair.whole) else ...  # without its padding
        return planes.fill_steps(self.view.detach()[own], self.low[own], part.detach())

    def value(self) -> Tensor:
        """Return the average; of two planes a copy."""
        return self.like_model(self.view if self.low is None else planes.join(self.view, self.low))

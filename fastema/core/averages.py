"""The averages of a whole model: their storages, and what is done with all of them: update, swap, read.

Storages are mirrored rather than tensors, so that tied weights are averaged once, flat RNN weights stay flat and every
view of a weight follows when pointers change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastema import backends
from fastema.backends import contract
from fastema.backends import torch as plain_torch
from fastema.backends.contract import UpdateArgs
from fastema.core import sharded, swap
from fastema.core.pairs import Average, Pair
from fastema.core.plans import Plans
from fastema.core.policy import Source, named_tensors
from fastema.core.storages import keep_in_storages, swap_of
from fastema.core.swap import Swap
from fastema.core.tensors import why_no_storage

_FEW = 8  # so many tensors show whether the weights were written to
_needs_gradient = attrgetter("requires_grad")


class Averages:
    """`count` averages of each tensor of a model.

    Args:
        source: the model, or its tensors by name.
        pairs: what of it is averaged or copied, each tensor once; their averages are made here.
        count: how many: one for each decay.
        dtype, device: the shadows'; None: see `storages.shadow_dtype`, and where the live tensor is.
        backend: "auto" or the name of one.
        may_split: True if float32 averages of bfloat16 tensors may be kept in two planes.
        frozen: tensors that are not averaged; once one needs a gradient, the shadow is not current any more.

    Raises:
        ValueError: a tensor whose storage cannot be mirrored; names it.
    """

    def __init__(
        self,
        source: Source,
        pairs: list[Pair],
        count: int,
        dtype: torch.dtype | None,
        device: torch.device | None,
        backend: str,
        may_split: bool = True,
        frozen: Sequence[Tensor] = (),
    ) -> None:
        self.pairs = pairs
        self.count = count
        self._mirrored = [pair for pair in pairs if not pair.loose]
        self._tensors = [pair.live for pair in self._mirrored]
        written = [e.live for e in self._mirrored if e.rule == "average" and not e.live.is_inference()]
        self._few = written[:: -(-len(written) // _FEW)] if written else []
        self._host = backends.host(backend)
        self._backend = backend
        self._source = source
        self._may_split = may_split
        self._frozen = frozen
        self._modules = modules = list(source.modules()) if isinstance(source, nn.Module) else []
        self._dicts = [slots for module in modules for slots in (module._parameters, module._buffers, module._modules)]
        self._gathered = sharded.GatheredParameters(modules)
        self._parts: list[tuple[Any, Tensor]] = [
            (pair.whole, pair.live) for pair in pairs if sharded.is_dtensor(pair.whole)
        ]  # DTensors and their local tensors
        self._zero3_parts: list[tuple[Any, Tensor]] = [
            (pair.whole, pair.live) for pair in pairs if sharded.is_partitioned(pair.whole)
        ]
        self._swap: Swap | None = None  # the one that is entered, or was last
        self._which = 0  # the shadow that it exchanges
        self._one_call: Callable[..., str | None] | None = None  # watch and update in one
        self._swaps: dict[tuple[int, bool, int], Swap] = {}  # built at the first use of a shadow
        self._loose_live: list[Tensor] = []  # the live values of loose buffers, while the averages are in
        self.nonfinite_elsewhere = 0  # elements counted in compiled graphs, and by earlier plans
        # Under inference_mode the shadow would become inference tensors, which nothing may ever update again.
        with torch.inference_mode(False), torch.no_grad():
            self._build(dtype, device)

    # ---- building ----

    def _build(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        self.live_storage_ids = frozenset(pair.live.untyped_storage()._cdata for pair in self._mirrored)
        swap.refuse_foreign("building a FastEMA", self.live_storage_ids)  # it would start from the other's average
        self._storages = keep_in_storages(self._mirrored, dtype, device, self.count, self._host, self._may_split)
        self._loose = [pair for pair in self.pairs if pair.loose]
        for pair in self._loose:
            pair.keep_in(None, self.count)
        self.storage_ids = self.live_storage_ids | {
            shadow.untyped_storage()._cdata for storage in self._storages for shadow in storage.shadows
        }
        self.is_on_cpu = all(s.live.device.type == s.device.type == "cpu" for s in self._storages)
        self._build_plans()
        for segment in (segment for storage in self._storages for segment in storage.segments):
            for shadow in segment.shadows:
                shadow.copy_(segment.live)

    def _build_plans(self) -> None:
        segments = [segment for storage in self._storages for segment in storage.segments]
        views = [average.view for pair in self.pairs for average in pair.averages]
        loose_averages = [average for pair in self._loose for average in pair.averages]
        self.plans = Plans(segments, self._backend, views, loose_averages)
        loose = [slot for pair in self._loose for slot in pair.slots]
        shadows = [shadow for storage in self._storages for shadow in storage.shadows]
        with self._gathered.set_aside():
            self._watch: contract.Watch = self._host.Watch(self._dicts, self._tensors, shadows, loose)
        is_simple = len(self.plans.by_device) == 1 and not self._gathered and not self._parts and not loose
        native = getattr(self.plans.by_device[0], "update_watched", None) if is_simple else None
        self._one_call = None if native is None else partial(native, self._watch)

    def averaged_names(self) -> list[str]:
        """Return the names of what is averaged, not copied."""
        return [name for pair in self.pairs if pair.rule == "average" for name in pair.names]

    @property
    def is_sharded(self) -> bool:
        """True if each process has a part only of some tensors."""
        return bool(self._parts or self._zero3_parts)

    # ---- every step ----

    def is_current(self) -> bool:
        """Return True if model and averages are the same tensors in the same memory, and none has begun to train."""
        if not self._holds(self._watch.holds):
            return False
        if self._has_begun_to_train():
            return False
        # Every update looks at the parts themselves; whether they are still those of the parameters, only this does.
        return not self._zero3_parts or all(whole.ds_tensor is part for whole, part in self._zero3_parts)

    def _has_begun_to_train(self) -> bool:
        return True in map(_needs_gradient, self._frozen)

    def _is_unchanged(self) -> bool:
        """Return True if the model has the same tensors in the same storages; their memory may differ."""
        return self._holds(self._watch.layout_holds)

    def _weights_now(self) -> dict[str, Tensor]:
        """Return the model's tensors by name; the sharded ones where an FSDP module has gathered them."""
        now = dict(named_tensors(self._source))
        for pair in self._mirrored:
            if sharded.is_dtensor(pair.whole):
                now.update({name: pair.whole for name in pair.names if not sharded.is_dtensor(now.get(name))})
        return now

    def _holds(self, watch: Callable[[], bool]) -> bool:
        if not self._parts and not self._gathered:
            return watch()
        with self._gathered.set_aside():
            return watch() and all(whole._local_tensor is part for whole, part in self._parts)

    def follow_averages(self, after_swap: bool = False) -> None:
        """Build plans for the averages' memory where a user replaced it.

        Where the model has changed too, nothing is done: a new shadow will take the averages over.
        """
        if self._watch.shadows_hold():
            return
        self.plans.synchronize()
        # A copy to shared memory may have been made during an update. What the kernels wrote is whole; but where a user
        # has written to the averages since, that counts.
        if not after_swap and self.plans.only_updates_wrote():
            self.copy_to_new_memory()
        if not self._is_unchanged():
            return
        self.nonfinite_elsewhere = self.nonfinite_count()
        with torch.inference_mode(False), torch.no_grad():
            for storage in self._storages:
                storage.refresh_memory()
            self._swaps.clear()
            self._build_plans()

    def copy_to_new_memory(self) -> None:
        """Copy averages whose memory was replaced during an update to the memory that they have now."""
        with torch.inference_mode(False), torch.no_grad():
            for storage in self._storages:
                storage.copy_to_new_memory()

    def refuse_resized(self) -> None:
        """Raise RuntimeError if a user resized the storage of an average."""
        for storage in self._storages:
            for shadow in storage.shadows:
                if shadow.untyped_storage().nbytes() != shadow.numel():
                    raise RuntimeError(
                        "the storage of an average was resized (resize_() on a tensor of state_dict() or "
                        "shadow_state_dict()): its values may be gone. Build a new FastEMA, and resize a clone()"
                    )

    def update_watched(self, args: UpdateArgs) -> str | None:
        """Update if model and averages are where they were; in one call of C++ where there is one plan.

        Returns:
            None; "moved" where nothing was done; "averages moved" where they were replaced during the update.
        """
        if self._one_call is not None:
            return "moved" if self._frozen and self._has_begun_to_train() else self._one_call(args)
        if not self.is_current():
            return "moved"
        self.plans.update(args)
        return None if self._watch.shadows_hold() else "averages moved"

    def defer_copies_until_step(self, parameters: Iterable[Tensor]) -> None:
        """Let copies of `parameters` to the host last until `order_writes()`, called before each optimizer step.

        Every other tensor is safe to write right after an update.
        """
        if not self.plans.offloaded:
            return
        stepped = {id(parameter) for parameter in parameters}
        others = {pair.live.untyped_storage()._cdata for pair in self._mirrored if id(pair.whole) not in stepped}
        for plan in self.plans.offloaded:
            plan.defer_copies_until_step(self.live_storage_ids - others)

    def nonfinite_count(self) -> int:
        return self.nonfinite_elsewhere + self.plans.nonfinite_count()

    # ---- the update inside a compiled graph, which may hold the tensors elsewhere ----

    def operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what an update changes, and what it reads.

        It changes every shadow storage as a whole [count * storages], and the low planes of those that have some.

        Raises:
            RuntimeError: the compiler may keep a DTensor, a replaced buffer or a shadow in host memory elsewhere than
                its memory here.
        """
        reason = (
            "the shadow is in host memory" if self.plans.offloaded else
            "the model is sharded" if self.is_sharded else
            "a buffer of the model is replaced by every forward" if self._loose else None
        )  # fmt: skip
        if reason is not None:
            raise RuntimeError(f"{reason}: call update() outside the compiled function")
        shadows = [shadow for storage in self._storages for shadow in storage.shadows]
        return [*shadows, *(low for storage in self._storages for low in storage.lows)], self._tensors

    def update_operands(self, shadows: list[Tensor], lives: list[Tensor], args: UpdateArgs) -> None:
        """Update `operands()`, or the tensors of the same shapes that a compiled graph has for them.

        Raises:
            RuntimeError: tensors overlap, which the graph's tensors cannot show.
        """
        own_shadows, own_lives = self.operands()
        own = [tensor.data_ptr() for tensor in (*own_shadows, *own_lives)]
        if own == [tensor.data_ptr() for tensor in (*shadows, *lives)]:
            self.plans.update(args)
            return
        if any(storage.overlaps for storage in self._storages):
            raise RuntimeError("tensors of the model overlap in memory: call update() outside the compiled function")
        given = {id(own): tensor for own, tensor in zip(own_shadows, shadows, strict=True)}
        pairs = zip(self._mirrored, lives, strict=True)
        plan = plain_torch.Plan([pair.segment_in(given, live) for pair, live in pairs], [])
        plan.update(args)
        self.nonfinite_elsewhere += plan.nonfinite_count()

    # ---- the swap ----

    @property
    def is_applied(self) -> bool:
        return self._swap is not None and self._swap.is_entered

    @property
    def applied(self) -> int:
        """Index of the shadow that is in the model, or was last."""
        return self._which

    @property
    def is_in_place(self) -> bool:
        """True if the last swap exchanged contents."""
        return self._swap is not None and self._swap.by_contents

    def versions(self) -> int:
        """Return a number that changes whenever autograd sees a write to one of the tensors."""
        return sum(tensor._version for tensor in self._tensors if not tensor.is_inference())

    def versions_of_few(self) -> list[int]:
        """Return the versions of a few averaged tensors: cheap enough for every step."""
        return [tensor._version for tensor in self._few]

    def has(self, tensor: Tensor) -> bool:
        """Return whether `tensor` has memory of one of these, or is in its place."""
        if any(tensor is pair.whole for pair in self.pairs):
            return True
        local = sharded.local_part(tensor)
        return why_no_storage(local) is None and local.untyped_storage()._cdata in self.live_storage_ids

    def refuse_foreign(self, what: str) -> None:
        """Raise RuntimeError while another EMA's averages are in this model, or this EMA's are in another model."""
        if swap.entered:
            swap.refuse_foreign(what, self.storage_ids, own=self._swap)

    def apply(self, which: int, in_place: bool) -> None:
        """Swap live weights and average `which`. The caller has checked that this is allowed.

        Raises:
            ValueError: in_place, and the contents could not be put back exactly. Nothing is changed.
        """
        self.plans.synchronize()
        self._gathered.drop()
        versioned = self._versioned()
        key = which, in_place, len(versioned)  # FSDP makes its gathered parameters in their first forward
        if key not in self._swaps:
            contents_of = self.plans.by_device if in_place else None
            self._swaps[key] = swap_of(
                self._storages, which, self._mirrored, versioned, self._host, contents_of, self._modules
            )
        chosen = self._swaps[key]
        self._swap, self._which = chosen, which
        self._loose_live = [pair.current() for pair in self._loose]
        copies = [pair.averages[which].view.clone() for pair in self._loose]
        chosen.enter()
        if copies:
            self._put_loose(copies)

    def _put_loose(self, tensors: list[Tensor]) -> None:
        for pair, tensor in zip(self._loose, tensors, strict=True):
            pair.put(tensor)

    def _versioned(self) -> list[Tensor]:
        """Return the tensors that recorded graphs may refer to."""
        if not self.is_sharded:
            return self._tensors
        wholes = (whole for whole, _ in (*self._parts, *self._zero3_parts))
        return [*self._tensors, *wholes, *self._gathered.tensors()]

    def restore(self) -> None:
        """Swap the live weights back.

        Raises:
            SwapError: a tensor cannot take its live value; nothing is changed.
            RuntimeError: gathered copies of sharded averages could not be dropped; the swap itself is done.
        """
        assert self._swap is not None
        try:
            self._gathered.drop()  # before the swap back, so that an interrupt cannot leave them behind
        finally:
            averages = [pair.current() for pair in self._loose]
            self._put_loose(self._loose_live)
            try:
                is_unchanged = self._swap.leave(self._is_unchanged, self._weights_now)
            except swap.SwapError:
                self._put_loose(averages)
                raise
        if not is_unchanged:
            self.follow_averages(after_swap=True)
            self._swaps.clear()
        if self._parts and not self.is_current():
            raise RuntimeError(
                "restored, but the model's parameters were replaced meanwhile, or are gathered by an FSDP module that "
                "FastEMA was not given: call reshard() on that one, else its next forward uses averaged weights"
            )

    # ---- the average and the live values, by tensor ----

    def averages(self, which: int) -> list[tuple[Pair, Tensor]]:
        """Return every tensor with its average.

        The averages share memory with the EMA. Copies, right then and after, are those that are in the model right now,
        and float32 ones of bfloat16 tensors, which are kept in two planes.
        """
        result = []
        for pair, stored in zip(self.pairs, self.stored(which), strict=True):
            is_copied = stored is not pair.averages[which] and stored.low is None  # it is in the model
            value = stored.like_model(stored.view.clone()) if is_copied else stored.value()
            result.append((pair, value))
        return result

    def weights(self, which: int) -> list[tuple[Pair, Tensor]]:
        """Return every tensor with its average as a swap puts it into the model, rounded to bfloat16 if it is.

        They share memory with the EMA, or with the model while they are in it.
        """
        return [(average.pair, average.like_model(average.view)) for average in self.stored(which)]

    def stored(self, which: int) -> list[Average]:
        """Return every average as it is kept now: beside the model or, while a swap has put it there, in it."""
        self.plans.synchronize()
        averages = [pair.averages[which] for pair in self.pairs]
        if not self.is_applied or which != self._which:
            return averages
        return [average.in_model() for average in averages]

    def live_values(self) -> dict[str, Tensor]:
        """Return the live values by name, while the averages are in the model."""
        assert self._swap is not None
        loose = zip(self._loose, self._loose_live, strict=True)
        return {**self._swap.live_values(), **{name: live for pair, live in loose for name in pair.names}}

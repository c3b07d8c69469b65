"""The shadow of a whole model: its storages, the plan of an update, and the swap with the live weights.

Storages are mirrored rather than tensors, so that tied weights are averaged once, flat RNN weights stay flat and every
view of a weight follows when pointers change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastema import backends
from fastema.backends import contract, planes
from fastema.backends import torch as plain_torch
from fastema.core.model import dtensor
from fastema.core.model.policy import Managed
from fastema.core.shadow import offload
from fastema.core.shadow.storages import ShadowStorage
from fastema.core.swap import swap
from fastema.core.swap.swap import Swap, SwapEntry

_OWNER = "another FastEMA is applied to the same model: the live weights are its average now; restore() that one first"
_DROPPED = (
    "a FastEMA was deleted while its weights were applied: the model keeps the averaged weights, and the trained ones "
    "are lost. Call restore() first; or copy_to(), if that is intended"
)


class Shadow:
    """`count` shadows of the managed tensors.

    Args:
        managed: what is averaged or copied, each tensor once.
        count: how many: one for each decay.
        dtype, device: the shadows'; None: see `storages.shadow_dtype`, and where the live tensor is.
        backend: "auto" or the name of one.
        modules: the modules whose slots are watched for replaced tensors.
        tensors_now: return the model's tensors by name, as they are then.
        may_split: True if float32 averages of bfloat16 tensors may be kept in two planes.

    Raises:
        ValueError: a tensor whose storage cannot be mirrored; names it.
    """

    def __init__(
        self,
        managed: list[Managed],
        count: int,
        dtype: torch.dtype | None,
        device: torch.device | None,
        backend: str,
        modules: Sequence[nn.Module],
        tensors_now: Callable[[], dict[str, Tensor]],
        may_split: bool = True,
    ) -> None:
        self.managed = managed
        self.count = count
        self._bound = [entry for entry in managed if not entry.loose]
        self._loose = [(index, entry) for index, entry in enumerate(managed) if entry.loose]
        self._tensors = [entry.tensor for entry in self._bound]
        self._host = backends.host(backend)
        self._backend = backend
        self._tensors_now = tensors_now
        self._may_split = may_split
        self._dicts = [slots for module in modules for slots in (module._parameters, module._buffers, module._modules)]
        self._gathered = dtensor.GatheredParameters(modules)
        self._parts: list[tuple[Any, Tensor]] = [
            (entry.whole, entry.tensor) for entry in managed if entry.tensor is not entry.whole
        ]
        self._swap: Swap | None = None  # the one that is entered, or was last
        self._which = 0  # the shadow that it exchanges
        self._swaps: dict[tuple[int, bool, int], Swap] = {}  # built at the first use of a shadow
        self._loose_live: list[Tensor] = []  # the live values of loose buffers, while the averages are in
        self.nonfinite_elsewhere = 0  # elements counted in compiled graphs, and by earlier plans
        # Under inference_mode the shadow would become inference tensors, which nothing may ever update again.
        with torch.inference_mode(False), torch.no_grad():
            self._build(dtype, device)

    # ---- building ----

    def _build(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        groups: dict[int, list[Managed]] = {}
        for entry in self._bound:
            groups.setdefault(entry.tensor.untyped_storage()._cdata, []).append(entry)
        _refuse_two_storages_over_one_memory([entries[0] for entries in groups.values()])
        self.live_storages = frozenset(groups)
        swap.refuse_foreign("building a FastEMA", self.live_storages)  # it would start from the other's average
        by_live = {
            key: ShadowStorage(
                entries, dtype, device, self.count, self._host, self._has_planes(entries[0].tensor.device, device)
            )
            for key, entries in groups.items()
        }
        self._storages = list(by_live.values())
        self._owners = [by_live[entry.tensor.untyped_storage()._cdata] for entry in self._bound]  # [bound]
        self._views: list[list[Tensor]] = []  # [count][managed]; of two planes the high one
        self._lows: list[list[Tensor | None]] = []  # [count][managed]; the low one
        for which in range(self.count):
            owners = iter(self._owners)
            self._views.append([])
            self._lows.append([])
            for entry in self.managed:
                if entry.loose:
                    self._views[-1].append(entry.tensor.detach().clone())
                    self._lows[-1].append(None)
                else:
                    owner = next(owners)
                    self._views[-1].append(owner.view_of(entry.tensor, which))
                    self._lows[-1].append(owner.low_of(entry.tensor, which))
        self.storages = self.live_storages | {
            shadow.untyped_storage()._cdata for storage in self._storages for shadow in storage.shadows
        }
        self.is_on_cpu = all(s.live.device.type == s.device.type == "cpu" for s in self._storages)
        self._plan()
        for storage in self._storages:
            for segments in storage.segments:
                for segment, live in zip(segments, storage.lives, strict=True):
                    segment.copy_(live)

    def _has_planes(self, device: torch.device, shadow_device: torch.device | None) -> bool:
        return self._may_split and offload.transfer_between(device, shadow_device or device) is None

    def _plan(self) -> None:
        """Build one plan per device: a mix of dtypes and rules is no reason for a second."""
        places: dict[tuple[torch.device, bool], list[ShadowStorage]] = {}
        for storage in self._storages:
            device = storage.live.device
            places.setdefault((device, device == storage.device), []).append(storage)
        self._bumped = torch.empty(0, device="cpu")  # its version counts the updates of these plans
        self.plans: list[Any] = []  # contract.Plan, or OffloadedPlan, which cannot exchange
        self._plan_devices = [device for device, _ in places]  # of the live weights
        self.offloaded: list[offload.OffloadedPlan] = []  # those of `plans` that run in a thread
        names: list[str] = []
        for (device, same_device), storages in places.items():
            segments = [[segment for s in storages for segment in s.segments[which]] for which in range(self.count)]
            lives = [live for storage in storages for live in storage.lives]
            copies = [run.copy for storage in storages for run in storage.runs]
            views = [] if self.plans else [*self._all_views(), self._bumped]
            transfer = offload.transfer_between(device, storages[0].device)
            if transfer is not None:
                module = self._host
                self.offloaded.append(offload.OffloadedPlan(transfer, module.Plan, segments, lives, copies, views))
                self.plans.append(self.offloaded[-1])
            else:  # only torch crosses devices
                module = backends.select(self._backend if same_device else "torch", device)
                lows = [[low for s in storages for low in s.low_segments[which]] for which in range(self.count)]
                own_lows = lows if any(low is not None for low in lows[0]) else []
                self.plans.append(module.Plan(segments, lives, copies, views, own_lows))
            names.append(module.NAME)
        self.backend_name = "+".join(dict.fromkeys(names))
        self.note_writes()
        loose = [slot for _, entry in self._loose for slot in entry.slots]
        shadows = [shadow for storage in self._storages for shadow in storage.shadows]
        with self._gathered.set_aside():
            self._watch: contract.Watch = self._host.Watch(self._dicts, self._tensors, shadows, loose)
        is_simple = len(self.plans) == 1 and not self._gathered and not self._parts and not self._loose
        native = getattr(self.plans[0], "update_watched", None) if is_simple else None
        self._one_call = None if native is None else partial(native, self._watch)

    @property
    def is_sharded(self) -> bool:
        """True if some tensors are DTensors."""
        return bool(self._parts)

    # ---- every step ----

    def is_current(self) -> bool:
        """Return True if model and averages are the same tensors in the same memory."""
        return self._holds(self._watch.holds)

    def _is_unchanged(self) -> bool:
        """Return True if the model has the same tensors in the same storages; their memory may differ."""
        return self._holds(self._watch.layout_holds)

    def _weights_now(self) -> dict[str, Tensor]:
        """Return the model's tensors by name; the sharded ones where an FSDP module has gathered them."""
        now = self._tensors_now()
        for entry in self._bound:
            if entry.tensor is not entry.whole:
                now.update({name: entry.whole for name in entry.names if not dtensor.is_dtensor(now.get(name))})
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
        self.synchronize()
        # A copy to shared memory may have been made during an update. What the kernels wrote is whole; but where a user
        # has written to the averages since, that counts.
        if not after_swap and self._only_updates_wrote():
            self.settle()
        if not self._is_unchanged():
            return
        self.nonfinite_elsewhere = self.nonfinite_count()
        with torch.inference_mode(False), torch.no_grad():
            for storage in self._storages:
                storage.own_memory()
            self._swaps.clear()
            self._plan()

    def _all_views(self) -> list[Tensor]:
        return [view for views in self._views for view in views]

    def note_writes(self) -> None:
        """Note that what was written to the averages, other than by updates, is where they are now."""
        self._noted = [view._version - self._bumped._version for view in self._all_views()]

    def _only_updates_wrote(self) -> bool:
        return self._noted == [view._version - self._bumped._version for view in self._all_views()]

    def settle(self) -> None:
        """Copy averages whose memory was replaced during an update to the memory that they have now."""
        with torch.inference_mode(False), torch.no_grad():
            for storage in self._storages:
                storage.settle()

    def refuse_resized(self) -> None:
        """Raise RuntimeError if a user resized the storage of an average."""
        for storage in self._storages:
            for shadow in storage.shadows:
                if shadow.untyped_storage().nbytes() != shadow.numel():
                    raise RuntimeError(
                        "the storage of an average was resized (resize_() on a tensor of state_dict() or "
                        "shadow_state_dict()): its values may be gone. Build a new FastEMA, and resize a clone()"
                    )

    def update_watched(self, weights: list[float], skip_nonfinite: bool, skip: Tensor | None = None) -> str | None:
        """Update if model and averages are where they were; in one call of C++ where there is one plan.

        Returns:
            None; "moved" where nothing was done; "averages moved" where they were replaced during the update.
        """
        if self._one_call is not None:
            return self._one_call(weights, skip_nonfinite, skip)
        if not self.is_current():
            return "moved"
        self.update(weights, skip_nonfinite, skip)
        return None if self._watch.shadows_hold() else "averages moved"

    def update(
        self,
        weights: list[float],
        skip_nonfinite: bool,
        skip: Tensor | None = None,
        device_weights: Tensor | None = None,
    ) -> None:
        """Average or copy every tensor; for the arguments see `Plan.update` in fastema/backends/contract.py.

        Raises:
            RuntimeError: an earlier average failed in its thread; nothing is averaged.
        """
        self.synchronize()
        skips = backends.skips_on(self._plan_devices, skip)
        for plan, own_skip in zip(self.plans, skips, strict=True):
            plan.update(weights, skip_nonfinite, own_skip, device_weights)
        for index, entry in self._loose:
            self._copy_loose(index, entry.current(), skip)

    def _copy_loose(self, index: int, live: Tensor, skip: Tensor | None) -> None:
        for views in self._views:
            shadow = views[index]
            if (shadow.shape, shadow.dtype, shadow.device) != (live.shape, live.dtype, live.device):
                views[index] = live.detach().clone()
            elif skip is None:
                shadow.copy_(live.detach())
            else:
                shadow.copy_(torch.where(skip.to(shadow.device) != 0, shadow, live.detach()))

    def synchronize(self) -> None:
        """Wait for averages that run in a thread, and raise their errors."""
        for plan in self.offloaded:
            plan.synchronize()

    def defer_copies_until_step(self, parameters: Iterable[Tensor]) -> None:
        """Let copies of `parameters` to the host last until `order_writes()`, called before each optimizer step.

        Every other tensor is safe to write right after an update.
        """
        if not self.offloaded:
            return
        stepped = {id(parameter) for parameter in parameters}
        others = {entry.tensor.untyped_storage()._cdata for entry in self._bound if id(entry.whole) not in stepped}
        for plan in self.offloaded:
            plan.defer_copies_until_step(self.live_storages - others)

    def order_writes(self) -> None:
        """Let what is enqueued from now on come after the copies to the host."""
        for plan in self.offloaded:
            plan.order_writes()

    def nonfinite_count(self) -> int:
        return self.nonfinite_elsewhere + sum(plan.nonfinite_count() for plan in self.plans)

    # ---- the update inside a compiled graph, which may hold the tensors elsewhere ----

    def operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what an update changes, and what it reads.

        It changes every shadow storage as a whole [count * storages], and the low planes of those that have some.

        Raises:
            RuntimeError: the compiler may keep a DTensor, a replaced buffer or a shadow in host memory elsewhere than
                its memory here.
        """
        reason = (
            "the shadow is in host memory" if self.offloaded else
            "the model is sharded" if self._parts else
            "a buffer of the model is replaced by every forward" if self._loose else None
        )  # fmt: skip
        if reason is not None:
            raise RuntimeError(f"{reason}: call update() outside the compiled function")
        shadows = [shadow for storage in self._storages for shadow in storage.shadows]
        return [*shadows, *(low for storage in self._storages for low in storage.lows)], self._tensors

    def update_operands(
        self,
        shadows: list[Tensor],
        lives: list[Tensor],
        weights: list[float],
        skip_nonfinite: bool,
        skip: Tensor | None = None,
        device_weights: Tensor | None = None,
    ) -> None:
        """Update `operands()`, or the tensors of the same shapes that a compiled graph has for them.

        Raises:
            RuntimeError: managed tensors overlap, which the graph's tensors cannot show.
        """
        own_shadows, own_lives = self.operands()
        own = [tensor.data_ptr() for tensor in (*own_shadows, *own_lives)]
        if own == [tensor.data_ptr() for tensor in (*shadows, *lives)]:
            self.update(weights, skip_nonfinite, skip, device_weights)
            return
        if any(storage.overlaps for storage in self._storages):
            raise RuntimeError("tensors of the model overlap in memory: call update() outside the compiled function")
        index_of = {id(storage): index for index, storage in enumerate(self._storages)}
        low_index_of = {id(s): index for index, s in enumerate(s for s in self._storages if s.lows)}
        lows_given = shadows[len(self._storages) * self.count :]
        targets: list[list[Tensor]] = []
        lows: list[list[Tensor | None]] = []
        for which, views in enumerate(self._views):
            targets.append(
                [
                    _like(view, shadows[index_of[id(owner)] * self.count + which])
                    for owner, view in zip(self._owners, views, strict=True)
                ]
            )
            lows.append(
                [
                    None if low is None else _like(low, lows_given[low_index_of[id(owner)] * self.count + which])
                    for owner, low in zip(self._owners, self._lows[which], strict=True)
                ]
            )
        copies = [entry.rule == "copy" for entry in self._bound]
        plan = plain_torch.Plan(targets, lives, copies, [], lows)
        plan.update(weights, skip_nonfinite, skip, device_weights)
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
        """Return a number that changes whenever autograd sees a write to a managed tensor."""
        return sum(tensor._version for tensor in self._tensors if not tensor.is_inference())

    def refuse_foreign(self, what: str) -> None:
        """Raise RuntimeError while another EMA's averages are in this model, or this EMA's are in another model."""
        if swap.entered:
            swap.refuse_foreign(what, self.storages, own=self._swap)

    def apply(self, which: int, in_place: bool) -> None:
        """Swap live weights and average `which`. The caller has checked that this is allowed.

        Raises:
            ValueError: in_place, and the contents could not be put back exactly. Nothing is changed.
        """
        self.synchronize()
        self._gathered.drop()
        versioned = self._versioned()
        key = which, in_place, len(versioned)  # FSDP makes its gathered parameters in their first forward
        if key not in self._swaps:
            self._swaps[key] = self._new_swap(which, versioned, in_place)
        chosen = self._swaps[key]
        self._swap, self._which = chosen, which
        if not self._loose:
            chosen.enter()
            return
        self._loose_live = [entry.current() for _, entry in self._loose]
        averages = [self._views[which][index].clone() for index, _ in self._loose]
        chosen.enter()
        self._set_loose(averages)

    def _set_loose(self, tensors: list[Tensor]) -> None:
        for (_, entry), tensor in zip(self._loose, tensors, strict=True):
            entry.put(tensor)

    def _new_swap(self, which: int, versioned: list[Tensor], in_place: bool) -> Swap:
        if in_place and not all(storage.is_direct for storage in self._storages):
            raise ValueError(
                "in_place=True exchanges contents, and live and shadow differ in dtype or device, so that the live "
                "weights could not be put back exactly: use apply_shadow() without it, or give FastEMA the model's own "
                "dtype and device"
            )
        with torch.inference_mode(False), torch.no_grad():
            buffers = sorted((s.swap_buffer(which) for s in self._storages), key=lambda buffer: bool(buffer.parts))
            buffer_of = {buffer.live._cdata: buffer for buffer in buffers}
            entries = [
                SwapEntry(entry.names, place, entry.rule == "copy", buffer_of[place[0]].view_of(entry.tensor))
                for entry, place in ((entry, swap.place_of(entry.tensor)) for entry in self._bound)
            ]
            exchange: contract.StorageExchange | plain_torch.ContentsExchange
            if in_place:
                pairs = [(buffer.live, buffer.storage) for buffer in buffers]
                exchange = plain_torch.ContentsExchange(self.plans, which, versioned, pairs)
            else:
                exchange = swap.exchange_of(buffers, versioned, self._host)
        return Swap(_OWNER, _DROPPED, entries, exchange, buffers)

    def _versioned(self) -> list[Tensor]:
        """Return the tensors that recorded graphs may refer to."""
        if not self._parts:
            return self._tensors
        return [*self._tensors, *(whole for whole, _ in self._parts), *self._gathered.tensors()]

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
            averages = [entry.current() for _, entry in self._loose]
            self._set_loose(self._loose_live)
            try:
                is_unchanged = self._swap.leave(self._is_unchanged, self._weights_now)
            except swap.SwapError:
                self._set_loose(averages)
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

    def averages(self, which: int) -> list[tuple[Managed, Tensor]]:
        """Return every managed tensor with its average.

        The averages share memory with the EMA. Copies, right then and after, are those that are in the model right now,
        and float32 ones of bfloat16 tensors, which are kept in two planes.
        """
        in_model = self.is_applied and which == self._which
        result = []
        for entry, view, low, is_direct in self._stored(which):
            if low is not None:
                view = planes.join(view, low)
            elif in_model and is_direct:
                view = view.clone()
            result.append((entry, dtensor.as_dtensor_like(entry.whole, view.detach())))
        return result

    def weights(self, which: int) -> list[tuple[Managed, Tensor]]:
        """Return every managed tensor with its average as a swap puts it into the model, rounded to bfloat16 if it is.

        They share memory with the EMA, or with the model while they are in it.
        """
        return [
            (entry, dtensor.as_dtensor_like(entry.whole, view.detach())) for entry, view, _, _ in self._stored(which)
        ]

    def places(self, which: int) -> list[tuple[Managed, Tensor | Planes]]:
        """Return every managed tensor with where its average is kept."""
        return [
            (entry, Planes(entry.whole, view.detach(), low))
            if low is not None
            else (entry, dtensor.as_dtensor_like(entry.whole, view.detach()))
            for entry, view, low, _ in self._stored(which)
        ]

    def _stored(self, which: int) -> Iterator[tuple[Managed, Tensor, Tensor | None, bool]]:
        """Yield every managed tensor, its average or the high plane of it, wherever it is now, the low plane, and
        whether it changes places with the model's."""
        self.synchronize()
        in_model = self.is_applied and which == self._which
        owners = iter(self._owners)
        for entry, view, low in zip(self.managed, self._views[which], self._lows[which], strict=True):
            owner = None if entry.loose else next(owners)
            if owner is None or not owner.is_direct:
                yield entry, view, low, False
            else:
                yield entry, owner.in_model(view) if in_model else view, low, True

    def live_values(self) -> dict[str, Tensor]:
        """Return the live values by name, while the averages are in the model."""
        assert self._swap is not None
        loose = zip(self._loose, self._loose_live, strict=True)
        return {
            **self._swap.live_values(),
            **{name: live for (_, entry), live in loose for name in entry.names},
        }


@dataclass(frozen=True)
class Planes:
    """A float32 average that is kept in two planes; of a DTensor, the part in this process."""

    whole: Tensor  # the live tensor
    high: Tensor
    low: Tensor

    def shown(self) -> Tensor:
        """Return a tensor of the average's dtype and shape, and without its values or memory."""
        like = self.low.new_empty((), dtype=torch.float32).expand(self.low.shape)
        return dtensor.as_dtensor_like(self.whole, like)

    def value(self) -> Tensor:
        """Return the average, a copy."""
        return dtensor.as_dtensor_like(self.whole, planes.join(self.high, self.low))


def _like(view: Tensor, flat: Tensor) -> Tensor:
    """Return the place in `flat` that `view` has in its storage."""
    return flat.view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset())


def _refuse_two_storages_over_one_memory(entries: list[Managed]) -> None:
    """Raise ValueError where two storages share memory. `entries`: one tensor of each storage."""
    spans = []
    for entry in entries:
        storage = entry.tensor.untyped_storage()
        if storage.nbytes() == 0:
            continue
        if storage.data_ptr() == 0:
            raise ValueError(f"{entry.name!r} has no memory: its storage was freed, or it is a fake tensor")
        spans.append((str(storage.device), storage.data_ptr(), storage.data_ptr() + storage.nbytes(), entry.name))
    spans.sort()
    for (device, _, end, name), (next_device, begin, _, next_name) in pairwise(spans):
        if device == next_device and begin < end:
            raise ValueError(
                f"{name!r} and {next_name!r} are different storages over the same memory, which an exchange of "
                "pointers cannot follow: clone() one of them, or make one a view of the other"
            )

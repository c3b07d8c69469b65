"""The shadow of a whole model: its mirrors, the plan of an update, and the exchange with the live weights.

It mirrors storages rather than tensors, so that tied weights are averaged once, flat RNN weights stay flat and every
view of a weight follows when pointers change places. Where the managed tensors cover only a part of a storage, only
that part is averaged, and the rest is carried along, unchanged, by an exchange.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastema import backends, claims, offload, sharded
from fastema.backends import torch as plain_torch
from fastema.mirror import Mirror, StandIn, flat
from fastema.policy import Managed


class Shadow:
    """`count` shadows of the managed tensors.

    Args:
        managed: what is averaged or copied, each tensor once.
        count: how many: one for each decay.
        dtype, device: the shadows'; None: see `mirror.shadow_dtype`, and where the live tensor is.
        backend: "auto" or the name of one.
        modules: the modules whose slots are watched for replaced tensors.

    Raises:
        ValueError: a tensor whose storage cannot be mirrored; names it.
    """

    claim = (
        "another FastEMA is applied to the same model: the live weights are its average now; restore() that one first"
    )

    def __init__(
        self,
        managed: list[Managed],
        count: int,
        dtype: torch.dtype | None,
        device: torch.device | None,
        backend: str,
        modules: Sequence[nn.Module],
    ) -> None:
        self.managed = managed
        self.count = count
        self._tensors = [entry.tensor for entry in managed]
        self._host = backends.host(backend)
        # Under inference_mode the shadow would become inference tensors, which nothing may ever update again.
        with torch.inference_mode(False), torch.no_grad():
            self._build(dtype, device, backend)
        dicts = [slots for module in modules for slots in (module._parameters, module._buffers, module._modules)]
        self._gathered = sharded.GatheredParameters(modules)
        with self._gathered.set_aside():
            self._watch = self._host.Watch(dicts, self._tensors)
        self._parts: list[tuple[Any, Tensor]] = [
            (entry.whole, entry.tensor) for entry in managed if entry.tensor is not entry.whole
        ]
        self._exchange: Any = None  # the one that is entered, or was last
        self._which = 0  # the shadow it exchanges
        self._by_pointer: dict[tuple[int, int], tuple[Any, list[StandIn]]] = {}  # built at the first use of a shadow
        self.kept_elsewhere = 0  # elements that the guard kept: updates of stand-ins, and earlier plans

    # ---- building ----

    def _build(self, dtype: torch.dtype | None, device: torch.device | None, backend: str) -> None:
        groups: dict[int, list[Managed]] = {}
        for entry in self.managed:
            groups.setdefault(entry.tensor.untyped_storage()._cdata, []).append(entry)
        _refuse_two_storages_over_one_memory([entries[0] for entries in groups.values()])
        self.live_storages = frozenset(groups)
        self.refuse_foreign("building a FastEMA")  # it would start from the other's average
        mirrors = {key: Mirror(entries, dtype, device, self.count) for key, entries in groups.items()}
        self._mirrors = list(mirrors.values())
        owners = [mirrors[entry.tensor.untyped_storage()._cdata] for entry in self.managed]
        self._views = [
            [mirror.view_of(entry.tensor, which) for mirror, entry in zip(owners, self.managed, strict=True)]
            for which in range(self.count)
        ]
        self._is_direct = [mirror.is_direct for mirror in owners]
        index_of = {id(mirror): index for index, mirror in enumerate(self._mirrors)}
        self._owner_indices = [index_of[id(mirror)] for mirror in owners]
        self.is_on_cpu = all(mirror.live.device.type == mirror.device.type == "cpu" for mirror in self._mirrors)
        self._plan(backend)
        for mirror in self._mirrors:
            for shadows in mirror.shadows:
                for shadow, live in zip(shadows, mirror.lives, strict=True):
                    shadow.copy_(live)

    def _plan(self, backend: str) -> None:
        """One plan per device: a mix of dtypes and rules is no reason for a second."""
        places: dict[tuple[torch.device, bool], list[Mirror]] = {}
        for mirror in self._mirrors:
            device = mirror.live.device
            places.setdefault((device, device == mirror.device), []).append(mirror)
        self.plans: list[Any] = []
        self._plan_devices = [device for device, _ in places]  # of the live weights
        self.offloaded: list[offload.OffloadedPlan] = []  # those of `plans` that run in a thread
        names: list[str] = []
        for (device, same_device), mirrors in places.items():
            shadows = [
                [shadow for mirror in mirrors for shadow in mirror.shadows[which]] for which in range(self.count)
            ]
            lives = [live for mirror in mirrors for live in mirror.lives]
            copies = [run.copy for mirror in mirrors for run in mirror.runs]
            views = [] if self.plans else [view for shadow_views in self._views for view in shadow_views]
            transfer = offload.transfer_between(device, mirrors[0].device)
            if transfer is not None:
                module = self._host
                self.offloaded.append(offload.OffloadedPlan(transfer, module.Plan, shadows, lives, copies, views))
                self.plans.append(self.offloaded[-1])
            else:
                module = backends.select(backend if same_device else "torch", device)  # only torch crosses devices
                self.plans.append(module.Plan(shadows, lives, copies, views))
            names.append(module.NAME)
        self.backend_name = "+".join(dict.fromkeys(names))

    @property
    def is_sharded(self) -> bool:
        """Whether some tensors are DTensors."""
        return bool(self._parts)

    # ---- every step ----

    def is_current(self) -> bool:
        """Whether the model still holds the same tensors with the same memory."""
        if self._watch.holds():
            return not self._parts or all(whole._local_tensor is part for whole, part in self._parts)
        if not self._gathered:
            return False
        with self._gathered.set_aside():
            return self._watch.holds() and all(whole._local_tensor is part for whole, part in self._parts)

    def update(
        self, weights: list[float], guard: bool, skip: Tensor | None = None, device_weights: Tensor | None = None
    ) -> None:
        """shadow <- shadow + weight * (live - shadow), or a copy, for everything. Arguments: see csrc/plan.h.

        Raises:
            RuntimeError: an earlier average failed in its thread; nothing is averaged.
        """
        self.synchronize()
        skips = backends.skips_on(self._plan_devices, skip)
        for plan, own_skip in zip(self.plans, skips, strict=True):
            plan.update(weights, guard, own_skip, device_weights)

    def synchronize(self) -> None:
        """Waits for averages that run in a thread; their errors come out here."""
        for plan in self.offloaded:
            plan.synchronize()

    def leave_to_steps(self, parameters: Iterable[Tensor]) -> None:
        """Who steps `parameters` calls `order_writes()` before each step; every other tensor is safe after an update.

        So a copy to the host may last through the next forward and backward. Without an offloaded plan, nothing to do.
        """
        if not self.offloaded:
            return
        stepped = {id(parameter) for parameter in parameters}
        others = {entry.tensor.untyped_storage()._cdata for entry in self.managed if id(entry.whole) not in stepped}
        for plan in self.offloaded:
            plan.leave_to_steps(self.live_storages - others)

    def order_writes(self) -> None:
        """What is enqueued from now on comes after the copies to the host."""
        for plan in self.offloaded:
            plan.order_writes()

    def nonfinite_count(self) -> int:
        return self.kept_elsewhere + sum(plan.nonfinite_count() for plan in self.plans)

    # ---- the same in a compiled graph, which may keep the tensors elsewhere for now ----

    def operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """What an update changes, every shadow storage as a whole: [count * storages]; and the tensors it reads.

        Raises:
            RuntimeError: the model is sharded: the compiler may keep a DTensor elsewhere, and its local tensor not; or
                a thread averages, which the compiler's own copies of the shadow would not wait for.
        """
        if self.offloaded:
            raise RuntimeError("the shadow is in host memory: call update() outside the compiled function")
        if self._parts:
            raise RuntimeError("the model is sharded: call update() outside the compiled function")
        return [flat for mirror in self._mirrors for flat in mirror.whole_shadows], self._tensors

    def update_operands(
        self,
        shadows: list[Tensor],
        lives: list[Tensor],
        weights: list[float],
        guard: bool,
        skip: Tensor | None = None,
        device_weights: Tensor | None = None,
    ) -> None:
        """`update()` on `operands()` or on stand-ins for them, of the same shapes.

        Raises:
            RuntimeError: managed tensors overlap, which stand-ins cannot show.
        """
        own_shadows, own_lives = self.operands()
        own = [tensor.data_ptr() for tensor in (*own_shadows, *own_lives)]
        if own == [tensor.data_ptr() for tensor in (*shadows, *lives)]:
            self.update(weights, guard, skip, device_weights)
            return
        if any(mirror.overlaps for mirror in self._mirrors):
            raise RuntimeError("tensors of the model overlap in memory: call update() outside the compiled function")
        targets: list[list[Tensor]] = []
        for which, views in enumerate(self._views):
            storages = [shadows[index * self.count + which] for index in range(len(self._mirrors))]
            targets.append(
                [
                    storages[owner].view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset())
                    for owner, view in zip(self._owner_indices, views, strict=True)
                ]
            )
        copies = [entry.rule == "copy" for entry in self.managed]
        plan = plain_torch.Plan(targets, lives, copies, [])
        plan.update(weights, guard, skip, device_weights)
        self.kept_elsewhere += plan.nonfinite_count()

    # ---- the exchange ----

    @property
    def is_applied(self) -> bool:
        return self._exchange is not None and self._exchange.entered

    def refuse_foreign(self, what: str) -> None:
        """Raises RuntimeError while somebody else's averages stand in the same model."""
        if claims.owners:
            claims.refuse_foreign(what, self.live_storages, own=self)

    def apply(self, which: int, in_place: bool) -> None:
        """Live and shadow `which` change places. The caller has checked that they may.

        Raises:
            ValueError: in_place, and the contents could not be put back exactly. Nothing is changed.
        """
        self.synchronize()
        self._gathered.drop()
        prepared = None if in_place or self._parts else self._by_pointer.get((which, len(self._tensors)))
        if prepared is not None and _is_bare(*prepared):
            self._enter(which, *prepared)
            return
        with torch.inference_mode(False), torch.no_grad():
            self._enter(which, *(self._in_place_exchange(which) if in_place else self._pointer_exchange(which)))

    def _enter(self, which: int, exchange: Any, stand_ins: list[StandIn]) -> None:
        try:
            for stand_in in stand_ins:
                stand_in.fill()
            self._exchange, self._which, self._filled = exchange, which, stand_ins
            claims.owners.add(self)
            exchange.enter(next(claims.version_steps))
        except BaseException:
            if not exchange.entered:  # memory for some of the scratch storages is none for the training
                for stand_in in stand_ins:
                    stand_in.free()
            raise

    def _in_place_exchange(self, which: int) -> tuple[Any, list[StandIn]]:
        if not all(mirror.is_direct for mirror in self._mirrors):
            raise ValueError(
                "in_place=True exchanges contents, and live and shadow differ in dtype or device, so that the live "
                "weights could not be put back exactly: use apply_shadow() without it, or give FastEMA the model's own "
                "dtype and device"
            )
        return plain_torch.ContentsExchange(self.plans, which, self._versioned()), []

    def _pointer_exchange(self, which: int) -> tuple[Any, list[StandIn]]:
        versioned = self._versioned()
        key = which, len(versioned)
        if key not in self._by_pointer:
            stand_ins = [mirror.stand_in(which) for mirror in self._mirrors]
            lives = [flat(mirror.live, 0, mirror.live.nbytes()) for mirror in self._mirrors]
            others = [flat(stand_in.storage, 0, stand_in.storage.nbytes()) for stand_in in stand_ins]
            exchange = self._host.StorageExchange(lives, others, versioned)
            self._by_pointer[key] = exchange, [stand_in for stand_in in stand_ins if stand_in.needs_filling]
        return self._by_pointer[key]

    def _versioned(self) -> list[Tensor]:
        """What graphs may refer to. FSDP makes its gathered parameters in their first forward."""
        if not self._parts:
            return self._tensors
        return [*self._tensors, *(whole for whole, _ in self._parts), *self._gathered.tensors()]

    def restore(self) -> None:
        """They change back.

        Raises:
            RuntimeError: copies of sharded averages stay in the model, out of reach; the exchange itself is done.
        """
        try:
            self._gathered.drop()  # before the exchange: after it, an interrupt could leave them behind
        finally:
            if _is_bare(self._exchange, self._filled):
                self._leave()
            else:
                with torch.inference_mode(False), torch.no_grad():
                    self._leave()
        if self._parts and not self.is_current():
            raise RuntimeError(
                "restored, but the model's parameters were replaced meanwhile, or are gathered by an FSDP module that "
                "FastEMA was not given: call reshard() on that one, else its next forward uses averaged weights"
            )

    def _leave(self) -> None:
        for stand_in in self._filled:
            stand_in.carry_rest()
        self._exchange.leave()
        claims.owners.discard(self)
        for stand_in in self._filled:
            stand_in.free()

    def __del__(self) -> None:
        # Nothing is exchanged back: who keeps the model and drops the EMA may mean just that, and weights that change
        # whenever the garbage collector comes are worse than a warning.
        exchange = getattr(self, "_exchange", None)
        if exchange is not None and exchange.entered and not sys.is_finalizing():
            warnings.warn(
                "a FastEMA was dropped while its weights were applied: the model keeps the averaged ones, and those it "
                "trained are gone. Call restore() first; or copy_to(), if that is what you want",
                RuntimeWarning,
                stacklevel=2,
            )

    # ---- the average, by tensor ----

    def averages(self, which: int) -> list[tuple[Managed, Tensor]]:
        """Every managed tensor with its average, wherever that is now; the tensors share memory with the EMA."""
        self.synchronize()
        in_model = self.is_applied and which == self._which
        return [
            (entry, sharded.described_as(entry.whole, (entry.tensor if in_model and direct else view).detach()))
            for entry, view, direct in zip(self.managed, self._views[which], self._is_direct, strict=True)
        ]


def _is_bare(exchange: Any, stand_ins: list[StandIn]) -> bool:
    """Whether pointers change places in C++ and that is all: no operation of torch runs, so its modes do not matter.

    To enter and leave them would take a third of the time of an exchange.
    """
    return not stand_ins and not isinstance(exchange, plain_torch.ContentsExchange)


def _refuse_two_storages_over_one_memory(entries: list[Managed]) -> None:
    """`entries`: one tensor of each storage."""
    spans = []
    for entry in entries:
        storage = entry.tensor.untyped_storage()
        if storage.nbytes() == 0:
            continue
        if storage.data_ptr() == 0:
            raise ValueError(f"{entry.name!r} has no memory behind it: its storage was freed, or it is a fake tensor")
        spans.append((str(storage.device), storage.data_ptr(), storage.data_ptr() + storage.nbytes(), entry.name))
    spans.sort()
    for (device, _, end, name), (next_device, begin, _, next_name) in pairwise(spans):
        if device == next_device and begin < end:
            raise ValueError(
                f"{name!r} and {next_name!r} are different storages over the same memory, which an exchange of "
                "pointers cannot follow: clone() one of them, or make one a view of the other"
            )

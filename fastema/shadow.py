"""The shadow of a whole model: its mirrors, the plan of an update, and the exchange with the live weights.

It mirrors storages rather than tensors, so that tied weights are averaged once, flat RNN weights stay flat and every
view of a weight follows when pointers change places. Where the managed tensors cover only a part of a storage, only
that part is averaged, and the rest is carried along, unchanged, by an exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastema import backends, claims
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
        self._watch = self._host.Watch(dicts, self._tensors)
        self._exchange: Any = None  # the one that is entered, or was last
        self._which = 0  # the shadow it exchanges
        self._by_pointer: dict[int, tuple[Any, list[StandIn]]] = {}  # built at the first use of a shadow
        self._kept_elsewhere = 0  # by updates of stand-ins

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
        names: list[str] = []
        for (device, same_device), mirrors in places.items():
            module = backends.select(backend if same_device else "torch", device.type)  # only torch crosses devices
            shadows = [
                [shadow for mirror in mirrors for shadow in mirror.shadows[which]] for which in range(self.count)
            ]
            lives = [live for mirror in mirrors for live in mirror.lives]
            copies = [run.copy for mirror in mirrors for run in mirror.runs]
            views = [] if self.plans else [view for shadow_views in self._views for view in shadow_views]
            self.plans.append(module.Plan(shadows, lives, copies, views))
            names.append(module.NAME)
        self.backend_name = "+".join(dict.fromkeys(names))

    # ---- every step ----

    def is_current(self) -> bool:
        """Whether the model still holds the same tensors with the same memory."""
        return self._watch.holds()

    def update(
        self, weights: list[float], guard: bool, skip: Tensor | None = None, device_weights: Tensor | None = None
    ) -> None:
        """shadow <- shadow + weight * (live - shadow), or a copy, for everything. Arguments: see csrc/plan.h."""
        for plan in self.plans:
            plan.update(weights, guard, skip, device_weights)

    def nonfinite_count(self) -> int:
        return self._kept_elsewhere + sum(plan.nonfinite_count() for plan in self.plans)

    # ---- the same in a compiled graph, which may keep the tensors elsewhere for now ----

    def operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """What an update changes, every shadow storage as a whole: [count * storages]; and the tensors it reads."""
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
        self._kept_elsewhere += plan.nonfinite_count()

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
        with torch.inference_mode(False), torch.no_grad():
            exchange, stand_ins = self._in_place_exchange(which) if in_place else self._pointer_exchange(which)
            for stand_in in stand_ins:
                stand_in.fill()
        self._exchange, self._which, self._filled = exchange, which, stand_ins
        claims.owners.add(self)
        exchange.enter(next(claims.version_steps))

    def _in_place_exchange(self, which: int) -> tuple[Any, list[StandIn]]:
        if not all(mirror.is_direct for mirror in self._mirrors):
            raise ValueError(
                "in_place=True exchanges contents, and live and shadow differ in dtype or device, so that the live "
                "weights could not be put back exactly: use apply_shadow() without it, or give FastEMA the model's own "
                "dtype and device"
            )
        return plain_torch.ContentsExchange(self.plans, which, self._tensors), []

    def _pointer_exchange(self, which: int) -> tuple[Any, list[StandIn]]:
        if which not in self._by_pointer:
            stand_ins = [mirror.stand_in(which) for mirror in self._mirrors]
            lives = [flat(mirror.live, 0, mirror.live.nbytes()) for mirror in self._mirrors]
            others = [flat(stand_in.storage, 0, stand_in.storage.nbytes()) for stand_in in stand_ins]
            exchange = self._host.StorageExchange(lives, others, self._tensors)
            self._by_pointer[which] = exchange, [stand_in for stand_in in stand_ins if stand_in.needs_filling]
        return self._by_pointer[which]

    def restore(self) -> None:
        """They change back."""
        with torch.inference_mode(False), torch.no_grad():
            for stand_in in self._filled:
                stand_in.carry_rest()
            self._exchange.leave()
            claims.owners.discard(self)
            for stand_in in self._filled:
                stand_in.free()

    # ---- the average, by tensor ----

    def averages(self, which: int) -> list[tuple[Managed, Tensor]]:
        """Every managed tensor with its average, wherever that is now; the tensors share memory with the EMA."""
        in_model = self.is_applied and which == self._which
        return [
            (entry, (entry.tensor if in_model and direct else view).detach())
            for entry, view, direct in zip(self.managed, self._views[which], self._is_direct, strict=True)
        ]


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

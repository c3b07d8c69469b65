"""The shadow: for every live storage one storage of the same layout, and the exchange between the two.

Storages rather than tensors, so that tied weights are averaged once, flat RNN weights stay flat and every view of a
weight follows when pointers change places. Where the managed tensors cover only a part of a storage, only that part
is averaged, and the rest is carried along, unchanged, by an exchange.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastema import backends
from fastema.backends.torch import ContentsExchange
from fastema.policy import Managed
from fastema.regions import Run, element_runs, gaps, merged, without

_UNIT = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
_COMPLEX = {torch.float64: torch.complex128}
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}
#: Further than training ever counts: no graph recorded while applied fits the versions outside, or the other way round.
_VERSION_STEP = 1 << 30

#: The shadows that stand in their models right now: two FastEMA of one model must not mix their weights.
_applied: weakref.WeakSet[Shadow] = weakref.WeakSet()


def shadow_dtype(live: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the average of a `live` tensor: `wanted`, else float32 for 16-bit weights, else the same."""
    if wanted is None:
        return _WIDER.get(live, live)
    return _COMPLEX.get(wanted, torch.complex64) if live.is_complex else wanted


def _unit(dtype: torch.dtype) -> torch.dtype:
    """What a kernel sees: complex numbers are pairs."""
    return _UNIT.get(dtype, dtype)


def _flat(storage: torch.UntypedStorage, begin: int, end: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Bytes [begin, end) of `storage` as a 1-D tensor."""
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    return tensor.set_(storage, begin // dtype.itemsize, ((end - begin) // dtype.itemsize,), (1,))


def _allocate(nbytes: int, device: torch.device) -> torch.UntypedStorage:
    return torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()


class Mirror:
    """A live storage, its shadow, and the runs of both that an update reads and writes."""

    def __init__(self, entries: list[Managed], wanted: torch.dtype | None, device: torch.device | None) -> None:
        self.live = entries[0].tensor.untyped_storage()
        self.shadow_unit = _common_shadow_unit(entries, wanted)  # None: every run keeps its dtype
        self._live_itemsize = _unit(entries[0].tensor.dtype).itemsize
        device = device or self.live.device
        self.runs = _runs_of(entries, keep_bytes=self.shadow_unit is None)
        self.shadow = _allocate(self._scaled(self.live.nbytes()), device)
        self.is_direct = self.shadow_unit is None and device == self.live.device
        self.lives = [_flat(self.live, run.begin, run.end, run.dtype) for run in self.runs]
        self.shadows = [
            _flat(self.shadow, self._scaled(run.begin), self._scaled(run.end), self.shadow_unit or run.dtype)
            for run in self.runs
        ]
        self._rest = gaps(self.runs, self.live.nbytes())
        self._scratch: torch.UntypedStorage | None = None

    def _scaled(self, live_bytes: int) -> int:
        """Where a byte of the live storage is in the shadow."""
        if self.shadow_unit is None:
            return live_bytes
        return live_bytes // self._live_itemsize * self.shadow_unit.itemsize

    def view_of(self, tensor: Tensor) -> Tensor:
        """The shadow of a live tensor: the same place, shape and strides."""
        dtype = tensor.dtype
        if self.shadow_unit is not None:
            dtype = shadow_dtype(dtype, self.shadow_unit)
        empty = torch.empty(0, dtype=dtype, device=self.shadow.device)
        return empty.set_(self.shadow, tensor.storage_offset(), tensor.shape, tensor.stride())

    @property
    def has_to_fill(self) -> bool:
        """Whether an exchange needs more than the pointers: scratch memory, or bytes that nothing manages."""
        return bool(self._rest) or not self.is_direct

    def stand_in(self) -> Tensor:
        """What takes the live storage's place: the shadow itself, or scratch memory for it in the live dtype."""
        if self.is_direct:
            storage = self.shadow
        else:
            if self._scratch is None:
                self._scratch = _allocate(self.live.nbytes(), self.live.device)
            storage = self._scratch
        self._rest_views = [(_flat(storage, *gap), _flat(self.live, *gap)) for gap in self._rest]
        self._scratch_views = [
            (_flat(storage, run.begin, run.end, run.dtype), shadow)
            for run, shadow in zip([] if self.is_direct else self.runs, self.shadows, strict=False)
        ]
        return _flat(storage, 0, storage.nbytes())

    def fill_stand_in(self) -> None:
        """Casts the average into the scratch memory, and carries along what nothing manages."""
        if self._scratch is not None:
            self._scratch.resize_(self.live.nbytes())
        for scratch, shadow in self._scratch_views:
            scratch.copy_(shadow)
        self.carry_rest()

    def carry_rest(self) -> None:
        """Before either exchange: what takes the live storage's place gets the bytes that nothing manages."""
        for other, live in self._rest_views:
            other.copy_(live)

    def free_scratch(self) -> None:
        if self._scratch is not None:
            self._scratch.resize_(0)


def _common_shadow_unit(entries: list[Managed], wanted: torch.dtype | None) -> torch.dtype | None:
    """The dtype of a shadow that is not of the live dtype, or None. One storage widens as a whole or not at all."""
    units = {_unit(entry.tensor.dtype) for entry in entries}
    averaged = [entry.tensor.dtype for entry in entries if entry.rule == "average"]
    widened = {_unit(shadow_dtype(dtype, wanted)) for dtype in averaged if shadow_dtype(dtype, wanted) != dtype}
    if not widened:
        return None
    if len(units) > 1:
        names = ", ".join(repr(entry.name) for entry in entries[:3])
        raise ValueError(
            f"{names} share one storage with different dtypes ({', '.join(sorted(map(str, units)))}), so their shadow "
            "cannot have another dtype than they have: clone() them apart"
        )
    return widened.pop()


def _runs_of(entries: list[Managed], keep_bytes: bool) -> list[Run]:
    """The disjoint runs of one storage; where tensors of both rules overlap, averaging wins."""
    averaged: list[Run] = []
    copied: list[Run] = []
    for entry in entries:
        copy = entry.rule == "copy"
        itemsize = entry.tensor.dtype.itemsize
        unit = torch.uint8 if copy and keep_bytes else _unit(entry.tensor.dtype)
        try:
            runs = element_runs(entry.tensor)
        except ValueError as error:
            raise ValueError(f"{entry.name!r} {error}. A policy that returns 'skip' for it leaves it alone.") from None
        (copied if copy else averaged).extend(Run(begin * itemsize, end * itemsize, unit, copy) for begin, end in runs)
    try:
        average = merged(averaged)
        return average + without(merged(copied), average)
    except ValueError as error:
        raise ValueError(f"{entries[0].name!r} {error}") from None


class Shadow:
    """All mirrors of a model, the plan of an update, and the exchange.

    Args:
        managed: what is averaged or copied, each tensor once.
        dtype, device: the shadow's; None: see `shadow_dtype`, and where the live tensor is.
        backend: "auto" or the name of one.
        modules: the modules whose slots are watched for replaced tensors.

    Raises:
        ValueError: a tensor whose storage cannot be mirrored; names it.
    """

    def __init__(
        self,
        managed: list[Managed],
        dtype: torch.dtype | None,
        device: torch.device | None,
        backend: str,
        modules: Sequence[nn.Module],
    ) -> None:
        self.managed = managed
        self._tensors = [entry.tensor for entry in managed]
        self._host = backends.host(backend)
        # Under inference_mode the shadow would become inference tensors, which nothing may ever update again.
        with torch.inference_mode(False), torch.no_grad():
            self._build(dtype, device, backend)
        dicts = [slots for module in modules for slots in (module._parameters, module._buffers, module._modules)]
        self._watch = self._host.Watch(dicts, self._tensors)
        self._exchange: Any = None  # the one that is entered, or was last
        self._pointer_exchange: Any = None
        self._exchange_count = 0

    # ---- building ----

    def _build(self, dtype: torch.dtype | None, device: torch.device | None, backend: str) -> None:
        groups: dict[int, list[Managed]] = {}
        for entry in self.managed:
            groups.setdefault(entry.tensor.untyped_storage()._cdata, []).append(entry)
        _refuse_two_storages_over_one_memory([entries[0] for entries in groups.values()])
        mirrors = {key: Mirror(entries, dtype, device) for key, entries in groups.items()}
        self._mirrors = list(mirrors.values())
        self._live_storages = frozenset(mirrors)
        owners = [mirrors[entry.tensor.untyped_storage()._cdata] for entry in self.managed]
        self._views = [mirror.view_of(entry.tensor) for mirror, entry in zip(owners, self.managed, strict=True)]
        self._is_direct = [mirror.is_direct for mirror in owners]
        self.is_on_cpu = all(mirror.live.device.type == mirror.shadow.device.type == "cpu" for mirror in self._mirrors)
        self._plan(backend)
        for mirror in self._mirrors:
            for shadow, live in zip(mirror.shadows, mirror.lives, strict=True):
                shadow.copy_(live)

    def _plan(self, backend: str) -> None:
        """One plan per device: a mix of dtypes and rules is no reason for a second."""
        places: dict[tuple[torch.device, bool], list[Mirror]] = {}
        for mirror in self._mirrors:
            device = mirror.live.device
            places.setdefault((device, device == mirror.shadow.device), []).append(mirror)
        self.plans: list[Any] = []
        names: list[str] = []
        for (device, same_device), mirrors in places.items():
            module = backends.select(backend if same_device else "torch", device.type)  # only torch crosses devices
            shadows = [shadow for mirror in mirrors for shadow in mirror.shadows]
            lives = [live for mirror in mirrors for live in mirror.lives]
            copies = [run.copy for mirror in mirrors for run in mirror.runs]
            self.plans.append(module.Plan(shadows, lives, copies, [] if self.plans else self._views))
            names.append(module.NAME)
        self.backend_name = "+".join(dict.fromkeys(names))

    # ---- every step ----

    def is_current(self) -> bool:
        """Whether the model still holds the same tensors with the same memory."""
        return self._watch.holds()

    def update(self, weight: float, guard: bool, found_inf: Tensor | None) -> None:
        """shadow <- shadow + weight * (live - shadow), or a copy, for everything."""
        for plan in self.plans:
            plan.update(weight, guard, found_inf)

    def nonfinite_count(self) -> int:
        return sum(plan.nonfinite_count() for plan in self.plans)

    # ---- the exchange ----

    @property
    def is_applied(self) -> bool:
        return self._exchange is not None and self._exchange.entered

    def refuse_foreign(self, what: str) -> None:
        """Raises RuntimeError while another FastEMA stands in the same model."""
        for other in _applied:
            if other is not self and other.is_applied and other._live_storages & self._live_storages:
                raise RuntimeError(
                    f"{what} while another FastEMA is applied to the same model: the live weights are its average now; "
                    "restore() that one first"
                )

    def apply(self, in_place: bool) -> None:
        """Live and shadow change places. The caller has checked that they may.

        Raises:
            ValueError: in_place, and the contents could not be put back exactly. Nothing is changed.
        """
        if in_place:
            if not all(mirror.is_direct for mirror in self._mirrors):
                raise ValueError(
                    "in_place=True exchanges contents, and live and shadow differ in dtype or device, so that the live "
                    "weights could not be put back exactly: use apply_shadow() without it, or give FastEMA the model's "
                    "own dtype and device"
                )
            self._exchange = ContentsExchange(self.plans, self._tensors)
        else:
            with torch.inference_mode(False), torch.no_grad():
                if self._pointer_exchange is None:
                    others = [mirror.stand_in() for mirror in self._mirrors]
                    lives = [_flat(mirror.live, 0, mirror.live.nbytes()) for mirror in self._mirrors]
                    self._pointer_exchange = self._host.StorageExchange(lives, others, self._tensors)
                    self._to_fill = [mirror for mirror in self._mirrors if mirror.has_to_fill]
                for mirror in self._to_fill:
                    mirror.fill_stand_in()
            self._exchange = self._pointer_exchange
        _applied.add(self)
        self._exchange_count += 1
        self._exchange.enter(_VERSION_STEP + self._exchange_count)

    def restore(self) -> None:
        """They change back."""
        by_pointer = self._exchange is self._pointer_exchange
        with torch.inference_mode(False), torch.no_grad():
            if by_pointer:
                for mirror in self._to_fill:
                    mirror.carry_rest()
            self._exchange.leave()
            _applied.discard(self)
            if by_pointer:
                for mirror in self._to_fill:
                    mirror.free_scratch()

    # ---- the average, by tensor ----

    def averages(self) -> list[tuple[Managed, Tensor]]:
        """Every managed tensor with its average, wherever that is now; the tensors share memory with the EMA."""
        applied = self.is_applied
        return [
            (entry, (entry.tensor if applied and direct else view).detach())
            for entry, view, direct in zip(self.managed, self._views, self._is_direct, strict=True)
        ]

    def averaged_by_name(self) -> dict[str, tuple[Managed, Tensor]]:
        """What is averaged, not only copied, under each of its names."""
        return {
            name: (entry, view) for entry, view in self.averages() if entry.rule == "average" for name in entry.names
        }


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

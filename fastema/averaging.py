"""What is under `fastema.swa_utils`: the tensors of an averaged module and of the live model, paired by position.

A `Bond` is built once for two modules and used at every update: one plan over all pairs, and a watch that tells when
tensors were replaced or moved. The averaged module is the shadow itself, so that a rebuilt bond has nothing to carry
over. Where a pair is not two equal stretches of memory, torch's own operation takes its place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastema import backends, claims
from fastema.backends import torch as plain_torch
from fastema.mirror import StandIn, flat
from fastema.policy import AVERAGED_DTYPES
from fastema.regions import Run, element_runs, gaps, merged

_PLAIN_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_WALKS = ("parameters", "named_parameters", "buffers", "named_buffers", "named_modules", "_named_members")


class Irregular(Exception):
    """These two modules are torch's business: its own code gives the result, or the error."""


@dataclass(frozen=True)
class Pair:
    """A tensor of the averaged module and the live one in the same position."""

    averaged: Tensor
    live: Tensor
    copy: bool  # at every update, rather than averaged

    @property
    def is_regular(self) -> bool:
        tensors = (self.averaged, self.live)
        return self.averaged.shape == self.live.shape and not any(_why_no_storage(tensor) for tensor in tensors)


def _why_no_storage(tensor: Tensor) -> str | None:
    """Why `tensor` is not a view of memory of its own; None: it is."""
    if nn.parameter.is_lazy(tensor):
        return "is not initialised yet"
    if is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__}, a wrapper without storage of its own"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"has layout {tensor.layout}, or is quantised"
    if tensor.device.type == "meta" or (tensor.numel() and tensor.untyped_storage().nbytes() == 0):
        return "has no memory behind it"
    return None


def _has_no_average(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def pairs_of(averaged: nn.Module, model: nn.Module, use_buffers: bool) -> tuple[list[Pair], tuple[int, int]]:
    """The pairs of an AveragedModel and a live model, as torch pairs them: what is left over on a side stays alone.

    Returns:
        The pairs, and how many tensors the two sides have.

    Raises:
        Irregular: torch would stop half-way.
    """
    module: nn.Module = averaged.module  # type: ignore[assignment]
    buffers, live_buffers = list(module.buffers()), list(model.buffers())
    if use_buffers:
        ours, theirs = [*module.parameters(), *buffers], [*model.parameters(), *live_buffers]
        copied = []
    else:
        ours, theirs = list(averaged.parameters()), list(model.parameters())
        if len(buffers) != len(live_buffers):
            raise Irregular
        copied = [Pair(a, b, copy=True) for a, b in zip(buffers, live_buffers, strict=True)]
    pairs = [Pair(a, b, copy=_has_no_average(a)) for a, b in zip(ours, theirs, strict=False)]
    return pairs + copied, (len(ours) + len(copied), len(theirs) + len(copied))


class Bond:
    """An AveragedModel and a live model, for as long as both hold the same tensors in the same memory.

    Args:
        averaged: the AveragedModel. Not kept.
        model: the live model. Not kept either: where it dies, `forget` is called, so that its weights can go.
        use_buffers: as in torch.
        forget: called when the model dies.

    Raises:
        Irregular: the modules cannot be watched, or not be paired.
    """

    def __init__(self, averaged: nn.Module, model: nn.Module, use_buffers: bool, forget: Callable[[Any], None]) -> None:
        roots = (averaged, averaged.module, model)
        if any(getattr(type(root), walk) is not getattr(nn.Module, walk) for root in roots for walk in _WALKS):
            raise Irregular  # a walk of its own may go elsewhere tomorrow
        modules = [*averaged.modules(), *model.modules()]
        dicts = [slots for module in modules for slots in (module._parameters, module._buffers, module._modules)]
        if not all(isinstance(slots, dict) for slots in dicts):
            raise Irregular  # TorchScript keeps them elsewhere
        self.pairs, self._counts = pairs_of(averaged, model, use_buffers)
        self.is_regular = all(pair.is_regular for pair in self.pairs)
        self._use_buffers = use_buffers
        self._model = weakref.ref(model, forget)
        self._host = backends.host(backends.default_name())
        tensors = [tensor for pair in self.pairs for tensor in (pair.averaged, pair.live)]
        self._watch = self._host.Watch(dicts, tensors) if self.is_regular else None
        self._update: Update | None = None
        self._swap: Swap | None = None

    def holds(self, model: nn.Module, use_buffers: bool) -> bool:
        """Whether this is the bond for `model`, and still describes both sides."""
        is_same = self._model() is model and self._use_buffers == use_buffers
        return is_same and self._watch is not None and self._watch.holds()

    def is_of(self, model: Any) -> bool:
        """`model`: a weak reference to the model."""
        return self._model is model

    def update(self) -> Update:
        """How the averaged module is brought up to date.

        Raises:
            Irregular: with torch's own code.
        """
        if self._update is None:
            if not self.is_regular:
                raise Irregular
            self._update = Update(self.pairs)
        return self._update

    def swap(self) -> Swap:
        """The exchange.

        Raises:
            ValueError: the two cannot change places; says why.
        """
        if self._swap is None:
            if self._counts[0] != self._counts[1]:
                raise ValueError(
                    f"swapped() needs the model that is averaged: it has {self._counts[1]} tensors, the average has "
                    f"{self._counts[0]}"
                )
            self._swap = Swap(self.pairs, self._host)
        return self._swap

    def refuse_foreign(self, what: str) -> None:
        """Raises RuntimeError while an exchange is entered that has any of the live storages."""
        if claims.owners:
            storages = {pair.live.untyped_storage()._cdata for pair in self.pairs if not _why_no_storage(pair.live)}
            claims.refuse_foreign(what, frozenset(storages))


# ---- the update ----


def _unflagged(tensor: Tensor) -> bool:
    return not (tensor.is_conj() or tensor.is_neg())


def _strides(tensor: Tensor) -> list[int]:
    """The strides that say where elements are."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _stretches(pair: Pair) -> tuple[Tensor, Tensor] | None:
    """Both tensors as 1-D dense stretches of memory in one order of elements; None: they are not."""
    a, b = pair.averaged.detach(), pair.live.detach()
    if not (_unflagged(a) and _unflagged(b)):
        return None
    in_order = a.is_contiguous() and b.is_contiguous()
    if not in_order and (_strides(a) != _strides(b) or len(element_runs(a)) != 1):
        return None
    count = a.numel()
    return a.as_strided((count,), (1,), a.storage_offset()), b.as_strided((count,), (1,), b.storage_offset())


def _is_for_a_kernel(pair: Pair) -> bool:
    dtypes = (pair.averaged.dtype, pair.live.dtype)
    if pair.averaged.device != pair.live.device:
        return False
    return all(dtype in _PLAIN_FLOATS for dtype in dtypes) or (pair.copy and dtypes[0] == dtypes[1])


class Update:
    """averaged <- averaged + weight * (live - averaged), or a copy, for every pair: one launch per device.

    Raises:
        Irregular: pairs for which torch has a rule of its own, or an error.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self._pairs = [(pair.averaged.detach(), pair.live.detach()) for pair in pairs]
        stretches: dict[torch.device, list[tuple[Tensor, Tensor, bool, Tensor]]] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []  # from here on: with torch's operations
        self._mixed: list[tuple[Tensor, Tensor]] = []
        self._alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        selected = {device: self._backend_for(device) for device in {pair.averaged.device for pair in pairs}}
        for pair, (averaged, live) in zip(pairs, self._pairs, strict=True):
            if averaged.numel() == 0:
                continue
            self._refuse_irregular(pair)
            device = averaged.device
            flats = _stretches(pair) if selected[device] is not None and _is_for_a_kernel(pair) else None
            if flats is not None:
                stretches.setdefault(device, []).append((*flats, pair.copy, pair.averaged))
            elif pair.copy:
                self._copies.append((averaged, live))
            elif averaged.dtype != live.dtype:
                self._mixed.append((averaged, live))
            else:
                group = self._alike.setdefault((device, averaged.dtype), ([], []))
                group[0].append(averaged)
                group[1].append(live)
        self._refuse_overlaps(pairs)
        self._plans: list[tuple[str, Any]] = []
        for device, parts in stretches.items():
            averaged_flats, lives, copies, views = (list(part) for part in zip(*parts, strict=True))
            plan = selected[device].Plan([averaged_flats], lives, copies, views)
            self._plans.append((device.type, plan))

    @staticmethod
    def _backend_for(device: torch.device) -> Any:
        """Whose plan to use; None: torch's foreach operations are what there is."""
        module = backends.select(backends.default_name(), device.type)
        return None if module is plain_torch else module

    @staticmethod
    def _refuse_irregular(pair: Pair) -> None:
        a, b = pair.averaged, pair.live
        if not (a.is_contiguous() or _is_disjoint(a)):
            raise Irregular  # expanded: nothing can be written to it
        if not pair.copy and (not {a.dtype, b.dtype} <= AVERAGED_DTYPES or a.is_complex() != b.is_complex()):
            raise Irregular

    @staticmethod
    def _refuse_overlaps(pairs: list[Pair]) -> None:
        """Where averaged tensors share memory torch averages it once for each; threads of ours would race."""
        spans = []
        for pair in pairs:
            own = _span(pair.averaged)
            if own != _span(pair.live):
                spans.append((*_span(pair.live), False))
            spans.append((*own, True))
        ends: dict[tuple[str, bool], int] = {}
        for device, begin, end, is_averaged in sorted(spans):
            for other in (True, False) if is_averaged else (True,):
                if begin < end and begin < ends.get((device, other), 0):
                    raise Irregular
            ends[device, is_averaged] = max(end, ends.get((device, is_averaged), 0))

    def start(self) -> None:
        """The first update: everything is copied."""
        for averaged, live in self._pairs:
            averaged.copy_(live)

    @torch.no_grad()
    def run(self, weight_on: Callable[[str], float]) -> None:
        """Every later one. `weight_on`: the weight of the live side on a kind of device."""
        for device_type, plan in self._plans:
            plan.update([weight_on(device_type)], False)
        for (device, _), (averaged, lives) in self._alike.items():
            here = [live.to(device) for live in lives]
            torch._foreach_lerp_(averaged, here, weight_on(device.type))
        for one, other in self._mixed:
            wide = torch.promote_types(one.dtype, torch.float32)  # as the kernels: chosen by the average
            average = torch.lerp(one.to(wide), other.to(one.device, wide), weight_on(one.device.type))
            one.copy_(average)
        for one, other in self._copies:
            one.copy_(other)


def _is_disjoint(tensor: Tensor) -> bool:
    try:
        element_runs(tensor)
    except ValueError:
        return False
    return True


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """From its first to behind its last byte."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return str(tensor.device), begin, begin
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return str(tensor.device), begin, begin + (last + 1) * tensor.dtype.itemsize


# ---- the exchange ----


class Swap:
    """The averaged tensors and the live ones change places, by the pointers of their storages.

    Where the two storages differ (in dtype or device, or because live weights are slices of one buffer) the average is
    copied into scratch memory of the live storage's layout, and that is exchanged.

    Args:
        pairs: of all tensors.
        host: the backend whose StorageExchange to use.

    Raises:
        ValueError: a tensor that has no storage to exchange, or shapes that differ.
    """

    claim = "another AveragedModel is swapped into the same model: leave that block first"

    def __init__(self, pairs: list[Pair], host: Any) -> None:
        for pair in pairs:
            for tensor in (pair.averaged, pair.live):
                reason = _why_no_storage(tensor)
                if reason is not None:
                    raise ValueError(f"swapped(): a tensor {reason}, so there is nothing to exchange")
            if pair.averaged.shape != pair.live.shape:
                shapes = f"{tuple(pair.averaged.shape)} and {tuple(pair.live.shape)}"
                raise ValueError(f"swapped() needs the model that is averaged: two tensors have shapes {shapes}")
        groups: dict[int, list[Pair]] = {}
        for pair in pairs:
            if pair.averaged.numel() and _span(pair.averaged) != _span(pair.live):
                groups.setdefault(pair.live.untyped_storage()._cdata, []).append(pair)
        self.live_storages = frozenset(groups)
        with torch.inference_mode(False), torch.no_grad():
            direct, self._scratch = self._stand_ins(groups)
            stand_ins = [*direct, *self._scratch]
            lives = [flat(stand_in.live, 0, stand_in.live.nbytes()) for stand_in in stand_ins]
            others = [flat(stand_in.storage, 0, stand_in.storage.nbytes()) for stand_in in stand_ins]
        managed = [tensor for pair in pairs for tensor in (pair.averaged, pair.live)]
        self._exchange = host.StorageExchange(lives, others, managed)
        for stand_in in self._scratch:
            stand_in.free()

    @staticmethod
    def _stand_ins(groups: dict[int, list[Pair]]) -> tuple[list[StandIn], list[StandIn]]:
        """Those that are the averaged module's own storages, and those of scratch memory."""
        owners: dict[int, set[int]] = {}  # averaged storage -> the live ones it stands for
        for key, pairs in groups.items():
            for pair in pairs:
                owners.setdefault(pair.averaged.untyped_storage()._cdata, set()).add(key)
        direct, scratch = [], []
        for pairs in groups.values():
            live = pairs[0].live.untyped_storage()
            other = pairs[0].averaged.untyped_storage()
            rest = _unmanaged(pairs, live)
            is_direct = (
                not rest
                and other.nbytes() == live.nbytes()
                and other.device == live.device
                and len(owners[other._cdata]) == 1
                and other._cdata not in groups
                and all(_is_same_place(pair, other) for pair in pairs)
            )
            if is_direct:
                direct.append(StandIn(live, other, [], []))
                continue
            memory = torch.empty(live.nbytes(), dtype=torch.uint8, device=live.device).untyped_storage()
            casts = [(_view_like(pair.live, memory), pair.averaged.detach()) for pair in pairs]
            gaps_of_both = [(flat(memory, *gap), flat(live, *gap)) for gap in rest]
            scratch.append(StandIn(live, memory, gaps_of_both, casts))
        return direct, scratch

    @property
    def is_applied(self) -> bool:
        return self._exchange.entered

    def enter(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for stand_in in self._scratch:
                stand_in.fill()
        self._exchange.enter(next(claims.version_steps))
        claims.owners.add(self)

    def leave(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for stand_in in self._scratch:
                stand_in.carry_rest()
            self._exchange.leave()
            claims.owners.discard(self)
            for stand_in in self._scratch:
                stand_in.free()


def _unmanaged(pairs: Iterable[Pair], live: torch.UntypedStorage) -> list[tuple[int, int]]:
    """The bytes of a live storage that no pair covers."""
    runs = []
    for tensor in (pair.live for pair in pairs):
        size = tensor.dtype.itemsize
        try:
            runs += [Run(begin * size, end * size, torch.uint8, True) for begin, end in element_runs(tensor)]
        except ValueError as error:
            raise ValueError(f"swapped(): a tensor {error}") from None
    return gaps(merged(runs), live.nbytes())


def _is_same_place(pair: Pair, other: torch.UntypedStorage) -> bool:
    a, b = pair.averaged, pair.live
    return (
        a.untyped_storage()._cdata == other._cdata
        and (a.dtype, a.storage_offset(), _strides(a)) == (b.dtype, b.storage_offset(), _strides(b))
        and (a.is_conj(), a.is_neg()) == (b.is_conj(), b.is_neg())
    )


def _view_like(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """What `tensor` would be if its memory were `storage`."""
    empty = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    view = empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    view = view.conj() if tensor.is_conj() else view  # flags beside the memory
    return torch._neg_view(view) if tensor.is_neg() else view

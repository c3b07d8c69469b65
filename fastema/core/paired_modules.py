"""Tensors of an averaged module and of the live model, paired by position, for `fastema.swa_utils`.

`PairedModules` is built once, with one plan over all pairs and a watch that notices replaced or moved tensors. The
averaged module's own tensors are the shadow. Pairs that are not equal contiguous memory use torch's operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastema import backends
from fastema.backends import contract
from fastema.backends import torch as plain_torch
from fastema.core import swap
from fastema.core.policy import AVERAGED_DTYPES, why_no_storage
from fastema.core.storages import Run, SwapBuffer, allocate, element_runs, flat, gaps, merged, view_in, whole
from fastema.core.swap import Swap, SwapEntry

_PLAIN_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_TRAVERSALS = ("parameters", "named_parameters", "buffers", "named_buffers", "named_modules", "_named_members")


class UseTorchFallback(Exception):
    """Signal that torch's own update must run: it gives the result, or the error."""


@dataclass(frozen=True)
class Pair:
    """A tensor of the averaged module and the live one in the same position."""

    averaged: Tensor
    live: Tensor
    copy: bool  # at every update, rather than averaged

    @property
    def is_regular(self) -> bool:
        tensors = (self.averaged, self.live)
        return self.averaged.shape == self.live.shape and not any(why_no_storage(tensor) for tensor in tensors)


def _is_copied(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def pairs_of(averaged: nn.Module, model: nn.Module, use_buffers: bool) -> tuple[list[Pair], tuple[int, int]]:
    """Return the pairs of an AveragedModel and a live model, as torch zips them: surplus tensors are left out.

    Returns:
        The pairs, and how many tensors the two sides have.

    Raises:
        UseTorchFallback: the numbers of buffers differ, which torch itself reports.
    """
    module: nn.Module = averaged.module  # type: ignore[assignment]
    buffers, live_buffers = list(module.buffers()), list(model.buffers())
    if use_buffers:
        ours, theirs = [*module.parameters(), *buffers], [*model.parameters(), *live_buffers]
        copied = []
    else:
        ours, theirs = list(averaged.parameters()), list(model.parameters())
        if len(buffers) != len(live_buffers):
            raise UseTorchFallback
        copied = [Pair(a, b, copy=True) for a, b in zip(buffers, live_buffers, strict=True)]
    pairs = [Pair(a, b, copy=_is_copied(a)) for a, b in zip(ours, theirs, strict=False)]
    return pairs + copied, (len(ours) + len(copied), len(theirs) + len(copied))


class PairedModules:
    """The paired tensors of an AveragedModel and a live model, valid while both hold the same tensors.

    Args:
        averaged: the AveragedModel; not referenced.
        model: the live model; referenced weakly, so that its weights can be freed.
        use_buffers: as in torch.
        forget: called when the model is deleted.

    Raises:
        UseTorchFallback: the modules cannot be watched, or not be paired.
    """

    def __init__(self, averaged: nn.Module, model: nn.Module, use_buffers: bool, forget: Callable[[Any], None]) -> None:
        roots = (averaged, averaged.module, model)
        if any(getattr(type(root), walk) is not getattr(nn.Module, walk) for root in roots for walk in _TRAVERSALS):
            raise UseTorchFallback  # an overridden traversal may return other tensors later
        modules = [*averaged.modules(), *model.modules()]
        dicts = [slots for module in modules for slots in (module._parameters, module._buffers, module._modules)]
        if not all(isinstance(slots, dict) for slots in dicts):
            raise UseTorchFallback  # TorchScript stores them elsewhere
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

    def settle(self) -> None:
        """Copy averages whose memory was replaced in the middle of an update to where they are now."""
        if self._update is not None and self._watch is not None and not self._watch.shadows_hold():
            with torch.inference_mode(False), torch.no_grad():
                self._update.settle()

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
            self._swap = _swap_of(self.pairs, self._names, self._host)
        return self._swap

    def is_unchanged(self) -> bool:
        """Return True if both sides have the same tensors in the same storages; their memory may differ."""
        return self._watch is not None and self._watch.layout_holds()

    def refuse_foreign(self, what: str) -> None:
        """Raise RuntimeError while a swap is entered that has any of these storages."""
        if swap.entered:
            tensors = [tensor for pair in self.pairs for tensor in (pair.averaged, pair.live)]
            storages = {tensor.untyped_storage()._cdata for tensor in tensors if not why_no_storage(tensor)}
            swap.refuse_foreign(what, frozenset(storages))


# ---- the update ----


def _has_no_flags(tensor: Tensor) -> bool:
    return not (tensor.is_conj() or tensor.is_neg())


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides of the dimensions longer than 1, which say where elements are."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _flat_pair(pair: Pair, memory: torch.UntypedStorage) -> tuple[Tensor, Tensor] | None:
    """Return both tensors as contiguous 1-D memory in one order of elements; None: that is impossible.

    `memory`: the storage to use for the averaged tensor.
    """
    a, b = pair.averaged.detach(), pair.live.detach()
    if not (_has_no_flags(a) and _has_no_flags(b)):
        return None
    in_order = a.is_contiguous() and b.is_contiguous()
    if not in_order and (_strides(a) != _strides(b) or len(element_runs(a)) != 1):
        return None
    count = a.numel()
    averaged = torch.empty(0, dtype=a.dtype, device=a.device).set_(memory, a.storage_offset(), (count,), (1,))
    return averaged, b.as_strided((count,), (1,), b.storage_offset())


def _has_kernel(pair: Pair) -> bool:
    dtypes = (pair.averaged.dtype, pair.live.dtype)
    if pair.averaged.device != pair.live.device:
        return False
    return all(dtype in _PLAIN_FLOATS for dtype in dtypes) or (pair.copy and dtypes[0] == dtypes[1])


class Update:
    """Average or copy every pair: averaged <- averaged + weight * (live - averaged), one launch per device.

    Raises:
        UseTorchFallback: pairs for which torch has a rule of its own, or an error.
    """

    def __init__(self, pairs: list[Pair], host: Any) -> None:
        self._pairs = [(pair.averaged.detach(), pair.live.detach()) for pair in pairs]
        self._host = host
        # Bytes of an averaged storage, and of a second one over its memory for the kernels: csrc/storage_exchange.h.
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        flat_pairs: dict[torch.device, list[tuple[Tensor, Tensor, bool, Tensor]]] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []  # these three use torch's operations
        self._mixed: list[tuple[Tensor, Tensor]] = []
        self._alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        selected = {device: self._backend_for(device) for device in {pair.averaged.device for pair in pairs}}
        for pair, (averaged, live) in zip(pairs, self._pairs, strict=True):
            if averaged.numel() == 0:
                continue
            self._refuse_irregular(pair)
            device = averaged.device
            has_kernel = selected[device] is not None and _has_kernel(pair)
            flats = _flat_pair(pair, self._memory_of(averaged)) if has_kernel else None
            if flats is not None:
                flat_pairs.setdefault(device, []).append((*flats, pair.copy, pair.averaged))
            elif pair.copy:
                self._copies.append((averaged, live))
            elif averaged.dtype != live.dtype:
                self._mixed.append((averaged, live))
            else:
                group = self._alike.setdefault((device, averaged.dtype), ([], []))
                group[0].append(averaged)
                group[1].append(live)
        self._refuse_overlaps(pairs)
        self._plans: list[tuple[str, contract.Plan]] = []
        for device, rows in flat_pairs.items():
            averaged_flats, lives, copies, views = (list(column) for column in zip(*rows, strict=True))
            plan = selected[device].Plan([averaged_flats], lives, copies, views)
            self._plans.append((device.type, plan))

    def _memory_of(self, averaged: Tensor) -> torch.UntypedStorage:
        storage = averaged.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = whole(storage), self._host.second_owner(whole(storage))
        return self._memory[storage._cdata][1].untyped_storage()

    def settle(self) -> None:
        """Copy what the kernels wrote to the memory that the averages have now."""
        for average, memory in self._memory.values():
            if average.data_ptr() != memory.data_ptr():
                average.copy_(memory)

    @staticmethod
    def _backend_for(device: torch.device) -> Any:
        """Return the backend whose plan to use; None: torch's foreach operations."""
        module = backends.select(backends.default_name(), device)
        return None if module is plain_torch else module

    @staticmethod
    def _refuse_irregular(pair: Pair) -> None:
        a, b = pair.averaged, pair.live
        if not (a.is_contiguous() or _is_disjoint(a)):
            raise UseTorchFallback  # expanded: nothing can be written to it
        if not pair.copy and (not {a.dtype, b.dtype} <= AVERAGED_DTYPES or a.is_complex() != b.is_complex()):
            raise UseTorchFallback

    @staticmethod
    def _refuse_overlaps(pairs: list[Pair]) -> None:
        """Raise UseTorchFallback where averaged tensors share memory: torch averages it once for each tensor.

        Live tensors may overlap each other, averaged ones nothing.
        """
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
                    raise UseTorchFallback
            ends[device, is_averaged] = max(end, ends.get((device, is_averaged), 0))

    def start(self) -> None:
        """Run the first update: copy everything."""
        for averaged, live in self._pairs:
            averaged.copy_(live)

    @torch.no_grad()
    def run(self, weight_on: Callable[[str], float]) -> None:
        """Run a later update. `weight_on`: return the weight of the live side for a device type."""
        for device_type, plan in self._plans:
            plan.update([weight_on(device_type)], False)
        for (device, _), (averages, lives) in self._alike.items():
            here = [live.to(device) for live in lives]
            torch._foreach_lerp_(averages, here, weight_on(device.type))
        for averaged, live in self._mixed:
            wide = torch.promote_types(averaged.dtype, torch.float32)  # by the average's dtype, as in the kernels
            result = torch.lerp(averaged.to(wide), live.to(averaged.device, wide), weight_on(averaged.device.type))
            averaged.copy_(result)
        for averaged, live in self._copies:
            averaged.copy_(live)


def _is_disjoint(tensor: Tensor) -> bool:
    try:
        element_runs(tensor)
    except ValueError:
        return False
    return True


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """Return the tensor's bytes [begin, end)."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return str(tensor.device), begin, begin
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return str(tensor.device), begin, begin + (last + 1) * tensor.dtype.itemsize


# ---- the swap ----

_OWNER = "another AveragedModel is swapped into the same model: leave that block first"
_DROPPED = (
    "an AveragedModel was deleted while it was swapped into a model: the model keeps the averaged weights, and the "
    "trained ones are lost. Leave the swapped() block first"
)


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model under each of their names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


def _swap_of(pairs: list[Pair], names: dict[int, list[str]], host: Any) -> Swap:
    """Return the swap of averaged and live tensors.

    Where two storages differ (dtype, device, or live weights that are slices of one buffer), the average is copied into
    scratch memory of the live layout, which is swapped in.

    Args:
        pairs: of all tensors.
        names: of the live tensors, by id.
        host: the backend whose `StorageExchange` to use.

    Raises:
        ValueError: a tensor has no storage of its own, or shapes differ.
    """
    for pair in pairs:
        for tensor in (pair.averaged, pair.live):
            reason = why_no_storage(tensor)
            if reason is not None:
                raise ValueError(f"swapped(): a tensor {reason}")
        if pair.averaged.shape != pair.live.shape:
            shapes = f"{tuple(pair.averaged.shape)} and {tuple(pair.live.shape)}"
            raise ValueError(f"swapped() needs the model that is averaged: two tensors have shapes {shapes}")
    groups: dict[int, list[Pair]] = {}
    for pair in pairs:
        if pair.averaged.numel() and _span(pair.averaged) != _span(pair.live):
            groups.setdefault(pair.live.untyped_storage()._cdata, []).append(pair)
    with torch.inference_mode(False), torch.no_grad():
        buffers = _buffers_of(groups)
        buffer_of = {buffer.live._cdata: buffer for buffer in buffers}
        entries = [
            SwapEntry(
                names.get(id(pair.live), []), swap.place_of(pair.live), pair.copy, buffer_of[key].view_of(pair.live)
            )
            for key, group in groups.items()
            for pair in group
        ]
        versioned = [tensor for pair in pairs for tensor in (pair.averaged, pair.live)]
        exchange = swap.exchange_of(buffers, versioned, host)
        for buffer in buffers:
            buffer.free()
    return Swap(_OWNER, _DROPPED, entries, exchange, buffers)


def _buffers_of(groups: dict[int, list[Pair]]) -> list[SwapBuffer]:
    """Return the buffer to swap with each live storage: the averaged one, or scratch memory."""
    owners: dict[int, set[int]] = {}  # averaged storage -> live storages that use it
    for key, pairs in groups.items():
        for pair in pairs:
            owners.setdefault(pair.averaged.untyped_storage()._cdata, set()).add(key)
    buffers = []
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
            buffers.append(SwapBuffer(live, other, [], [], [], 0))
            continue
        memory = allocate(live.nbytes(), live.device, live)
        casts = [
            (view_in(memory, pair.live, pair.live.dtype, pair.live.storage_offset()), pair.averaged.detach())
            for pair in pairs
        ]
        buffers.append(SwapBuffer(live, memory, [(flat(memory, *gap), flat(live, *gap)) for gap in rest], casts, [], 0))
    return buffers


def _unmanaged(pairs: Iterable[Pair], live: torch.UntypedStorage) -> list[tuple[int, int]]:
    """Return the bytes of a live storage outside all pairs."""
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

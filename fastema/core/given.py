"""Averages in memory that another module owns: an AveragedModel's tensors, paired with the live ones by position.

They are built once, with one plan over all pairs and a watch that notices replaced or moved tensors. The averaged
module's own tensors are the shadow. Pairs that are not equal contiguous memory use torch's operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastema import backends
from fastema.backends import contract
from fastema.backends import torch as plain_torch
from fastema.backends.contract import Segment, UpdateArgs
from fastema.core.pairs import Average, Pair
from fastema.core.plans import Plans
from fastema.core.policy import AVERAGED_DTYPES
from fastema.core.swap import Swap, SwapBuffer, entered, exchange_of, refuse_foreign
from fastema.core.tensors import refuse_elsewhere, why_no_storage
from fastema.memory.bytes import Run, allocate, element_runs, flat, gaps, merged, view_in, whole

_TRAVERSALS = ("parameters", "named_parameters", "buffers", "named_buffers", "named_modules", "_named_members")
_PLAIN_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_OWNER = "another AveragedModel is swapped into the same model: leave that block first"
_DROPPED = (
    "an AveragedModel was deleted while it was swapped into a model: the model keeps the averaged weights, and the "
    "trained ones are lost. Leave the swapped() block first"
)


class UseTorchFallback(Exception):
    """Signal that torch's own update must run: it gives the result, or the error."""


def _is_regular(pair: Pair) -> bool:
    return pair.averaged.shape == pair.live.shape and not any(map(why_no_storage, (pair.averaged, pair.live)))


def _is_same_place(pair: Pair) -> bool:
    """Return True if both are at one place of two storages of one layout."""
    return _layout(pair.averaged) == _layout(pair.live)


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.storage_offset(), _strides(tensor), tensor.is_conj(), tensor.is_neg()


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides of the dimensions longer than 1, which say where elements are."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """Return the tensor's bytes [begin, end)."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return str(tensor.device), begin, begin
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return str(tensor.device), begin, begin + (last + 1) * tensor.dtype.itemsize


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model under each of their names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


class GivenAverages:
    """The averages that an AveragedModel keeps of a live model, valid while both hold the same tensors.

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
        self.pairs, self._counts = _paired(averaged, model, use_buffers)
        self.is_regular = all(map(_is_regular, self.pairs))
        self._use_buffers = use_buffers
        self._model = weakref.ref(model, forget)
        self._host = backends.host(backends.default_name())
        tensors = [tensor for pair in self.pairs for tensor in (pair.averaged, pair.live)]
        averages = [pair.averaged for pair in self.pairs]
        self._watch: contract.Watch | None = self._host.Watch(dicts, tensors, averages) if self.is_regular else None
        self._update: Update | None = None
        self._swap: Swap | None = None

    def holds(self, model: nn.Module, use_buffers: bool) -> bool:
        """Return True if these are the averages of `model` and nothing was replaced."""
        is_same = self._model() is model and self._use_buffers == use_buffers
        return is_same and self._watch is not None and self._watch.holds()

    def is_of(self, model: Any) -> bool:
        """Return True if these are the averages of `model`, a weak reference."""
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
        """Return the swap with the live model.

        Where two storages differ (dtype, device, or live weights that are slices of one buffer), the average is copied
        into scratch memory of the live layout, which is swapped in.

        Raises:
            ValueError: they cannot be swapped; says why.
        """
        if self._swap is None:
            if self._counts[0] != self._counts[1]:
                raise ValueError(
                    f"swapped() needs the model that is averaged: it has {self._counts[1]} tensors, the average has "
                    f"{self._counts[0]}"
                )
            for pair in self.pairs:
                for reason in filter(None, map(why_no_storage, (pair.averaged, pair.live))):
                    raise ValueError(f"swapped(): a tensor {reason}")
                if pair.averaged.shape != pair.live.shape:
                    shapes = f"{tuple(pair.averaged.shape)} and {tuple(pair.live.shape)}"
                    raise ValueError(f"swapped() needs the model that is averaged: two tensors have shapes {shapes}")
            with torch.inference_mode(False), torch.no_grad():
                self._swap = self._built_swap()
        return self._swap

    def _built_swap(self) -> Swap:
        groups: dict[int, list[Pair]] = {}
        for pair in self.pairs:
            if pair.averaged.numel() and _span(pair.averaged) != _span(pair.live):
                groups.setdefault(pair.live.untyped_storage()._cdata, []).append(pair)
        buffers = _buffers_of(groups)
        exchange = exchange_of(buffers, [t for pair in self.pairs for t in (pair.averaged, pair.live)], self._host)
        moved = [pair for group in groups.values() for pair in group]
        model = self._model()
        assert model is not None
        swap = Swap(_OWNER, _DROPPED, moved, exchange, buffers, model.modules())
        for buffer in buffers:
            buffer.free()
        return swap

    def is_unchanged(self) -> bool:
        """Return True if both sides have the same tensors in the same storages; their memory may differ."""
        return self._watch is not None and self._watch.layout_holds()

    def refuse_foreign(self, what: str) -> None:
        """Raise RuntimeError while a swap is entered that has any of these storages."""
        if entered:
            tensors = [tensor for pair in self.pairs for tensor in (pair.averaged, pair.live)]
            storages = {tensor.untyped_storage()._cdata for tensor in tensors if not why_no_storage(tensor)}
            refuse_foreign(what, frozenset(storages))


def _paired(averaged: nn.Module, model: nn.Module, use_buffers: bool) -> tuple[list[Pair], tuple[int, int]]:
    """Return the pairs of an AveragedModel and a live model, as torch zips them: surplus tensors are left out.

    Returns:
        The pairs, and how many tensors the two sides have.

    Raises:
        UseTorchFallback: the numbers of buffers differ, which torch itself reports.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in tensors_by_name(model).items():
        names.setdefault(id(tensor), []).append(name)

    def pair_of(average: Tensor, live: Tensor, copy: bool) -> Pair:
        pair = Pair(live, "copy" if copy else "average", names.get(id(live), []))
        pair.averages.append(Average(weakref.ref(pair), average))
        return pair

    module: nn.Module = averaged.module  # type: ignore[assignment]
    buffers, live_buffers = list(module.buffers()), list(model.buffers())
    if use_buffers:
        ours, theirs = [*module.parameters(), *buffers], [*model.parameters(), *live_buffers]
        copied = []
    else:
        ours, theirs = list(averaged.parameters()), list(model.parameters())
        if len(buffers) != len(live_buffers):
            raise UseTorchFallback
        copied = [pair_of(a, b, copy=True) for a, b in zip(buffers, live_buffers, strict=True)]
    pairs = [pair_of(a, b, not (a.is_floating_point() or a.is_complex())) for a, b in zip(ours, theirs, strict=False)]
    return pairs + copied, (len(ours) + len(copied), len(theirs) + len(copied))


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
        segments: list[Segment] = []
        views: list[Tensor] = []  # of the segments
        self._copies: list[tuple[Tensor, Tensor]] = []  # these three use torch's operations
        self._mixed: list[tuple[Tensor, Tensor]] = []
        self._alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        name = backends.default_name()
        devices = {averaged.device for averaged, _ in self._pairs}
        is_plain = {device: backends.select(name, device) is plain_torch for device in devices}
        for pair, (averaged, live) in zip(pairs, self._pairs, strict=True):
            if averaged.numel() == 0:
                continue
            dtypes, device = {averaged.dtype, live.dtype}, averaged.device
            if not pair.copy and (not dtypes <= AVERAGED_DTYPES or averaged.is_complex() != live.is_complex()):
                raise UseTorchFallback
            try:
                element_runs(averaged)
            except ValueError:
                raise UseTorchFallback from None  # expanded: nothing can be written to it
            segment = None if is_plain[device] else self._segment_of(averaged, live, pair.copy)
            if segment is not None:
                segments.append(segment)
                views.append(pair.averaged)
            elif pair.copy:
                self._copies.append((averaged, live))
            elif len(dtypes) > 1:
                self._mixed.append((averaged, live))
            else:
                group = self._alike.setdefault((device, averaged.dtype), ([], []))
                group[0].append(averaged)
                group[1].append(live)
        _refuse_overlaps(pairs)
        plans = Plans(segments, name, views)
        kinds = [device.type for device in plans.devices]
        self._plans = list(zip(kinds, plans.by_device, strict=True)) if segments else []
        self._args = UpdateArgs([0.0], skip_nonfinite=False)  # of the last update: mostly the next one has the same

    def _segment_of(self, averaged: Tensor, live: Tensor, copy: bool) -> Segment | None:
        """Return both as contiguous 1-D memory in one order of elements; None: no kernel can average them."""
        has_kernel = {averaged.dtype, live.dtype} <= _PLAIN_FLOATS or (copy and averaged.dtype == live.dtype)
        is_lazy = any(tensor.is_conj() or tensor.is_neg() for tensor in (averaged, live))
        if averaged.device != live.device or not has_kernel or is_lazy:
            return None
        in_order = averaged.is_contiguous() and live.is_contiguous()
        if not in_order and (_strides(averaged) != _strides(live) or len(element_runs(averaged)) != 1):
            return None
        storage = averaged.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = whole(storage), self._host.second_owner(whole(storage))
        memory = self._memory[storage._cdata][1].untyped_storage()
        shadow = torch.empty(0, dtype=averaged.dtype, device=averaged.device)
        shadow.set_(memory, averaged.storage_offset(), (averaged.numel(),), (1,))
        return Segment([shadow], live.as_strided(shadow.shape, (1,), live.storage_offset()), copy)

    def copy_to_new_memory(self) -> None:
        """Copy what the kernels wrote to the memory that the averages have now."""
        for average, memory in self._memory.values():
            if average.data_ptr() != memory.data_ptr():
                average.copy_(memory)

    def start(self) -> None:
        """Run the first update: copy everything."""
        for averaged, live in self._pairs:
            averaged.copy_(live)

    @torch.no_grad()
    def run(self, weight_on: Callable[[str], float]) -> None:
        """Run a later update. `weight_on`: return the weight of the live side for a device type."""
        for device_type, plan in self._plans:
            weight = weight_on(device_type)
            if weight != self._args.weights[0]:
                self._args = UpdateArgs([weight], skip_nonfinite=False)
            plan.update(self._args)
        for (device, _), (averages, lives) in self._alike.items():
            here, weight = [live.to(device) for live in lives], weight_on(device.type)
            if weight == 1:  # a copy, as in the kernels: lerp keeps a NaN
                torch._foreach_copy_(averages, here)
            else:
                torch._foreach_lerp_(averages, here, weight)
        for averaged, live in self._mixed:
            wide = torch.promote_types(averaged.dtype, torch.float32)  # by the average's dtype, as in the kernels
            new, weight = live.to(averaged.device, wide), weight_on(averaged.device.type)
            averaged.copy_(new if weight == 1 else torch.lerp(averaged.to(wide), new, weight))
        for averaged, live in self._copies:
            averaged.copy_(live)


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


def _buffers_of(groups: dict[int, list[Pair]]) -> list[SwapBuffer]:
    """Return the buffer to swap with each live storage: the averaged one, or scratch memory."""
    owners: dict[int, set[int]] = {}  # averaged storage -> live storages that use it
    for key, pairs in groups.items():
        for pair in pairs:
            owners.setdefault(pair.averaged.untyped_storage()._cdata, set()).add(key)
    buffers = []
    for pairs in groups.values():
        live, other = pairs[0].live.untyped_storage(), pairs[0].averaged.untyped_storage()
        rest = _unmanaged(pairs, live)
        is_direct = (
            not rest
            and other.nbytes() == live.nbytes()
            and other.device == live.device
            and len(owners[other._cdata]) == 1
            and other._cdata not in groups
            and all(pair.averaged.untyped_storage()._cdata == other._cdata and _is_same_place(pair) for pair in pairs)
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

"""The update of an averaged module: one launch per device, and torch's operations where memory does not match."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastema import backends
from fastema.backends import contract
from fastema.backends import torch as plain_torch
from fastema.backends.contract import Segment, UpdateArgs
from fastema.core.given_pairs import Pair, UseTorchFallback, span, strides
from fastema.core.policy import AVERAGED_DTYPES
from fastema.memory.bytes import element_runs, whole

_PLAIN_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


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
        selected = {
            device: backends.select(backends.default_name(), device)
            for device in {pair.averaged.device for pair in pairs}
        }
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
            flats = None if selected[device] is plain_torch else self._flat_pair(pair)
            if flats is not None:
                flat_pairs.setdefault(device, []).append((*flats, pair.copy, pair.averaged))
            elif pair.copy:
                self._copies.append((averaged, live))
            elif len(dtypes) > 1:
                self._mixed.append((averaged, live))
            else:
                group = self._alike.setdefault((device, averaged.dtype), ([], []))
                group[0].append(averaged)
                group[1].append(live)
        self._refuse_overlaps(pairs)
        self._plans: list[tuple[str, contract.Plan]] = []
        for device, rows in flat_pairs.items():
            segments = [Segment([averaged], live, copy) for averaged, live, copy, _ in rows]
            self._plans.append((device.type, selected[device].Plan(segments, [view for *_, view in rows])))

    def _flat_pair(self, pair: Pair) -> tuple[Tensor, Tensor] | None:
        """Return both tensors as contiguous 1-D memory in one order of elements; None: no kernel can average them."""
        a, b = pair.averaged.detach(), pair.live.detach()
        has_kernel = {a.dtype, b.dtype} <= _PLAIN_FLOATS or (pair.copy and a.dtype == b.dtype)
        if a.device != b.device or not has_kernel or any(tensor.is_conj() or tensor.is_neg() for tensor in (a, b)):
            return None
        in_order = a.is_contiguous() and b.is_contiguous()
        if not in_order and (strides(a) != strides(b) or len(element_runs(a)) != 1):
            return None
        storage = a.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = whole(storage), self._host.second_owner(whole(storage))
        memory = self._memory[storage._cdata][1].untyped_storage()
        averaged = torch.empty(0, dtype=a.dtype, device=a.device).set_(memory, a.storage_offset(), (a.numel(),), (1,))
        return averaged, b.as_strided((a.numel(),), (1,), b.storage_offset())

    def copy_to_new_memory(self) -> None:
        """Copy what the kernels wrote to the memory that the averages have now."""
        for average, memory in self._memory.values():
            if average.data_ptr() != memory.data_ptr():
                average.copy_(memory)

    @staticmethod
    def _refuse_overlaps(pairs: list[Pair]) -> None:
        """Raise UseTorchFallback where averaged tensors share memory: torch averages it once for each tensor.

        Live tensors may overlap each other, averaged ones nothing.
        """
        spans = []
        for pair in pairs:
            own = span(pair.averaged)
            if own != span(pair.live):
                spans.append((*span(pair.live), False))
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
            plan.update(UpdateArgs([weight_on(device_type)], skip_nonfinite=False))
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

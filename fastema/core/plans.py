"""The plans that run the updates of a model's averages: one for each device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastema import backends
from fastema.backends.contract import Segment, UpdateArgs
from fastema.core import offload
from fastema.core.pairs import Average


class Plans:
    """One plan for each device, whatever the mix of dtypes and rules on it.

    Args:
        segments: of all averages that have memory of their own.
        backend: "auto" or the name of one.
        views: of the averages, as users see them: an update raises their version counters.
        loose: averages without a segment, which are copied from what the model has then.
    """

    def __init__(
        self, segments: Sequence[Segment], backend: str, views: Sequence[Tensor], loose: Sequence[Average] = ()
    ) -> None:
        self._views = views
        self._loose = loose
        self._updates = torch.empty(0, device="cpu")  # its version counter rises with those of the views
        self.by_device: list[Any] = []  # contract.Plan; or OffloadedPlan, which cannot exchange
        self.offloaded: list[offload.OffloadedPlan] = []  # those that run in a thread
        self.devices: list[torch.device] = []  # of the live weights of each plan
        places: dict[tuple[torch.device, torch.device], list[Segment]] = {}
        for segment in segments:
            places.setdefault((segment.live.device, segment.shadows[0].device), []).append(segment)
        host = backends.host(backend)
        names: list[str] = []
        for (device, own_device), here in (places or {(torch.device("cpu"),) * 2: []}).items():
            raised = [] if self.by_device else [*views, self._updates]  # once, by the first plan
            transfer = offload.transfer_between(device, own_device)
            if transfer is not None:
                module = host
                self.offloaded.append(offload.OffloadedPlan(transfer, host.Plan, here, raised))
                self.by_device.append(self.offloaded[-1])
            else:  # only torch crosses devices
                module = backends.select(backend if device == own_device else "torch", device) if here else host
                self.by_device.append(module.Plan(here, raised))
            self.devices.append(device)
            names.append(module.NAME)
        self.backend_name = "+".join(dict.fromkeys(names))
        self.note_writes()

    def update(self, args: UpdateArgs) -> None:
        """Average or copy every tensor.

        Raises:
            RuntimeError: an earlier average failed in its thread; nothing is averaged.
        """
        self.synchronize()
        skips = backends.skips_on(self.devices, args.skip)
        for plan, skip in zip(self.by_device, skips, strict=True):
            plan.update(args if skip is args.skip else args._replace(skip=skip))
        for average in self._loose:
            average.copy_loose(args.skip)

    def synchronize(self) -> None:
        """Wait for averages that run in a thread, and raise their errors."""
        for plan in self.offloaded:
            plan.synchronize()

    def order_writes(self) -> None:
        """Let what is enqueued from now on come after the copies to the host."""
        for plan in self.offloaded:
            plan.order_writes()

    def nonfinite_count(self) -> int:
        return sum(plan.nonfinite_count() for plan in self.by_device)

    # ---- who has written to the averages ----

    def note_writes(self) -> None:
        """Note that what was written to the averages, other than by updates, is where they are now."""
        self._noted = self._foreign_writes()

    def only_updates_wrote(self) -> bool:
        """Return True if only updates wrote to the averages since `note_writes()`."""
        return self._noted == self._foreign_writes()

    def _foreign_writes(self) -> list[int]:
        return [view._version - self._updates._version for view in self._views]

"""The plans of a shadow, which run its updates: one for each device of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastema import backends
from fastema.core import offload
from fastema.core.pairs import Average
from fastema.core.storages import ShadowStorage


class Plans:
    """One plan for each device, whatever the mix of dtypes and rules on it.

    Args:
        storages: of the shadow.
        backend: "auto" or the name of one.
        averages: [count][managed], whose views users see: an update raises their version counters.
    """

    def __init__(self, storages: Sequence[ShadowStorage], backend: str, averages: list[list[Average]]) -> None:
        self._averages = [average for each in averages for average in each]
        self._loose = [average for average in self._averages if average.storage is None]
        self._updates = torch.empty(0, device="cpu")  # its version counter rises with those of the views
        self.by_device: list[Any] = []  # contract.Plan; or OffloadedPlan, which cannot exchange
        self.offloaded: list[offload.OffloadedPlan] = []  # those that run in a thread
        self.devices: list[torch.device] = []  # of the live weights of each plan
        places: dict[tuple[torch.device, bool], list[ShadowStorage]] = {}
        for storage in storages:
            device = storage.live.device
            places.setdefault((device, device == storage.device), []).append(storage)
        host = backends.host(backend)
        names: list[str] = []
        for (device, is_same_device), here in places.items():
            segments = [[part for s in here for part in s.segments[which]] for which in range(len(averages))]
            lows = [[low for s in here for low in s.low_segments[which]] for which in range(len(averages))]
            lives = [live for storage in here for live in storage.lives]
            copies = [run.copy for storage in here for run in storage.runs]
            views = [] if self.by_device else [*self._views(), self._updates]  # raised once, by the first plan
            transfer = offload.transfer_between(device, here[0].device)
            if transfer is not None:
                module = host
                self.offloaded.append(offload.OffloadedPlan(transfer, host.Plan, segments, lives, copies, views))
                self.by_device.append(self.offloaded[-1])
            else:  # only torch crosses devices
                module = backends.select(backend if is_same_device else "torch", device)
                own_lows = lows if any(low is not None for low in lows[0]) else []
                self.by_device.append(module.Plan(segments, lives, copies, views, own_lows))
            self.devices.append(device)
            names.append(module.NAME)
        self.backend_name = "+".join(dict.fromkeys(names))
        self.note_writes()

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
        skips = backends.skips_on(self.devices, skip)
        for plan, own_skip in zip(self.by_device, skips, strict=True):
            plan.update(weights, skip_nonfinite, own_skip, device_weights)
        for average in self._loose:
            average.copy_loose(skip)

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
        return [view._version - self._updates._version for view in self._views()]

    def _views(self) -> list[Tensor]:
        return [average.view for average in self._averages]

"""Step and weight in device memory, so that a replayed CUDA graph has the right decay without running Python.

The schedule is evaluated once, on the host, into a table on the device. So the weights have the bits of the eager path,
for every schedule that settles or has an end. An update reads its row in one small kernel, or in a dozen torch
operations where the CUDA kernels cannot run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastema.backends import native
from fastema.core.decays import Decays
from fastema.memory.atomic_steps import Step
from fastema.memory.streams import Streams

_MAX_ROWS = 1 << 22  # 32 MiB for one decay


class DeviceSchedule:
    """A step counter and a table of weights on the device.

    Args:
        decays: targets and schedule; the table of one that does not settle ends at its total_steps.
        update_every: as in FastEMA.
        device: where the model is.

    Raises:
        ValueError: the table would have no end.
    """

    def __init__(self, decays: Decays, update_every: int, device: torch.device) -> None:
        self._update_every = update_every
        table = self._table_of(decays)
        with torch.inference_mode(False):
            self._table = table.to(device)  # [updates, K]
            self.step = torch.zeros((), dtype=torch.int64, device=device)
            self.num_updates = torch.zeros((), dtype=torch.int64, device=device)
            self.weights = torch.zeros(len(decays), dtype=torch.float64, device=device)
            self._skip = torch.zeros((), dtype=torch.float32, device=device)
        self._launch = native.device_schedule_launch(device)
        self._streams = Streams(device, [self._table, self.step, self.num_updates, self.weights, self._skip])

    @torch.no_grad()
    def advance(self, found_inf: Tensor | None) -> Tensor:
        """Count one optimizer step, unless `found_inf` is not 0.

        Returns:
            float32 scalar: not 0 if nothing is to be averaged. `weights` are those of the step.
        """
        self._streams.note_current()
        fits = found_inf is None or (found_inf.dtype == torch.float32 and found_inf.device == self._skip.device)
        if self._launch is not None and fits:
            self._launch(
                self._table, self._update_every, found_inf, self.step, self.num_updates, self.weights, self._skip
            )
            return self._skip
        skipped = torch.zeros_like(self._skip) if found_inf is None else (found_inf.reshape(()) != 0).float()
        self.step.add_((skipped == 0).long())
        row = (self.step // self._update_every - 1).clamp_(0, self._table.shape[0] - 1)
        self.weights.copy_(self._table.index_select(0, row.reshape(1)).reshape(-1))
        torch.maximum(skipped, (self.step % self._update_every != 0).float(), out=self._skip)
        self.num_updates.add_((self._skip == 0).long())
        return self._skip

    def counted(self) -> tuple[int, int, int]:
        """Return steps, updates, and the step of the latest update; waits for the device."""
        step = int(self.step)
        return step, int(self.num_updates), step // self._update_every * self._update_every

    def counting(self, step: int, num_updates: int) -> list[Step]:
        """Return the steps that set the counters."""
        return [partial(Tensor.fill_, self.step, step), partial(Tensor.fill_, self.num_updates, num_updates)]

    def replacing(self, decays: Decays) -> partial[Tensor]:
        """Return the call that writes the weights of other decays into the table, in place: graphs hold its address.

        Raises:
            ValueError: they need more rows than there are, or a table without an end. Nothing is changed.
        """
        table, rows = self._table_of(decays), self._table.shape[0]
        if len(table) > rows:
            raise ValueError(
                f"capturable=True: the table has room for {rows} updates, and {len(table)} are needed until these "
                "decays settle: build FastEMA with the largest decay it will have, and lower it by set_decay()"
            )
        table = torch.cat([table, table[-1:].expand(rows - len(table), -1)]).to(self._table.device)
        return partial(self._table.copy_, table)

    def _table_of(self, decays: Decays) -> Tensor:
        """Return the weights [updates, K], up to the row from which on they do not change."""
        every, last = self._update_every, decays.total_steps
        if not decays.settles and last is None:
            names = ", ".join(sorted({type(each).__name__ for each in decays.schedules if not each.settles}))
            raise ValueError(
                f"capturable=True needs total_steps with {names}: the schedule never reaches a fixed decay"
            )
        most = _MAX_ROWS if decays.settles else max(1, (last or 0) // every)
        rows: list[tuple[float, ...]] = []
        while len(rows) < most:
            rows.append(decays.at((len(rows) + 1) * every, len(rows) * every))
            if decays.settles and rows[-1] == decays.targets:
                break
        else:
            if decays.settles:
                raise ValueError(f"capturable=True: the schedule has not reached its decay after {most} updates")
        with torch.inference_mode(False):
            return 1.0 - torch.tensor(rows, dtype=torch.float64)


# ---- the number of updates of an AveragedModel, whose tensor may be on a GPU ----


class Counter:
    """Caches the value of a counter tensor; reads it again only if others wrote to it."""

    def __init__(self) -> None:
        self._tensor: Callable[[], Tensor | None] = lambda: None  # a weak reference to what was read
        self._mark = (0, 0)
        self._value: Any = None

    def read(self, tensor: Tensor) -> Any:
        """Return the value; on a GPU this waits only if it was written to since the last call."""
        if tensor.device.type == "cpu" or tensor.is_inference():  # no wait; inference tensors have no version
            return tensor.item()
        return self.remembered(tensor)

    def remembered(self, tensor: Tensor) -> Any:
        """Return the value as last read, unless the tensor is another one or was written to."""
        mark = (tensor.data_ptr(), tensor._version)
        if self._tensor() is not tensor or mark != self._mark:
            self._tensor, self._mark, self._value = weakref.ref(tensor), mark, tensor.item()
        return self._value

    def increase(self, tensor: Tensor) -> None:
        """Add one to the tensor, which was just read."""
        tensor.add_(1)
        if self._tensor() is tensor:
            self._mark, self._value = (tensor.data_ptr(), tensor._version), self._value + 1

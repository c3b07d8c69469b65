"""Step and weight in device memory, for captured CUDA graphs: a replay runs no Python, yet has the right decay.

The schedule is evaluated once, on the host, into a table on the device that a step indexes. So it has the very bits of
the eager path, works for every schedule that settles or has an end, and costs one tiny kernel a step; without native, a
dozen of torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastema import backends
from fastema.backends import native
from fastema.backends.streams import Streams
from fastema.decays import Decays

_MOST_ROWS = 1 << 22  # 32 MiB for one decay


class DeviceClock:
    """Counts optimizer steps on the device and looks their weights up.

    Args:
        decays: targets and schedule; the table of one that does not settle ends at its total_steps.
        update_every: as in FastEMA.
        device: where the model is.

    Raises:
        ValueError: the table would have no end.
    """

    def __init__(self, decays: Decays, update_every: int, device: torch.device) -> None:
        settles, last = decays.schedule.settles, decays.total_steps
        if not settles and last is None:
            name = type(decays.schedule).__name__
            raise ValueError(
                f"capturable=True needs total_steps with {name}: the schedule does not say that it settles at the decay"
            )
        targets = list(decays.targets)
        rows: list[list[float]] = []
        while not rows or (rows[-1] != targets if settles else len(rows) < (last or 0)):
            if len(rows) == _MOST_ROWS:
                raise ValueError(f"capturable=True: the schedule has not reached its decay after {_MOST_ROWS} steps")
            rows.append(decays.at(len(rows) + 1))
        with torch.inference_mode(False):
            self._table = (1.0 - torch.tensor(rows, dtype=torch.float64)).to(device)  # [rows, K]
            self._update_every = update_every
            self.step = torch.zeros((), dtype=torch.int64, device=device)
            self.num_updates = torch.zeros((), dtype=torch.int64, device=device)
            self.weights = torch.zeros(len(decays), dtype=torch.float64, device=device)
            self._skip = torch.zeros((), dtype=torch.float32, device=device)
        self._kernel = native.clock_kernel(device)
        self._streams = Streams(device, [self._table, self.step, self.num_updates, self.weights, self._skip])

    @torch.no_grad()
    def advance(self, found_inf: Tensor | None) -> Tensor:
        """One optimizer step on; none where `found_inf` is not 0.

        Returns:
            The float32 scalar that is not 0 where nothing is averaged; `weights` are those of the step.
        """
        (found_inf,) = backends.skips_on([self.step.device], found_inf)
        self._streams.note_current()
        if self._kernel is not None:
            counters = (self.step, self.num_updates, self.weights, self._skip)
            self._kernel(self._table, self._update_every, found_inf, *counters)
            return self._skip
        skipped = torch.zeros_like(self._skip) if found_inf is None else (found_inf.reshape(()) != 0).float()
        self.step.add_((skipped == 0).long())
        row = (self.step - 1).clamp_(0, self._table.shape[0] - 1)
        self.weights.copy_(self._table.index_select(0, row.reshape(1)).reshape(-1))
        torch.maximum(skipped, (self.step % self._update_every != 0).float(), out=self._skip)
        self.num_updates.add_((self._skip == 0).long())
        return self._skip

"""The steps of an average, counted on the host or on the device, and what the update at each of them is told."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastema import backends
from fastema.backends.contract import UpdateArgs
from fastema.core.checks import checked_count
from fastema.core.decays import Decays
from fastema.memory.atomic_steps import Step
from fastema.memory.streams import Streams

_MAX_ROWS = 1 << 22  # 32 MiB for one decay


class Counter(Protocol):
    """The steps and updates of an average, and its decays."""

    decays: Decays
    update_every: int
    skip_nonfinite: bool
    on_device: bool  # True: the device counts, and asking it waits
    known_updates: int  # those that the host knows of

    def begin(
        self, step: int | None, found_inf: Tensor | None, decay: float | Sequence[float] | None
    ) -> UpdateArgs | None:
        """Go on to the next step, or to `step`; for the arguments see `FastEMA.update`.

        Returns:
            What to average with; `end()` is to be called then. None: nothing is averaged at this step.
        """

    def end(self) -> None:
        """Count the update that `begin()` announced."""

    def counted(self) -> tuple[int, int, int]:
        """Return steps, updates, and the step of the latest update; waits for the device."""

    def set_steps(self, step: int, num_updates: int, last_update: int) -> list[Step]:
        """Return the steps that set the counters, for `run_atomically`."""

    def replace_steps(self, decays: Decays) -> list[Step]:
        """Return the steps that replace the decays, for `run_atomically`.

        Raises:
            ValueError: the device's table cannot hold them. Nothing is changed.
        """


def counter_of(decays: Decays, update_every: int, skip_nonfinite: bool, device: torch.device | None) -> Counter:
    """Return a counter in the memory of `device`; None: on the host.

    Args:
        decays, update_every: as in FastEMA.
        skip_nonfinite: what updates are told of elements that are not finite.

    Raises:
        ValueError: on a device a schedule that never settles, and has no end.
    """
    if device is None:
        return HostCounter(decays, update_every, skip_nonfinite)
    return DeviceCounter(decays, update_every, skip_nonfinite, device)


def state_of(counter: Counter) -> dict[str, Any]:
    """Return counters and decays, as a state has them."""
    step, num_updates, last_update = counter.counted()
    return {"step": step, "num_updates": num_updates, "last_update": last_update, **counter.decays.config()}


def load_steps(counter: Counter, state: dict[str, Any]) -> tuple[Decays, list[Step]]:
    """Return the decays of a saved state, and the steps that load them and its counters.

    Raises:
        ValueError: they cannot be loaded. Nothing is changed.
    """
    last = int(state["step"]) // counter.update_every * counter.update_every  # a state of 0.1.0 does not tell it
    step, num_updates, last_update = (
        checked_count(key, int(state.get(key, last)), at_least=0) for key in ("step", "num_updates", "last_update")
    )
    decays = counter.decays.of_state(state)
    return decays, [*counter.set_steps(step, num_updates, last_update), *counter.replace_steps(decays)]


def _refuse_no_tensor(found_inf: object) -> None:
    if not isinstance(found_inf, Tensor):
        raise TypeError(f"found_inf must be a float32 scalar tensor or None, got {found_inf!r}")


class HostCounter:
    """Counts on the host; see `counter_of`."""

    on_device = False

    def __init__(self, decays: Decays, update_every: int, skip_nonfinite: bool) -> None:
        self.decays = decays
        self.update_every = update_every
        self.skip_nonfinite = skip_nonfinite
        self._step = self.known_updates = self._last_update = 0
        self._next = 0  # the step that `begin()` announced
        self._args = UpdateArgs((), skip_nonfinite)  # of the latest update without `found_inf`, whose decays were:
        self._decays_of_args: tuple[float, ...] | None = None

    def begin(
        self, step: int | None, found_inf: Tensor | None, decay: float | Sequence[float] | None
    ) -> UpdateArgs | None:
        if found_inf is not None:
            _refuse_no_tensor(found_inf)
            if found_inf.device.type == "cpu" and bool(found_inf):
                return None
        if step is None:
            step = self._step + 1
        elif checked_count("step", step, at_least=1) > self.update_every and self._step == 0 and decay is None:
            self.decays.warn_of_a_late_start(step, self.update_every)
        if step % self.update_every:
            self._step = step
            return None
        if decay is None:
            decays = self.decays.at(step, self._last_update)
        else:
            decays = self.decays.checked(decay, "update(decay=)")
        self._next = step
        if found_inf is not None:
            return UpdateArgs([1.0 - each for each in decays], self.skip_nonfinite, found_inf)
        if decays is not self._decays_of_args:  # once they have settled, they are always the same object
            self._args = UpdateArgs([1.0 - each for each in decays], self.skip_nonfinite)
            self._decays_of_args = decays
        return self._args

    def end(self) -> None:
        self.known_updates += 1
        self._step = self._last_update = self._next

    def counted(self) -> tuple[int, int, int]:
        return self._step, self.known_updates, self._last_update

    def set_steps(self, step: int, num_updates: int, last_update: int) -> list[Step]:
        values = {"_step": step, "known_updates": num_updates, "_last_update": last_update}
        return [partial(setattr, self, name, value) for name, value in values.items()]

    def replace_steps(self, decays: Decays) -> list[Step]:
        return [partial(setattr, self, "decays", decays)]


class DeviceCounter:
    """Counts in device memory, so that a replayed CUDA graph has the right decay without running Python.

    The schedule is evaluated once, on the host, into a table on the device. So the weights have the bits of the eager
    path, for every schedule that settles or has an end. An update reads its row in one small kernel, or in a dozen
    torch operations where the CUDA kernels cannot run. The table of a schedule that does not settle ends at its
    total_steps. See `counter_of`.
    """

    on_device = True
    known_updates = 0

    def __init__(self, decays: Decays, update_every: int, skip_nonfinite: bool, device: torch.device) -> None:
        self.decays = decays
        self.update_every = update_every
        self.skip_nonfinite = skip_nonfinite
        table = self._table_of(decays)
        with torch.inference_mode(False):
            self._table = table.to(device)  # [updates, K]
            self.step = torch.zeros((), dtype=torch.int64, device=device)
            self.num_updates = torch.zeros((), dtype=torch.int64, device=device)
            self.weights = torch.zeros(len(decays), dtype=torch.float64, device=device)
            self._skip = torch.zeros((), dtype=torch.float32, device=device)
        self._args = UpdateArgs([0.0] * len(decays), skip_nonfinite, self._skip, self.weights)
        self._launch = backends.device_schedule_launch(device)
        self._streams = Streams(device, [self._table, self.step, self.num_updates, self.weights, self._skip])

    def begin(
        self, step: int | None, found_inf: Tensor | None, decay: float | Sequence[float] | None
    ) -> UpdateArgs | None:
        if found_inf is not None:
            _refuse_no_tensor(found_inf)
        if step is not None or decay is not None:
            raise ValueError("capturable=True counts its own steps on the device: call update() without step or decay")
        self._advance(found_inf)
        return self._args

    def end(self) -> None:
        pass  # counted by the device

    @torch.no_grad()
    def _advance(self, found_inf: Tensor | None) -> None:
        """Count one optimizer step, unless `found_inf` is not 0, and set `weights`, and whether nothing is averaged."""
        self._streams.note_current()
        fits = found_inf is None or (found_inf.dtype == torch.float32 and found_inf.device == self._skip.device)
        if self._launch is not None and fits:
            self._launch(
                self._table, self.update_every, found_inf, self.step, self.num_updates, self.weights, self._skip
            )
            return
        skipped = torch.zeros_like(self._skip) if found_inf is None else (found_inf.reshape(()) != 0).float()
        self.step.add_((skipped == 0).long())
        row = (self.step // self.update_every - 1).clamp_(0, self._table.shape[0] - 1)
        self.weights.copy_(self._table.index_select(0, row.reshape(1)).reshape(-1))
        torch.maximum(skipped, (self.step % self.update_every != 0).float(), out=self._skip)
        self.num_updates.add_((self._skip == 0).long())

    def skipping(self) -> UpdateArgs:
        """Return what tells an update to do nothing, with everything else as for one that averages."""
        return self._args._replace(skip=torch.ones_like(self._skip))

    def counted(self) -> tuple[int, int, int]:
        step = int(self.step)
        return step, int(self.num_updates), step // self.update_every * self.update_every

    def set_steps(self, step: int, num_updates: int, last_update: int) -> list[Step]:
        return [partial(Tensor.fill_, self.step, step), partial(Tensor.fill_, self.num_updates, num_updates)]

    def replace_steps(self, decays: Decays) -> list[Step]:
        """Return the steps that write the weights of other decays into the table, in place: graphs hold its address."""
        if decays is self.decays:
            return []
        table, rows = self._table_of(decays), self._table.shape[0]
        if len(table) > rows:
            raise ValueError(
                f"capturable=True: the table has room for {rows} updates, and {len(table)} are needed until these "
                "decays settle: build FastEMA with the largest decay it will have, and lower it by set_decay()"
            )
        table = torch.cat([table, table[-1:].expand(rows - len(table), -1)]).to(self._table.device)
        return [partial(self._table.copy_, table), partial(setattr, self, "decays", decays)]

    def _table_of(self, decays: Decays) -> Tensor:
        """Return the weights [updates, K], up to the row from which on they do not change."""
        every, last = self.update_every, decays.total_steps
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


class CounterTensor:
    """The value of a counter tensor, cached; read again only if others wrote to it."""

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

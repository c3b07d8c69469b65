"""Snapshots of all averages of a FastEMA, from which `synthesize` makes others."""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastema.core import sharded, state
from fastema.core.checks import checked_count
from fastema.core.writing import BackgroundWriter
from fastema.posthoc import snapshot_files as files
from fastema.posthoc.profiles import profiles_of
from fastema.posthoc.snapshot_files import COPY, Manifest, SnapshotError, tensor_key

if TYPE_CHECKING:
    from fastema.ema import FastEMA


class Snapshots:
    """Save all averages of a FastEMA to a folder, each time in a file of their own.

    Build it after a checkpoint is loaded, and call `save()` after every update. A run resumed at step t sets aside the
    snapshots of later steps, which the run before it wrote.

    Args:
        folder: of one run; made if it is not there. All processes of a sharded model must see it.
        ema: of schedules with a known profile: "power", "constant", "half_life".
        every: save at every so many optimizer steps.
        at: save at these optimizer steps, too. With neither, each `save()` saves.
        total_steps: of the run, whose last step is saved, too; for the disk use that is printed.
        limit: at most so many snapshots are kept: the one whose neighbours are closest to each other goes.
        dtype: torch.float32 (float64 averages stay so), or torch.float16 for half the disk: its rounding error is
            measured and told with every average that is made from it.
        verbose: print `disk_use()` now.

    Raises:
        ValueError: an argument out of range, or a schedule whose profile is not known.
        SnapshotError: the folder has snapshots of another model or of other averages; safetensors is not installed.

    Examples:
        >>> import tempfile
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = FastEMA(model, decay_type="power", sigma_rel=[0.05, 0.10])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     snapshots = Snapshots(folder, ema, every=2, verbose=False)
        ...     for step in range(4):
        ...         ema.update()
        ...         _ = snapshots.save()
        ...     sorted(synthesize(folder, sigma_rel=0.1))
        ['bias', 'weight']
    """

    def __init__(
        self,
        folder: str | Path,
        ema: FastEMA,
        *,
        every: int | None = None,
        at: Iterable[int] = (),
        total_steps: int | None = None,
        limit: int | None = None,
        dtype: torch.dtype = torch.float32,
        verbose: bool = True,
    ) -> None:
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"dtype must be torch.float32 or torch.float16, got {dtype!r}")
        self._folder, self._ema, self._dtype = Path(folder), ema, dtype
        self._every = None if every is None else checked_count("every", every, at_least=1)
        self._at = frozenset(checked_count("at", step, at_least=1) for step in at)
        self._total_steps = None if total_steps is None else checked_count("total_steps", total_steps, at_least=1)
        self._limit = None if limit is None else checked_count("limit", limit, at_least=2)
        self._sharded = ema.engine.averages.is_sharded
        if not self._sharded:
            files.require_safetensors()
        self._built_at = ema.counter.counted()[2]  # snapshots of later steps are of a run before this one
        self._background = BackgroundWriter()
        self._run: str | None = None
        self._latest: Manifest | None = None
        self._folder.mkdir(parents=True, exist_ok=True)
        own = self._manifest(0, self._contents(), 0.0)
        # The first process may be at its first snapshot already, and set others aside, while the others are here.
        files.on_first_process(lambda: self._refuse_others(own, files.paths_in(self._folder)), self._sharded)
        if verbose and files.rank() == 0:
            print(self.disk_use())

    def save(self, background: bool = False) -> Path | None:
        """Save a snapshot, if one is due at the EMA's step. All processes must call it.

        Args:
            background: True to copy the averages into host memory, as much as the file takes, and write them in a
                thread while training goes on. A second save first waits for the one before, and uses its memory: there
                is one copy, until `synchronize()` frees it. What goes wrong in the thread is raised by the next `save`
                or `synchronize`, and is a warning at once. The process does not end before the file is written. Not of
                a sharded model, whose processes write together.

        Returns:
            Where it is, or will be; None if none was due, or on a process that writes nothing.

        Raises:
            SnapshotError: it cannot be written; what was there before is untouched.
            ValueError: float16 cannot hold a value; the schedule has changed in mid-run; or `background` of a sharded
                model.
        """
        if background and self._sharded:
            raise ValueError("background=True: the processes of a sharded model write together; call save()")
        self._background.raise_error()
        counted, _, step = self._ema.counter.counted()
        if step == 0 or not self._is_due(counted):
            return None
        self._background.wait()
        if not self._sharded and files.rank() != 0:
            return None  # every process has the same averages
        contents = self._contents()
        values = self._values(contents)
        before = files.paths_in(self._folder) if files.rank() == 0 else {}
        manifest = self._manifest(step, contents, self._rounding(values))
        changed = None if self._latest is None else self._latest.difference(manifest)
        if changed is not None:
            raise SnapshotError(f"the averages changed in mid-run: {changed}. Their profiles are not known any more")
        if self._run is None:
            before = self._set_later_aside(before, min(self._built_at, step))
            last = files.on_first_process(partial(self._refuse_others, manifest, before), self._sharded)
            self._run = last.run if last is not None else uuid.uuid4().hex
        manifest = self._latest = replace(manifest, run=self._run)
        earlier = self._set_later_aside(before, step)  # also where a checkpoint was loaded in mid-run
        path = files.path_of(self._folder, step, self._sharded)
        if self._sharded:
            files.write_sharded(path, manifest, {key: self._stored(key, value()) for key, value in values.items()})
            if files.rank() == 0:
                self._thin({**earlier, step: path})
            return path
        tensors: dict[str, Callable[[], Tensor]] = {
            key: partial(self._on_cpu, key, value) for key, value in values.items()
        }
        if background:
            copies = self._copies(tensors, contents)
            tensors = {key: partial(copies.__getitem__, key) for key in copies}

        def write() -> None:
            files.write(path, manifest, tensors)
            self._thin({**earlier, step: path})

        if background:
            self._background.start(write)
        else:
            write()
        return path

    def synchronize(self) -> None:
        """Wait until a snapshot that is written in the background is on the disk, and free the memory of its copy.

        Raises:
            SnapshotError: it was not written; raised once.
        """
        self._background.synchronize()

    def disk_use(self) -> str:
        """Return a line that says what the snapshots will take."""
        contents = self._contents()
        averages = sum(average.numel() * self._dtype_of(average).itemsize for _, average in contents.averaged.values())
        each = self._ema.engine.count * averages + sum(value.nbytes for value in contents.copied.values())
        counts = [len(self._at)] if self._at else []
        if self._every is not None and self._total_steps is not None:
            counts = [len({*range(self._every, self._total_steps + 1, self._every), *self._at, self._total_steps})]
        most = min([*counts, *([self._limit] if self._limit is not None else [])], default=None)
        free = shutil.disk_usage(self._folder).free
        if most is not None and most * each > free:
            warnings.warn(
                f"{most} snapshots take {_bytes(most * each)}, but {self._folder} has {_bytes(free)} free", stacklevel=3
            )
        total = "" if most is None else f", {most} of them {_bytes(most * each)}"
        name = str(self._dtype).removeprefix("torch.")
        return (
            f"fastema: a snapshot of {self._ema.engine.count} averages in {name} takes {_bytes(each)}{total}, in "
            f"{self._folder} ({_bytes(free)} free)"
        )

    # ---- inside ----

    def _is_due(self, step: int) -> bool:
        if self._every is None and not self._at:
            return True
        return (self._every is not None and step % self._every == 0) or step in self._at or step == self._total_steps

    def _contents(self) -> _Contents:
        """Return what is stored, each tensor once, without copying any average."""
        if not self._ema.is_applied:
            self._ema.engine.ensure_current()
        weights = self._ema.engine.averages.weights(0)
        averages = state.by_name(
            [(pair, average) for pair, average in weights if pair.rule == "average" and pair.is_saved], False
        )
        own_names = {_place(average): name for name, average in averages.items() if average.numel()}
        contents = _Contents({}, {}, {})
        first: dict[Any, str] = {}
        for name, value in self._ema.engine.model_state(0, weights).items():
            if not isinstance(value, Tensor):
                continue
            value, place = value.detach(), _place(value)
            if value.numel() and first.setdefault(place, name) != name:
                contents.names[name] = first[place]
            elif place in own_names:
                contents.averaged[name] = own_names[place], value
            else:
                contents.copied[name] = value
        unseen = own_names.keys() - first.keys()
        if unseen:
            raise ValueError(
                f"{own_names[min(unseen)]!r} is not in the model's state_dict() as it is in the model: a hook splits, "
                "casts or copies it, and snapshots cannot tell what of the state is averaged"
            )
        return contents

    def _values(self, contents: _Contents) -> dict[str, Callable[[], Tensor]]:
        """Return functions that give each tensor by key: a float32 average of bfloat16 weights is a copy."""
        values: dict[str, Callable[[], Tensor]] = {}
        for which in range(self._ema.engine.count):
            averages = state.stored_by_name(self._ema.engine.averages, which)
            for name, (own_name, _) in contents.averaged.items():
                values[tensor_key(which, name)] = averages[own_name].value
        for name, value in contents.copied.items():
            values[tensor_key(COPY, name)] = value.detach
        return values

    def _dtype_of(self, average: Tensor) -> torch.dtype:
        """Return the dtype in which an average is stored."""
        if average.is_complex() or (average.dtype == torch.float64 and self._dtype == torch.float32):
            return average.dtype
        return self._dtype

    def _stored(self, key: str, value: Tensor) -> Tensor:
        return value if key.startswith(f"{COPY}/") else value.to(self._dtype_of(value))

    def _on_cpu(self, key: str, value: Callable[[], Tensor]) -> Tensor:
        # Views by conj() and by its imag have the bytes of their base.
        return self._stored(key, value()).cpu().contiguous().resolve_conj().resolve_neg()

    def _copies(self, tensors: dict[str, Callable[[], Tensor]], contents: _Contents) -> dict[str, Tensor]:
        """Return tensors that nothing else writes to: cloned where they were not made for the snapshot anyway."""
        views = [average.view for pair in self._ema.engine.averages.pairs for average in pair.averages]
        in_use = {tensor.untyped_storage()._cdata for tensor in (*views, *contents.copied.values())}
        copies = {}
        for key, tensor in tensors.items():
            copies[key] = made = tensor()
            if made.numel() and made.untyped_storage()._cdata in in_use:
                copies[key] = self._background.memory(made.nbytes).view(made.dtype).view(made.shape).copy_(made)
        return copies

    def _rounding(self, values: dict[str, Callable[[], Tensor]]) -> float:
        """Return the relative L2 error of rounding to the stored dtype.

        Raises:
            ValueError: a value is beyond its range; on every process.
        """
        if self._dtype == torch.float32:
            return 0.0
        squares, beyond = torch.zeros(2, dtype=torch.float64), None
        for key, given in values.items():
            value = given()
            stored = self._stored(key, value)
            if stored.dtype != value.dtype:
                was, now = (sharded.local_part(each).to("cpu", torch.float64) for each in (value, stored))
                finite = was.isfinite()
                beyond = beyond or (key if bool((now.isinf() & finite).any()) else None)
                squares += torch.stack([(now - was)[finite].square().sum(), was[finite].square().sum()])
        everywhere: list[Any] = [(squares, beyond)]
        if self._sharded:
            import torch.distributed as dist

            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, (squares, beyond))
        for _, key in everywhere:
            if key is not None:
                raise ValueError(f"{key!r} has values beyond 65,504, the largest of float16: use dtype=torch.float32")
        squares = torch.stack([each for each, _ in everywhere]).sum(0)
        return float((squares[0] / squares[1]).sqrt()) if squares[1] else 0.0

    def _manifest(self, step: int, contents: _Contents, rounding: float) -> Manifest:
        averaged = {
            name: _described(average, self._dtype_of(average)) for name, (_, average) in contents.averaged.items()
        }
        copied = {name: _described(value, value.dtype) for name, value in contents.copied.items()}
        every = self._ema.counter.update_every
        profiles = profiles_of(self._ema.counter.decays, every)
        return Manifest(self._run or "", step, every, profiles, averaged, copied, contents.names, rounding)

    def _refuse_others(self, own: Manifest, paths: dict[int, Path]) -> Manifest | None:
        """Return the manifest of the latest snapshot; raise where one is of another model."""
        found = None
        for path in paths.values():
            found = files.manifest_of(path)
            difference = own.difference(found)
            if difference is not None:
                raise SnapshotError(
                    f"{path} is of another model or run: {difference}. Give each run a folder of its own"
                )
        return found

    def _set_later_aside(self, paths: dict[int, Path], step: int) -> dict[int, Path]:
        """Move snapshots of later steps away; return the others."""
        later = {at: path for at, path in paths.items() if at > step}
        earlier = {at: path for at, path in paths.items() if at <= step}
        if later:
            aside = self._folder / f"set-aside-{uuid.uuid4().hex[:8]}"
            aside.mkdir()
            for path in later.values():
                path.rename(aside / path.name)
            warnings.warn(
                f"{self._folder} had {len(later)} snapshots of steps {min(later):,} to {max(later):,}, later than this "
                f"run's {step:,}: they are in {aside.name} now",
                stacklevel=3,
            )
        return earlier

    def _thin(self, paths: dict[int, Path]) -> None:
        """Delete snapshots until the limit holds, those first whose neighbours are closest; the newest stays."""
        steps = sorted(paths)
        while self._limit is not None and len(steps) > self._limit:
            gaps = [after - before for before, after in zip([0, *steps], steps[1:], strict=False)]
            step = steps.pop(gaps.index(min(gaps)))
            files.remove(paths[step])


@dataclass(frozen=True)
class _Contents:
    """The tensors of a snapshot under their first names in the model's state."""

    averaged: dict[str, tuple[str, Tensor]]  # the name in the shadow; the first average, or the high plane of it
    copied: dict[str, Tensor]
    names: dict[str, str]  # further names of tied tensors, to the first


def _place(tensor: Any) -> tuple[int, torch.Size, tuple[int, ...]]:
    local = sharded.local_part(tensor)
    return local.data_ptr(), local.shape, local.stride()


def _described(tensor: Tensor, dtype: torch.dtype) -> tuple[str, tuple[int, ...]]:
    return str(dtype).removeprefix("torch."), tuple(tensor.shape)


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError

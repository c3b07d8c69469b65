"""Averages made from snapshots: one weighted sum of files for each, all of them in one pass over the files."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastema.posthoc import snapshot_files as files
from fastema.posthoc.profiles import Fit, Profile, constant_decay, fit, power, reachable, uniform, weighted
from fastema.posthoc.snapshot_files import COPY, Manifest, Reader, SnapshotError, tensor_key

_AT_ONCE = 1 << 26  # elements read from a snapshot before they are added up


class Averaged(OrderedDict[str, Tensor]):
    """A state dict, `model.load_state_dict(it)` works; and how it was made.

    Args:
        target: the profile that was asked for.
        step: the optimizer step that it stands for.
        fit: coefficients, and the relative L2 error of the profile.
        rounding: the bound on what rounding of the snapshots (float16) adds, relative to the weights.
    """

    def __init__(self, target: Profile, step: int, fit: Fit, rounding: float) -> None:
        super().__init__()
        self.target, self.step, self.fit, self.rounding = target, step, fit, rounding

    @property
    def error(self) -> float:
        """The relative L2 distance between the profile and the one asked for."""
        return self.fit.error

    def __reduce__(self) -> Any:
        # torch.save() writes a plain state dict, which torch.load(weights_only=True) accepts.
        return OrderedDict, (), None, None, iter(self.items())

    def __str__(self) -> str:
        rounded = f", rounding up to {self.rounding:.1e} of the weights" if self.rounding else ""
        used = sum(coefficient != 0.0 for coefficient in self.fit.coefficients)
        return (
            f"{self.target} at step {self.step:,}: profile error {self.error:.2%}, from {used} averages, "
            f"coefficients sum to 1 (absolute values to {self.fit.amplification:.2f}){rounded}"
        )

    __repr__ = __str__


def synthesize(
    folder: str | Path,
    *,
    sigma_rel: float | None = None,
    gamma: float | None = None,
    decay: float | None = None,
    window: int | None = None,
    weights: Sequence[float] | None = None,
    step: int | None = None,
    max_error: float = 0.25,
) -> Averaged:
    """Return the model averaged with another profile than those that were stored.

    Args:
        folder: what `Snapshots` wrote.
        sigma_rel: the standard deviation of a power profile, relative to the run; or
        gamma: its exponent; or
        decay: a constant decay, as FastEMA would have averaged with it in this run; or
        window: the plain mean of so many last steps; or
        weights: relative weights of equal parts of the run, the first part first.
        step: a step with a snapshot; None: the last.
        max_error: the largest profile error that is accepted.

    Returns:
        A state dict with attributes: `error` (relative L2 error of the profile), `fit`, `rounding`, `step`. What is not
        averaged, such as counters, comes from the snapshot of `step`.

    Raises:
        ValueError: not one profile was asked for, or it is out of range, or it cannot be reached; says which can.
        SnapshotError: no snapshots, a damaged one, or those of several runs.
    """
    given = {"sigma_rel": sigma_rel, "gamma": gamma, "decay": decay, "window": window, "weights": weights}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise ValueError(f"give one of {', '.join(given)}; got {', '.join(chosen) or 'none'}")
    last = _manifests(Path(folder), step)[-1]
    start = last.profiles[0].start
    if sigma_rel is not None or gamma is not None:
        target = power(sigma_rel, gamma, start)
    elif decay is not None:
        target = constant_decay(decay, last.update_every, start)
    else:
        target = uniform(window) if window is not None else weighted(weights or (), start)
    return synthesize_all(folder, [target], step, max_error)[0]


def synthesize_all(
    folder: str | Path, targets: Sequence[Profile], step: int | None = None, max_error: float = 0.25
) -> list[Averaged]:
    """Return an average for each target; every snapshot is read once for all of them.

    It holds one model for each target, in the dtype of the averages, and a part of one in float64.

    Args:
        folder, step, max_error: as for `synthesize`.
        targets: profiles, from `power`, `constant_decay`, `uniform`, `weighted`.

    Raises:
        ValueError, SnapshotError: as `synthesize`.
    """
    folder = Path(folder)
    manifests = _manifests(folder, step)
    last = manifests[-1]
    fits = _fits(manifests, targets, max_error)
    count = len(last.profiles)
    rounding = [each.rounding for each in manifests for _ in range(count)]
    results = [
        Averaged(target, last.step, found, sum(abs(x) * e for x, e in zip(found.coefficients, rounding, strict=True)))
        for target, found in zip(targets, fits, strict=True)
    ]
    # [target][snapshot][which]
    shares = [[f.coefficients[i : i + count] for i in range(0, len(f.coefficients), count)] for f in fits]
    with contextlib.ExitStack() as stack:
        paths = files.paths_in(folder)
        readers = [stack.enter_context(files.reading(paths[each.step])) for each in manifests]
        parts: dict[str, list[Tensor]] = {}
        for names in _groups(last):
            parts.update(_summed(readers, names, shares, last))
        copied = readers[-1].read([tensor_key(COPY, name) for name in last.copied])
    for which, result in enumerate(results):
        for name in last.averaged:
            result[name] = parts[name][which]
        for name in last.copied:
            result[name] = copied[tensor_key(COPY, name)].clone()
        for name, first in last.names.items():
            result[name] = result[first]
    return results


def errors_of(
    stored: Sequence[Profile], snapshots: int, targets: Sequence[Profile], total_steps: int = 8192
) -> list[Fit]:
    """Return how well evenly spaced snapshots will reproduce the targets at the end of a run.

    Examples:
        >>> [f"{each.error:.1%}" for each in errors_of([power(0.05), power(0.10)], 16, [power(0.03), power(0.15)])]
        ['3.9%', '0.9%']
    """
    steps = [max(1, round(total_steps * (i + 1) / snapshots)) for i in range(snapshots)]
    return fit([(profile, step) for step in steps for profile in stored], targets, total_steps)


def snapshots_in(folder: str | Path) -> list[Manifest]:
    """Return what the snapshots of a folder are of, ascending by step.

    Raises:
        SnapshotError: none there, a damaged one, or those of several runs or models.
    """
    return _manifests(Path(folder), None)


# ---- inside ----


def _manifests(folder: Path, step: int | None) -> list[Manifest]:
    """Return the manifests of the snapshots up to `step`, which must be one of them."""
    if not folder.is_dir():
        raise SnapshotError(f"there is no folder {folder}")
    paths = files.paths_in(folder)
    if not paths:
        raise SnapshotError(f"{folder} has no snapshots (step-*.safetensors)")
    if step is not None and step not in paths:
        listed = ", ".join(map(str, list(paths)[-8:]))
        raise SnapshotError(
            f"there is no snapshot of step {step} in {folder}; there are {len(paths)}, the last {listed}"
        )
    found = [files.manifest_of(path) for at, path in paths.items() if step is None or at <= step]
    for at, path, each in zip(paths, paths.values(), found, strict=False):
        if each.step != at:
            raise SnapshotError(f"{path} is of step {each.step}, not of the step in its name: it was renamed")
        if each.run != found[-1].run:
            raise SnapshotError(f"{path} is of another run than {paths[found[-1].step].name}: give each run its folder")
        difference = found[-1].difference(each)
        if difference is not None:
            raise SnapshotError(f"{path} is of another model than {paths[found[-1].step].name}: {difference}")
    return found


def _fits(manifests: Sequence[Manifest], targets: Sequence[Profile], max_error: float) -> list[Fit]:
    stored = [(profile, each.step) for each in manifests for profile in each.profiles]
    step, every, start = manifests[-1].step, manifests[-1].update_every, manifests[-1].profiles[0].start
    for target in targets:
        if target.kind == "uniform" and target.values[0] > step - start:
            raise ValueError(f"window must be at most {step - start}, the steps so far; got {target.values[0]:.0f}")
    found = fit(stored, targets, step, every)
    for target, each in zip(targets, found, strict=True):
        if not each.error <= max_error:
            raise ValueError(
                f"{target} cannot be made from the {len(manifests)} snapshots up to step {step:,}: its profile would "
                f"be {each.error:.0%} off, more than {max_error:.0%}. They reach "
                f"{reachable(stored, step, max_error, start, every)}"
            )
    return found


def _groups(manifest: Manifest) -> Iterator[list[str]]:
    """Yield names of tensors to add up together."""
    group: list[str] = []
    size = 0
    for name, (_, shape) in manifest.averaged.items():
        group.append(name)
        size += torch.Size(shape).numel()
        if size >= _AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _summed(
    readers: Sequence[Reader], names: list[str], shares: list[list[list[float]]], last: Manifest
) -> dict[str, list[Tensor]]:
    """Return the weighted sums of these tensors, by name, one for each target."""
    wide = {name: _wide(last.averaged[name][0]) for name in names}
    sums = {
        name: [torch.zeros(last.averaged[name][1], dtype=wide[name][0]) for _ in shares] for name in names
    }  # [targets], float64
    for i, reader in enumerate(readers):
        used = [w for w in range(len(last.profiles)) if any(share[i][w] != 0.0 for share in shares)]
        if not used:
            continue
        tensors = reader.read([tensor_key(w, name) for w in used for name in names])
        for name in names:
            for w in used:
                value = tensors.pop(tensor_key(w, name)).to(wide[name][0])
                for target, share in enumerate(shares):
                    if share[i][w] != 0.0:
                        sums[name][target].add_(value, alpha=share[i][w])
    return {name: [each.to(wide[name][1]) for each in sums[name]] for name in names}


def _wide(dtype: str) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes to add up in and to hand out."""
    if dtype.startswith("complex"):
        return torch.complex128, getattr(torch, dtype)
    return torch.float64, torch.float64 if dtype == "float64" else torch.float32

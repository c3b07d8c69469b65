"""Profiles, the share that the weights of each step have in an average, and the fit of one profile by others.

A profile is given by its cumulative share: F(s) is what the initial weights and the steps up to s count for together,
so F is 1 at the average's own step. Steps between two updates count at the later one, as in the updates, so averages
that are updated at every tenth step have the same F at these steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastema.core.checks import checked_count, checked_decay
from fastema.core.decays import Decays
from fastema.schedules import ConstantDecay, HalfLifeDecay, PowerDecay, gamma_of, sigma_rel_of

_FINEST = 1 << 13  # bins of a long run, besides those at the steps that matter


@dataclass(frozen=True)
class Profile:
    """The share of each step in an average; make one with `power`, `constant_decay`, `uniform` or `weighted`.

    Args:
        kind: "power", "decay", "uniform" or "weights".
        values: gamma; decay and update_every; the number of steps; or relative weights.
        start: the step before which nothing counts (update_after_step).
    """

    kind: str
    values: tuple[float, ...]
    start: int = 0

    def cumulative(self, steps: Tensor, step: int) -> Tensor:
        """Return F at `steps` of the average at `step`.

        Args:
            steps: [n], float64, ascending.
            step: of the average.
        """
        since, length = (steps - self.start).clamp(min=0), step - self.start
        if self.kind == "power":
            return (since / length).clamp(max=1.0) ** (self.values[0] + 1.0)
        if self.kind == "decay":
            decay, every = self.values
            updates = (step // int(every) - steps.clamp(self.start, step) // every).clamp(min=0)
            return torch.where(
                steps < self.start // every * every, 0.0, torch.tensor(decay, dtype=torch.float64) ** updates
            )
        if self.kind == "uniform":
            return ((steps - (step - self.values[0])) / self.values[0]).clamp(0.0, 1.0)
        shares = torch.tensor(self.values, dtype=torch.float64)
        knots = torch.cat([torch.zeros(1, dtype=torch.float64), (shares / shares.sum()).cumsum(0)])
        place = (since / length).clamp(max=1.0) * len(self.values)
        left = place.floor().clamp(max=len(self.values) - 1).long()
        return knots[left] + (place - left) * (knots[left + 1] - knots[left])

    def edges(self, step: int) -> list[int]:
        """Return the steps at which the profile has a corner."""
        if self.kind == "uniform":
            return [step - int(self.values[0])]
        if self.kind == "weights":
            length = step - self.start
            return [self.start + round(length * part / len(self.values)) for part in range(len(self.values))]
        return [self.start]

    def __str__(self) -> str:
        if self.kind == "power":
            return f"sigma_rel {sigma_rel_of(self.values[0]):.4g}"
        if self.kind == "decay":
            return f"decay {self.values[0]:.8g}" + (f" at every {self.values[1]:g} steps" if self.values[1] > 1 else "")
        if self.kind == "uniform":
            return f"mean of the last {self.values[0]:,.0f} steps"
        return f"weights {','.join(f'{value:g}' for value in self.values)}"

    def plain(self) -> dict[str, Any]:
        """Return the profile for JSON."""
        return {"kind": self.kind, "values": list(self.values), "start": self.start}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Profile:
        """Return the profile of what `plain()` returned."""
        return cls(str(plain["kind"]), tuple(float(value) for value in plain["values"]), int(plain["start"]))


def power(sigma_rel: float | None = None, gamma: float | None = None, start: int = 0) -> Profile:
    """Return the profile of the "power" schedule.

    Raises:
        ValueError: neither or both are given, or out of range.
    """
    return Profile("power", (PowerDecay(sigma_rel, gamma).gamma,), start)


def constant_decay(decay: float, update_every: int = 1, start: int = 0) -> Profile:
    """Return the profile of a constant decay, which keeps a rest of the initial weights."""
    return Profile("decay", (checked_decay(decay), float(checked_count("update_every", update_every, 1))), start)


def uniform(steps: int) -> Profile:
    """Return the plain mean of the last `steps` steps (LAWA, a model soup of one run)."""
    return Profile("uniform", (float(checked_count("window", steps, 1)),))


def weighted(weights: Sequence[float], start: int = 0) -> Profile:
    """Return the profile that gives equal parts of the run these relative weights, the first part first."""
    values = tuple(float(weight) for weight in weights)
    if not values or not all(0 <= value < math.inf for value in values) or not sum(values) > 0:
        raise ValueError(f"weights must be numbers of at least 0, not all 0; got {list(weights)!r}")
    return Profile("weights", values, start)


def profiles_of(decays: Decays, update_every: int) -> list[Profile]:
    """Return the profile of each average of a FastEMA.

    Raises:
        ValueError: a schedule whose profile is not known in closed form.
    """
    found = []
    for schedule, target in zip(decays.schedules, decays.targets, strict=True):
        if isinstance(schedule, PowerDecay):
            found.append(power(gamma=schedule.gamma, start=decays.update_after_step))
        elif type(schedule) is ConstantDecay:
            found.append(constant_decay(target, update_every, decays.update_after_step))
        elif isinstance(schedule, HalfLifeDecay) and schedule.rampup_ratio is None:
            a_step = 2.0 ** (-schedule.batch_size / schedule.half_life)
            found.append(constant_decay(a_step, 1, decays.update_after_step))
        else:
            raise ValueError(
                f"snapshots need schedules with a known profile: power, constant or half_life; got {decays.type!r}. "
                'FastEMA(model, decay_type="power", sigma_rel=[0.05, 0.10]) serves sigma_rel 0.03 to 0.2'
            )
    return found


class Fit(NamedTuple):
    """A combination of stored averages.

    Args:
        coefficients: one for each stored average; their sum is 1.
        error: the relative L2 distance between its profile and the one wanted.
        amplification: the sum of the coefficients' absolute values: by so much rounding errors of the snapshots grow.
    """

    coefficients: list[float]
    error: float
    amplification: float


def fit(
    stored: Sequence[tuple[Profile, int]], targets: Sequence[Profile], step: int, update_every: int = 1
) -> list[Fit]:
    """Return the combinations of stored averages that come closest to each target at `step`.

    Profiles are compared by what they give to each bin of steps, over the square root of the bin's width: their L2
    distance. In runs of up to 8,192 updates a bin is an update, and the comparison is exact.

    Args:
        stored: profile and step of each average at hand; none is later than `step`.
        targets: what is wanted.
        step: of the targets.
        update_every: of the FastEMA.
    """
    corners = [each for _, each in stored] + [edge for profile, at in stored for edge in profile.edges(at)]
    corners += [edge for profile in targets for edge in profile.edges(step)]
    edges = _grid(step, corners, update_every)
    width = torch.cat([torch.ones(1, dtype=torch.float64), edges.diff()]).sqrt()

    def masses(profile: Profile, at: int) -> Tensor:
        share = profile.cumulative(edges.clamp(max=at), at)
        return torch.cat([share[:1], share.diff()]) / width  # [1 + bins]; the first is the initial weights'

    columns = torch.stack([masses(profile, at) for profile, at in stored], dim=1)  # [1 + bins, stored]
    return [_closest(columns, masses(target, step)) for target in targets]


def _closest(columns: Tensor, wanted: Tensor) -> Fit:
    """Return the least-squares combination whose coefficients sum to 1."""
    # The sum is kept by solving for differences from one column: the closest, so that a stored one is found exactly.
    base = int((columns - wanted[:, None]).square().sum(0).argmin())
    others = [which for which in range(columns.shape[1]) if which != base]
    differences = columns[:, others] - columns[:, base : base + 1]
    rest = wanted - columns[:, base]
    solved = torch.zeros(columns.shape[1], dtype=torch.float64)
    if others and bool(rest.any()):
        solved[others] = torch.linalg.lstsq(differences, rest[:, None], driver="gelsd").solution[:, 0]
    solved[base] = 1.0 - solved.sum()
    error = float((columns @ solved - wanted).norm() / wanted.norm())
    return Fit(solved.tolist(), error, float(solved.abs().sum()))


def _grid(last: int, corners: Sequence[int], every: int) -> Tensor:
    """Return the bins' edges from 0 to `last`: every update, or of a long run denser where snapshots may be dense."""
    at = torch.tensor([corner for corner in corners if 0 <= corner <= last], dtype=torch.float64)
    updates = last // every
    if updates <= _FINEST:
        return torch.cat([torch.arange(updates + 1, dtype=torch.float64) * every, at]).unique()
    even = torch.linspace(0, updates, _FINEST + 1, dtype=torch.float64).round()
    early = torch.logspace(0, math.log10(updates), _FINEST // 4, dtype=torch.float64).round()
    return torch.cat([even * every, early * every, at]).unique()


def reachable(
    stored: Sequence[tuple[Profile, int]], step: int, max_error: float, start: int = 0, update_every: int = 1
) -> str:
    """Return in words which sigma_rel the stored averages reach within `max_error`."""
    # From 0.01 to 0.288, the widest power profile.
    sigmas = [round(0.01 * 28.8 ** (i / 60), 4) for i in range(61)]
    fits = fit(stored, [Profile("power", (gamma_of(sigma),), start) for sigma in sigmas], step, update_every)
    good = [sigma for sigma, found in zip(sigmas, fits, strict=True) if found.error <= max_error]
    return f"sigma_rel from {good[0]:.3g} to {good[-1]:.3g}" if good else "no sigma_rel"

"""The learning rate as a function of the step, against torch's own schedulers where it has one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LRScheduler, OneCycleLR

from fastema.segmentation.train.stages import LRSchedule, first_cycle

HIGHEST, LOWEST = 2e-4, 1e-5


def torchs(make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int) -> list[float]:
    """Return the rates of `steps` optimizer steps under one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=HIGHEST)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(kind: str, steps: int, warmup: int = 0) -> list[float]:
    schedule = LRSchedule(kind, HIGHEST, LOWEST, warmup, steps)
    return [schedule.at(step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [2, 10, 70, 101])
def test_cosine(steps: int) -> None:
    """The last step has the floor, so torch's T_max is one less than the number of steps."""
    expected = torchs(lambda optimizer: CosineAnnealingLR(optimizer, steps - 1, eta_min=LOWEST), steps)
    assert ours("cosine", steps) == pytest.approx(expected)
    assert ours("cosine", steps)[0] == HIGHEST
    assert ours("cosine", steps)[-1] == pytest.approx(LOWEST)


@pytest.mark.parametrize("steps", [7, 70, 100])
def test_warm_restarts(steps: int) -> None:
    cycle = first_cycle(steps)
    expected = torchs(lambda optimizer: CosineAnnealingWarmRestarts(optimizer, cycle, 2, eta_min=LOWEST), steps)
    assert ours("cosine_restart", steps) == pytest.approx(expected)
    assert ours("cosine_restart", steps).count(HIGHEST) == 3, "three cycles, the last one ends with the stage"


@pytest.mark.parametrize("steps", [10, 70, 101])
def test_one_cycle(steps: int) -> None:
    floor = HIGHEST / 100

    def make(optimizer: torch.optim.Optimizer) -> OneCycleLR:
        # torch's floor is a share of its start, which is a 25th of the top.
        return OneCycleLR(optimizer, HIGHEST, total_steps=steps, cycle_momentum=False, final_div_factor=4.0)

    schedule = LRSchedule("onecycle", HIGHEST, floor, 0, steps)
    rates = [schedule.at(step) for step in range(1, steps + 1)]
    assert rates[:-1] == pytest.approx(torchs(make, steps - 1))
    assert rates[-1] == pytest.approx(floor)
    assert max(rates) == pytest.approx(HIGHEST, rel=0.02)


def test_one_cycle_starts_at_the_floor_where_a_25th_is_below_it() -> None:
    schedule = LRSchedule("onecycle", HIGHEST, HIGHEST / 2, 0, 50)
    assert schedule.at(1) == pytest.approx(HIGHEST / 2)
    assert min(schedule.at(step) for step in range(1, 51)) == pytest.approx(HIGHEST / 2)


def test_wsd_is_constant_and_falls_in_the_last_fifth() -> None:
    rates = ours("wsd", 50)
    assert set(rates[:40]) == {HIGHEST}
    falls = {round(before - after, 12) for before, after in pairwise(rates[39:])}
    assert falls == {round((HIGHEST - LOWEST) / 10, 12)}
    assert rates[-1] == pytest.approx(LOWEST)
    assert ours("wsd", 3)[-1] == pytest.approx(LOWEST)


def test_none_is_constant() -> None:
    assert set(ours("none", 10)) == {HIGHEST}


@pytest.mark.parametrize("kind", ["cosine", "cosine_restart", "none"])
def test_the_warm_up_is_linear_and_what_follows_starts_at_the_top(kind: str) -> None:
    rates = ours(kind, 20, warmup=4)
    assert rates[:4] == pytest.approx([HIGHEST * share for share in (0.25, 0.5, 0.75, 1.0)])
    assert rates[4:] == pytest.approx(ours(kind, 16))


@pytest.mark.parametrize("kind", ["cosine", "cosine_restart", "onecycle", "none"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_runs_of_a_few_steps_stay_within_the_limits(kind: str, steps: int) -> None:
    assert all(LOWEST * (1 - 1e-9) <= rate <= HIGHEST * (1 + 1e-9) for rate in ours(kind, steps))


def test_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        LRSchedule("step", HIGHEST, LOWEST, 0, 10).at(1)

"""The stages: an epoch's stage, levels and rate, as functions of epoch and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastema.segmentation.options import TrainOptions
from fastema.segmentation.train.stages import freeze, open_levels, plan_stages


def options(**changes: Any) -> TrainOptions:
    chosen = TrainOptions("x", Path("y"), **changes)
    chosen.check()
    return chosen


def test_two_stages_have_their_own_batches_rates_and_schedules() -> None:
    chosen = {"epochs": 120, "stage1_epochs": 30, "batch_size": 8, "stage2_batch_size": 1, "accumulation_steps": 4}
    rates = {"lr": 0.00025, "stage2_lr": 0.0002, "min_lr": 0.00001, "warmup_epochs": 2}
    stages = plan_stages(options(**chosen, **rates), images=100)
    first, second = stages.stages
    assert (first.number, first.first_epoch, first.epochs, first.group_size, first.steps_per_epoch) == (1, 1, 30, 32, 4)
    assert (second.number, second.first_epoch, second.epochs, second.group_size) == (2, 31, 90, 4)
    assert second.steps_per_epoch == 25
    assert stages.total_steps == 30 * 4 + 90 * 25
    assert [stages.at(epoch).number for epoch in (1, 30, 31, 120, 121)] == [1, 1, 2, 2, 2]
    assert [stages.steps_before(epoch) for epoch in (1, 30, 31, 32, 121)] == [0, 116, 120, 145, stages.total_steps]
    assert (first.schedule.warmup_steps, second.schedule.warmup_steps) == (8, 0), "the warm-up is the first stage's"
    assert second.step_before(31) == 0
    assert second.schedule.at(1) == 0.0002
    assert second.schedule.at(90 * 25) == pytest.approx(0.00001)
    assert first.schedule.at(30 * 4) == pytest.approx(0.00001)


def test_without_a_first_stage_the_second_has_the_warm_up_and_all_epochs() -> None:
    for chosen in ({"stage1_epochs": 0}, {"stage1_epochs": 5, "skip_stage1": True}):
        (only,) = plan_stages(options(epochs=20, warmup_epochs=3, **chosen), images=16).stages
        assert (only.number, only.first_epoch, only.epochs) == (2, 1, 20)
        assert only.schedule.warmup_steps == 3 * 2


def test_a_run_may_be_stage_1_alone() -> None:
    (only,) = plan_stages(options(epochs=4, stage1_epochs=4), images=16).stages
    assert (only.number, only.epochs) == (1, 4)


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_levels_open_one_after_the_other_until_half_of_the_stage(levels: int) -> None:
    first, second = plan_stages(options(epochs=70, stage1_epochs=10, progressive_unfreeze=True), images=16).stages
    opened = [open_levels(second, epoch, levels, progressive=True) for epoch in range(11, 71)]
    assert opened[0] == 1
    assert opened == sorted(opened)
    assert set(opened) == set(range(1, levels + 1))
    # Half of the 60 epochs, divided evenly among the levels and rounded up.
    assert [opened.index(count) for count in range(1, levels + 1)] == [
        -(-level * 30 // levels) for level in range(levels)
    ]
    assert {open_levels(first, epoch, levels, progressive=True) for epoch in range(1, 11)} == {0}
    assert {open_levels(second, epoch, levels, progressive=False) for epoch in range(11, 71)} == {levels}


def test_a_stage_too_short_for_its_levels_opens_several_at_once() -> None:
    (only,) = plan_stages(options(epochs=2, progressive_unfreeze=True), images=16).stages
    assert [open_levels(only, epoch, 5, progressive=True) for epoch in (1, 2)] == [1, 5]


def test_freezing_takes_gradient_and_batch_statistics_from_the_shallow_levels() -> None:
    levels: list[list[nn.Module]] = [[nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)], [nn.Sequential(nn.BatchNorm2d(4))]]
    net = nn.Sequential(*(module for modules in levels for module in modules))
    net.position = nn.Parameter(torch.zeros(1))  # on the backbone itself, as in vision transformers
    statistics = [norm for norm in net.modules() if isinstance(norm, nn.BatchNorm2d)]
    for opened, moved in ((0, [False, False]), (1, [False, True]), (2, [True, True])):
        net.train()
        freeze(net, levels, opened)
        before = [norm.running_mean.clone() for norm in statistics if norm.running_mean is not None]
        net(torch.rand(2, 3, 4, 4) + opened)
        after = [norm.running_mean for norm in statistics if norm.running_mean is not None]
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == moved
        trains = [all(p.requires_grad for m in modules for p in m.parameters()) for modules in levels]
        assert trains == moved
        assert net.position.requires_grad == all(moved)

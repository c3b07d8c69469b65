"""One epoch of optimizer steps, on a network of a single weight: groups, means, rates."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import torch
from torch import Tensor, nn

from fastema.segmentation.model.network import Output
from fastema.segmentation.train.epoch import EpochResult, NotFiniteError, train_epoch
from fastema.segmentation.train.stages import LRSchedule, Stage

VALUES = torch.arange(1.0, 11.0)  # ten images, each of one pixel


class Recorded:
    """Record the gradient and the rate of every step, in place of the optimizer."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.gradients: list[float] = []
        self.rates: list[float] = []

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rate: float) -> None:
        assert self.weight.grad is not None
        self.gradients.append(self.weight.grad.item())
        self.rates.append(rate)
        self.weight.grad = None


def trained(
    batch_size: int, group_size: int, epoch: int = 1, **changes: Any
) -> tuple[Recorded, EpochResult, list[float]]:
    """Train an epoch whose loss is weight times the mean of a batch's values, so that the gradient is that mean."""
    weight = nn.Parameter(torch.tensor(1.0))
    values = changes.get("values", VALUES)

    def objective(images: Tensor, masks: Tensor) -> tuple[Tensor, Output]:
        usage = torch.tensor([[float(len(images) == batch_size), 1.0]])
        return weight * images.mean(), Output(images, [], torch.zeros(()), usage)

    batches = [(part.view(-1, 1, 1, 1), part.view(-1, 1, 1, 1)) for part in values.split(batch_size)]
    steps = math.ceil(len(values) / group_size)
    stage = Stage(2, 1, 3, batch_size, group_size, steps, LRSchedule("cosine", 1.0, 0.0, 0, 3 * steps))
    recorded, shown = Recorded(weight), []
    device = torch.device("cpu")
    result = train_epoch(objective, batches, recorded, stage, epoch, len(values), device, shown.append)  # type: ignore[arg-type]
    return recorded, result, shown


@pytest.mark.parametrize(
    ("batch_size", "group_size", "expected"),
    [
        (4, 4, [2.5, 6.5, 9.5]),  # the last batch is short
        (4, 8, [4.5, 9.5]),  # the last group has one short batch
        (2, 4, [2.5, 6.5, 9.5]),  # the last group has one batch of two
        (3, 6, [3.5, 8.5]),  # the last group has a whole batch and a short one, which count by their images
        (1, 16, [5.5]),  # a group larger than the epoch
    ],
)
def test_a_step_s_gradient_is_the_mean_over_the_images_it_has(
    batch_size: int, group_size: int, expected: list[float]
) -> None:
    recorded, result, _ = trained(batch_size, group_size)
    assert recorded.gradients == pytest.approx(expected)
    assert len(result.step_seconds) == len(expected)


def test_the_loss_is_the_mean_over_the_images() -> None:
    _, result, shown = trained(4, 8)
    assert result.loss == pytest.approx(5.5)
    assert shown == pytest.approx([2.5, 4.5, 5.5])
    assert 0 <= result.data_wait <= 1


def test_the_usage_counts_images_not_batches() -> None:
    _, result, _ = trained(4, 4)
    assert result.usage.tolist() == [pytest.approx([0.8, 1.0])]


def test_the_rate_goes_on_from_epoch_to_epoch() -> None:
    rates = [rate for epoch in (1, 2, 3) for rate in trained(4, 4, epoch)[0].rates]
    assert rates == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)])


def test_a_loss_that_is_not_finite_is_found_before_it_is_stepped_with() -> None:
    values = VALUES.clone()
    values[9] = math.inf
    with pytest.raises(NotFiniteError, match="the loss became inf"):
        trained(4, 8, values=values)

"""The loss of training: the paper's formula, the levels' shares, and no overflow in half precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

from fastema.segmentation.model.network import Output
from fastema.segmentation.train.losses import structure_loss, training_loss


def structure_loss_by_hand(logits: torch.Tensor, masks: torch.Tensor) -> float:
    """The paper's formula, pixel by pixel, in double."""
    losses = []
    for logit, mask in zip(logits.double(), masks.double(), strict=True):
        height, width = mask.shape[-2:]
        padded = F.pad(mask[0], (15, 15, 15, 15))
        entropy_sum = weight_sum = both = either = 0.0
        for y in range(height):
            for x in range(width):
                truth, p = float(mask[0, y, x]), float(torch.sigmoid(logit[0, y, x]))
                weight = 1 + 5 * abs(float(padded[y : y + 31, x : x + 31].mean()) - truth)
                entropy_sum -= weight * float(torch.log(torch.tensor(p if truth else 1 - p)))
                weight_sum += weight
                both += weight * p * truth
                either += weight * (p + truth)
        losses.append(entropy_sum / weight_sum + 1 - (both + 1) / (either - both + 1))
    return sum(losses) / len(losses)


def a_case(size: tuple[int, int] = (12, 10)) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 1, *size)
    masks[0, 0, 3:9, 2:7] = 1
    masks[1, 0, :5] = 1
    return logits, masks


# Beyond 31 pixels, the window no longer covers everything.
@pytest.mark.parametrize("size", [(12, 10), (40, 36)])
def test_structure_loss_is_the_papers(size: tuple[int, int]) -> None:
    logits, masks = a_case(size)
    assert float(structure_loss(logits, masks)) == pytest.approx(structure_loss_by_hand(logits, masks), rel=1e-5)


def test_the_outline_weighs_more_than_the_inside() -> None:
    """What a mean inside the cross-entropy, the common mistake, would lose."""
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 8:56, 8:56] = 1
    right = torch.where(masks > 0, 6.0, -6.0)
    wrong_at_the_outline, wrong_inside = right.clone(), right.clone()
    wrong_at_the_outline[..., 8:12, 20:24] = -6
    wrong_inside[..., 30:34, 30:34] = -6
    assert structure_loss(wrong_at_the_outline, masks) > structure_loss(wrong_inside, masks) * 1.2


def test_a_right_answer_costs_almost_nothing() -> None:
    masks = torch.zeros(1, 1, 32, 32)
    masks[..., 5:20, 5:20] = 1
    assert float(structure_loss(torch.where(masks > 0, 20.0, -20.0), masks)) < 1e-4


def test_an_empty_mask_has_a_finite_loss_and_gradient() -> None:
    logits = torch.zeros(1, 1, 32, 32, requires_grad=True)
    structure_loss(logits, torch.zeros(1, 1, 32, 32)).backward()
    assert logits.grad is not None
    assert bool((logits.grad > 0).all()), "every pixel should be less of an object"


def test_every_coarser_level_counts_half_and_the_balance_a_hundredth() -> None:
    logits, masks = a_case()
    sides = [logits * 2, logits - 1, -logits]
    output = Output(logits, sides, torch.tensor(3.0), torch.zeros(4, 0))
    parts = [float(structure_loss(level, masks)) for level in (logits, *sides)]
    levels = sum(part / 2**level for level, part in enumerate(parts))
    assert float(training_loss(output, masks)) == pytest.approx(levels + 0.03)
    assert float(training_loss(output, masks, balance_weight=1.0)) == pytest.approx(levels + 3)


def test_without_side_logits_and_experts_it_is_the_structure_loss() -> None:
    logits, masks = a_case()
    output = Output(logits, [], torch.tensor(0.0), torch.zeros(4, 0))
    assert torch.equal(training_loss(output, masks), structure_loss(logits, masks))

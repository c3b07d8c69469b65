"""The average that both callbacks' tests expect, from the weights after each real step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DECAY = 0.8
CONSTANT: dict[str, Any] = {"decay": DECAY, "decay_type": "constant"}


def average(first: dict[str, Tensor], steps: list[dict[str, Tensor]], decay: float = DECAY) -> dict[str, Tensor]:
    """Return the expected average, from the weights after each real step: in double, by the definition."""
    averages = {name: value.double() for name, value in first.items()}
    for live in steps:
        for name, value in live.items():
            copied = not value.is_floating_point()
            averages[name] = value.double() if copied else decay * averages[name] + (1 - decay) * value.double()
    return averages


def assert_average(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []

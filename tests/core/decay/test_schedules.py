"""The decay schedules: the contract's formulas, the registry, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cases.reference import ARGUMENTS, SCHEDULES, exponential, warmup
from fastema import EMA_DECAY_FUNCTIONS, FastEMA, IDecayFunction, schedules

TOTAL = 200


def ema(decay_type: str = "constant", decay: float = 0.999, **arguments: Any) -> FastEMA:
    return FastEMA([("w", torch.zeros(1))], decay, decay_type=decay_type, **arguments)


@pytest.fixture
def registry() -> Iterator[dict[str, type[IDecayFunction]]]:
    """The registry, put back afterwards."""
    before = dict(EMA_DECAY_FUNCTIONS)
    yield EMA_DECAY_FUNCTIONS
    EMA_DECAY_FUNCTIONS.clear()
    EMA_DECAY_FUNCTIONS.update(before)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("decay_type", SCHEDULES)
def test_formulas(decay_type: str, decay: float) -> None:
    average = ema(decay_type, decay, total_steps=TOTAL, **ARGUMENTS.get(decay_type, {}))
    for step in range(1, TOTAL + 1):
        expected = SCHEDULES[decay_type](decay, step, TOTAL)
        assert average.decay_at(step) == pytest.approx(expected, rel=1e-14, abs=1e-15)
        assert 0.0 <= average.decay_at(step) <= 1.0


def test_numbers_worked_by_hand() -> None:
    assert ema("threshold").decay_at(1) == 2 / 11
    assert ema("threshold", 0.9).decay_at(80) == 0.9
    assert ema("linear", 0.8, total_steps=100).decay_at(25) == pytest.approx(0.2)
    assert ema("exp", 1.0, total_steps=15).decay_at(1) == pytest.approx(1 - 1 / math.e)
    assert ema("warmup", 0.9999).decay_at(8) == pytest.approx(0.75)  # 1 - 8^(-2/3)


def test_every_built_in_schedule_is_covered() -> None:
    assert set(SCHEDULES) == set(EMA_DECAY_FUNCTIONS)


@pytest.mark.parametrize("beta", [1, 2.5, 15])
def test_beta(beta: float) -> None:
    average = ema("exp", total_steps=TOTAL, beta=beta)
    assert average.decay_at(50) == pytest.approx(exponential(0.999, 50, TOTAL, beta), rel=1e-14)


def test_inv_gamma_and_power() -> None:
    average = ema("warmup", inv_gamma=5.0, power=0.75)
    assert average.decay_at(50) == pytest.approx(warmup(0.999, 50, 0, 5.0, 0.75), rel=1e-14)


@pytest.mark.parametrize("decay_type", ["exp", "linear"])
def test_training_on_past_total_steps_stays_in_range(decay_type: str) -> None:
    average = ema(decay_type, 1.0, total_steps=10)
    assert [0.0 <= average.decay_at(step) <= 1.0 for step in (10, 11, 1000)] == [True] * 3
    assert average.decay_at(1000) == pytest.approx(1.0, abs=1e-6)


def test_update_uses_the_decay_of_its_step() -> None:
    for decay_type, formula in SCHEDULES.items():
        weight = torch.zeros(1, dtype=torch.float64)
        arguments = ARGUMENTS.get(decay_type, {})
        average = FastEMA([("w", weight)], 0.9, decay_type=decay_type, total_steps=TOTAL, **arguments)
        expected = 0.0
        for step in range(1, 20):
            weight.fill_(float(step))
            average.update()
            decay = formula(0.9, step, TOTAL)
            expected = decay * expected + (1 - decay) * step
            assert average.state_dict()["shadow"]["w"].item() == pytest.approx(expected, rel=1e-12), decay_type


# ---- the registry ----


def test_the_registry_is_the_one_of_the_schedules_module() -> None:
    assert schedules.EMA_DECAY_FUNCTIONS is EMA_DECAY_FUNCTIONS
    assert schedules.IDecayFunction is IDecayFunction


def test_a_schedule_of_your_own(registry: dict[str, type[IDecayFunction]]) -> None:
    class Steps(IDecayFunction):
        def __init__(self, **kwargs: Any) -> None:
            self.kwargs = kwargs

        def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
            seen.append((decay, step, total_steps))
            return decay if step > self.kwargs["until"] else 0.25

    seen: list[tuple[float, int, int | None]] = []
    registry["steps"] = Steps
    average = ema("steps", 0.9, total_steps=77, until=3)
    assert [average.decay_at(step) for step in (3, 4)] == [0.25, 0.9]
    assert seen == [(0.9, 3, 77), (0.9, 4, 77)]
    average = ema("steps", 0.9, until=0)
    average.update()
    assert seen[-1] == (0.9, 1, None)


def test_a_built_in_name_can_be_replaced(registry: dict[str, type[IDecayFunction]]) -> None:
    class Mine(IDecayFunction):
        def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
            return 0.125

    registry["linear"] = Mine
    assert ema("linear").decay_at(1) == 0.125


def test_a_schedule_of_your_own_may_need_total_steps(registry: dict[str, type[IDecayFunction]]) -> None:
    class Needy(IDecayFunction):
        needs_total_steps = True

        def __call__(self, decay: float, step: int, total_steps: int | None) -> float:
            return decay

    registry["needy"] = Needy
    with pytest.raises(ValueError, match="'needy' needs total_steps"):
        ema("needy")
    ema("needy", total_steps=1).update()


@pytest.mark.parametrize("decay", [1.5, -0.1, float("nan")])
def test_a_schedule_that_leaves_the_range_is_named(registry: dict[str, type[IDecayFunction]], decay: float) -> None:
    class Wild(IDecayFunction):
        def __call__(self, target: float, step: int, total_steps: int | None) -> float:
            return decay if step == 2 else target

    registry["wild"] = Wild
    average = ema("wild", 0.5)
    average.update()
    state = average.state_dict()
    before = state["shadow"]["w"].clone()
    with pytest.raises(ValueError, match=r"'wild' gave decay \S+ at step 2; it must be in \[0, 1\]"):
        average.update()
    assert average.state_dict()["step"] == state["step"] == 1
    assert torch.equal(average.state_dict()["shadow"]["w"], before)


def test_an_abstract_schedule_cannot_be_used(registry: dict[str, type[IDecayFunction]]) -> None:
    with pytest.raises(TypeError):
        IDecayFunction()  # type: ignore[abstract]


# ---- what is refused ----


def test_unknown_type_lists_the_known_ones(registry: dict[str, type[IDecayFunction]]) -> None:
    with pytest.raises(ValueError, match="unknown decay_type 'cosine'") as error:
        ema("cosine")
    for name in registry:
        assert name in str(error.value)


@pytest.mark.parametrize("decay_type", ["exp", "linear"])
def test_missing_total_steps(decay_type: str) -> None:
    with pytest.raises(ValueError, match=f"'{decay_type}' needs total_steps"):
        ema(decay_type)


@pytest.mark.parametrize("total_steps", [0, -5, 2.5, "9"])
def test_bad_total_steps(total_steps: Any) -> None:
    with pytest.raises(ValueError, match=f"total_steps must be a positive int, got {total_steps!r}"):
        ema("linear", total_steps=total_steps)


@pytest.mark.parametrize("beta", [0, -1.0, float("nan")])
def test_bad_beta(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta must be positive, got {beta}"):
        ema("exp", total_steps=10, beta=beta)


@pytest.mark.parametrize("arguments", [{"inv_gamma": 0}, {"power": -1}, {"power": float("nan")}])
def test_bad_warmup(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="inv_gamma and power must be positive"):
        ema("warmup", **arguments)


@pytest.mark.parametrize(("decay_type", "argument"), [("constant", "beta"), ("exp", "gamma"), ("warmup", "beta")])
def test_arguments_that_nobody_takes(decay_type: str, argument: str) -> None:
    with pytest.raises(TypeError, match=f"{decay_type}.*{argument}"):
        ema(decay_type, total_steps=10, **{argument: 3})

"""The advisor: the guide's own numbers come out, whatever the metric's scale and direction."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
import random

import pytest
import torch

import fastema.advisor
from fastema import FastEMA
from fastema.advisor import (
    diagnose,
    distinct_decays,
    expect,
    initial_share,
    lag,
    recommend_decay,
    reflects_epoch,
    scaled_decay,
    settle_epochs,
    should_start,
    updates_per_epoch,
    window,
)
from fastema.advisor.outlook import mean_age, rate_at

UNSTABLE = [0.6234, 0.5987, 0.6123, 0.5856]
COLLAPSE = [0.5480, 0.1136]
PLATEAU = [0.6221] * 17
IMPROVING = [0.6712, 0.6823, 0.6912]
OSCILLATION = [0.68, 0.71, 0.69, 0.70, 0.68, 0.71, 0.70, 0.68]


@pytest.mark.parametrize(
    "name", [f"fastema.advisor.{info.name}" for info in pkgutil.iter_modules(fastema.advisor.__path__)]
)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "updates", "epochs", "reflected"),
    [(0.9999, 10_000, 25, 61), (0.999, 1_000, 2.5, 83.5), (0.99, 100, 0.25, 85.75), (0.9, 10, 0.025, 85.975)],
)
def test_the_guides_table(decay: float, updates: float, epochs: float, reflected: float) -> None:
    assert window(decay) == pytest.approx(updates)
    assert lag(decay, 400) == pytest.approx(epochs)
    assert reflects_epoch(86, decay, 400) == pytest.approx(reflected)


def test_several_decays_give_tuples() -> None:
    assert window([0.9, 0.99]) == pytest.approx((10, 100))
    assert lag([0.9, 0.99], 10) == pytest.approx((1, 10))
    assert reflects_epoch(20, [0.9, 0.99], 10) == pytest.approx((19, 10))
    assert initial_share([0.5, 0.9], 3) == pytest.approx((0.125, 0.729))
    assert settle_epochs([0.5, 0.9], 1, share=0.2) == (3, 16)


def test_the_average_never_reflects_a_time_before_the_training() -> None:
    assert reflects_epoch(3, 0.9999, 400) == 0
    assert window(1.0) == math.inf


@pytest.mark.parametrize("decay_type", ["constant", "threshold", "warmup", "exp", "linear"])
def test_initial_share_is_what_is_really_left(decay_type: str) -> None:
    """Starting weights 1, live weights 0: the average is the share of the start."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    ema = FastEMA([("w", parameter)], 0.9, decay_type=decay_type, total_steps=60)
    with torch.no_grad():
        parameter.zero_()
    for _ in range(7):
        ema.update()
    left = ema.shadow_state_dict()["w"].item()
    assert initial_share(0.9, 7, decay_type, total_steps=60) == pytest.approx(left, rel=1e-9, abs=1e-15)


def test_settling_is_the_first_moment_below_the_share() -> None:
    for decay_type in ("constant", "threshold", "warmup"):
        epochs = settle_epochs(0.99, 10, share=0.05, decay_type=decay_type)
        updates = round(epochs * 10)
        assert initial_share(0.99, updates, decay_type) <= 0.05 < initial_share(0.99, updates - 1, decay_type)
    assert settle_epochs(1.0, 10) == math.inf


def test_updates_per_epoch() -> None:
    assert updates_per_epoch(3040, 1, 4) == 760
    assert updates_per_epoch(10, 4) == 3
    assert updates_per_epoch(10, 4, drop_last=True) == 2
    assert updates_per_epoch(10, 2, 3) == 2
    assert updates_per_epoch(10, 2, 3, step_on_tail=False) == 1
    with pytest.raises(ValueError, match="no optimizer step"):
        updates_per_epoch(3, 4, drop_last=True)
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1, got 0"):
        updates_per_epoch(3, 0)


@pytest.mark.parametrize("decay", [1.5, -0.1, math.nan, "0.9", []])
def test_a_decay_out_of_range_is_refused(decay: object) -> None:
    for call in (
        lambda: window(decay),
        lambda: lag(decay, 400),
        lambda: initial_share(decay, 3),
        lambda: settle_epochs(decay, 3),
        lambda: diagnose([0.1, 0.2], [0.1, 0.2], decay, 4),
    ):
        with pytest.raises(ValueError, match="decay"):
            call()


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf])
def test_an_impossible_number_of_updates_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="updates_per_epoch must be a positive number"):
        lag(0.9, rate)


# --- recommend_decay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 20, 60, 300])
@pytest.mark.parametrize("lr_schedule", ["constant", "cosine", "linear", "wsd", "restarts"])
def test_the_rule_of_thumb_is_recommended(epochs: int, lr_schedule: str) -> None:
    advice = recommend_decay(epochs, 400, lr_schedule)
    assert (advice.decay, advice.decay_type) == (0.999, "threshold")
    assert "rule of thumb" in " ".join(advice.reasons)


def test_the_decay_of_a_recipe_follows_the_batch() -> None:
    assert recommend_decay(300, 400, recipe_decay=0.9999).decay == 0.9999
    larger = recommend_decay(300, 400, recipe_decay=0.9999, batch_ratio=16)
    assert larger.decay == pytest.approx(0.9999**16)
    assert "to the power of 16" in " ".join(larger.reasons)
    assert scaled_decay(0.9, 2) == pytest.approx(0.81)
    # Two updates with a batch of one against one with a batch of two: the same weight for what is older.
    assert scaled_decay(0.99, 2) == pytest.approx(0.99 * 0.99)
    with pytest.raises(ValueError, match="batch_ratio must be a positive number, got 0"):
        scaled_decay(0.9, 0)


def test_a_recommendation_gives_its_reasons_and_when_to_judge() -> None:
    advice = recommend_decay(120, 760)
    assert advice.window == pytest.approx(1000)
    assert advice.lag == pytest.approx(1000 / 760)
    assert initial_share(advice.decay, math.ceil(advice.wait_epochs * 760), advice.decay_type) <= 0.05
    assert "91,200 updates" in " ".join(advice.reasons)


@pytest.mark.parametrize("epochs", [1, 2, 7, 30, 500])
@pytest.mark.parametrize("rate", [1, 3, 50, 3000])
def test_every_run_can_judge_its_average_before_it_ends(epochs: int, rate: int) -> None:
    advice = recommend_decay(epochs, rate)
    assert advice.wait_epochs <= epochs or epochs * rate < 20


def test_recommendations_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="epochs must be an int of at least 1, got 0"):
        recommend_decay(0, 400)
    with pytest.raises(ValueError, match="updates_per_epoch must be a positive number, got -3"):
        recommend_decay(3, -3)
    with pytest.raises(ValueError, match=r"lr_schedule must be one of 'constant', 'cosine', .*, got 'wobbly'"):
        recommend_decay(3, 3, "wobbly")
    with pytest.raises(ValueError, match="final_lr must be a share of the highest rate, from 0 to 1, got 2"):
        recommend_decay(3, 3, "cosine", final_lr=2)
    with pytest.raises(ValueError, match="decay must be in"):
        recommend_decay(3, 3, recipe_decay=1.5)


@pytest.mark.parametrize(
    ("decays", "steps", "distinct"),
    [
        ([0.99, 0.999], 890, [0.99]),
        ([0.999, 0.99], 890, [0.999]),
        ([0.99, 0.999], 891, [0.99, 0.999]),
        ([0.9, 0.99, 0.999], 300, [0.9, 0.99]),
    ],
)
def test_decays_that_the_threshold_schedule_makes_one(decays: list[float], steps: int, distinct: list[float]) -> None:
    assert list(distinct_decays(decays, "threshold", steps)) == distinct
    assert list(distinct_decays(decays, "constant", steps)) == decays
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema = FastEMA([("w", parameter)], decays, decay_type="threshold")
    for step in range(steps):
        with torch.no_grad():
            parameter.fill_(step % 7)
        ema.update()
    values = [ema.shadow_state_dict(which)["w"].item() for which in range(len(decays))]
    assert len(set(values)) == len(distinct)


# --- expect -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr_schedule", "final_lr", "case"),
    [
        ("constant", 0.0, "much"),
        ("cosine", 0.0, "little"),
        ("cosine", 0.2, "some"),
        ("cosine", 0.6, "much"),
        ("linear", 0.0, "little"),
        ("wsd", 0.01, "little"),
        ("restarts", 0.0, "little"),
    ],
)
def test_the_case_follows_from_the_rate_at_the_end(lr_schedule: str, final_lr: float, case: str) -> None:
    assert expect(10_000, lr_schedule, final_lr).case == case


def test_the_ratio_is_that_of_the_rates() -> None:
    found = expect(8_000, "linear", final_lr=0.1)
    assert found.mean_age == pytest.approx(800, abs=1)
    assert found.share_of_run == pytest.approx(0.1, abs=1e-3)
    assert found.ratio == pytest.approx(0.19 / 0.1, rel=1e-2)
    assert expect(8_000, "constant").ratio == 1
    assert expect(8_000, "cosine").ratio == math.inf
    # A tenth of the run is half of the last fifth.
    assert rate_at("wsd", 0.9) == pytest.approx(0.5)
    assert [rate_at("restarts", done) for done in (0, 1 / 7, 3 / 7)] == pytest.approx([1, 1, 1])
    assert rate_at("restarts", 1.0, final_lr=0.25) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("decay", "decay_type", "updates"),
    [(0.9, "constant", 30), (0.9, "threshold", 200), (0.999, "threshold", 300), (0.9, "exp", 40), (0.0, "constant", 3)],
)
def test_the_mean_age_is_what_fastema_averages(decay: float, decay_type: str, updates: int) -> None:
    """Weights that count the updates: the average lags behind the count by the mean age."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema = FastEMA([("w", parameter)], decay, decay_type=decay_type, total_steps=updates)
    for _ in range(updates):
        with torch.no_grad():
            parameter.add_(1)
        ema.update()
    assert mean_age(updates, decay, decay_type) == pytest.approx(updates - ema.shadow_state_dict()["w"].item())


def test_a_short_run_is_warned_of() -> None:
    assert "may be behind" in expect(499).text
    assert "may be behind" not in expect(500).text


# --- should_start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "action", "pattern"),
    [
        (UNSTABLE, "fix first", "unstable"),
        (COLLAPSE, "fix first", "collapse"),
        ([0.50, 0.52, 0.53, *COLLAPSE], "fix first", "collapse"),
        ([0.50, 0.52, 0.53, *COLLAPSE, 0.12, 0.11], "fix first", "collapse"),
        (PLATEAU, "wait", "plateau"),
        ([0.30, 0.45, 0.55, 0.60, *PLATEAU], "wait", "plateau"),
        ([0.30, 0.45, 0.55, 0.60, *([0.6221, 0.6224, 0.6218, 0.6222] * 5)], "wait", "plateau"),
        (IMPROVING, "start", "improving"),
        ([0.70, 0.69, 0.68, 0.67, 0.66, 0.65], "fix first", "declining"),
        (OSCILLATION, "start", "oscillation"),
        (OSCILLATION[::-1], "start", "oscillation"),
        ([0.71, 0.68, 0.71, 0.68], "start", "oscillation"),
        ([0.30, 0.45, 0.55, 0.62, 0.66, *OSCILLATION, *OSCILLATION], "start", "oscillation"),
        ([0.5], "start", "too short"),
        ([0.5, 0.52], "start", "too short"),
        ([0.50, 0.52, 0.53, 0.11, 0.54, 0.55, 0.56, 0.57, 0.58], "start", "improving"),  # a spike, and over
    ],
)
def test_histories_are_judged_as_the_guide_does(history: list[float], action: str, pattern: str) -> None:
    advice = should_start(history)
    assert (advice.action, advice.pattern) == (action, pattern), advice
    assert advice.reason
    assert advice.next_step


HISTORIES = {
    "unstable": UNSTABLE,
    "collapse": [0.30, 0.50, 0.52, 0.53, *COLLAPSE],
    "plateau": [0.30, 0.45, 0.55, 0.60, *PLATEAU],
    "improving": IMPROVING,
    "oscillation": [0.30, 0.45, 0.55, 0.62, 0.66, *OSCILLATION, *OSCILLATION],
    "declining": [0.70, 0.69, 0.68, 0.67, 0.66, 0.65],
}


@pytest.mark.parametrize("pattern", HISTORIES)
@pytest.mark.parametrize(("scale", "offset"), [(100, 0), (1e-6, 0), (1, 5), (250, -40)])
def test_scale_and_direction_do_not_matter(pattern: str, scale: float, offset: float) -> None:
    history = [scale * value + offset for value in HISTORIES[pattern]]
    assert should_start(history).pattern == pattern
    assert should_start([-value for value in history], mode="min").pattern == pattern


@pytest.mark.parametrize("history", [[0.5], PLATEAU, UNSTABLE, COLLAPSE])
def test_an_early_start_is_said_to_cost_nothing(history: list[float]) -> None:
    said = "threshold schedule" in should_start(history).next_step
    assert said == (should_start(history).pattern != "collapse")


def test_short_histories_are_free_of_the_unit_and_direction() -> None:
    for history in (COLLAPSE, PLATEAU, OSCILLATION):
        expected = should_start(history)
        assert should_start([100 * value for value in history]).pattern == expected.pattern
        assert should_start([-value for value in history], mode="min").pattern == expected.pattern


def test_a_loss_that_explodes_is_a_collapse() -> None:
    assert should_start([0.9, 0.7, 0.6, 0.55, 4.0], mode="min").pattern == "collapse"
    assert should_start([0.9, 4.0], mode="min").pattern == "collapse"
    assert should_start([0.9, 0.7, 0.55], mode="min").action == "start"


@pytest.mark.parametrize("length", [8, 12, 40, 200])
def test_noise_is_told_from_a_trend_at_any_length(length: int) -> None:
    """A steady rise of half a noise an epoch is seen, and level noise is hardly ever taken for one."""
    dice = random.Random(length)
    rising = [should_start([0.5 * i + dice.gauss(0, 1) for i in range(length)]).action for _ in range(200)]
    assert rising.count("start") >= 190
    level = [should_start([100 + dice.gauss(0, 3) for _ in range(length)]) for _ in range(200)]
    assert sum(advice.action == "start" for advice in level) >= 170
    assert sum(advice.pattern == "improving" for advice in level) <= 30


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "empty"),
        ([0.5, math.nan, 0.6], "nan in epoch 2"),
        ([0.5, 0.6, math.inf], "inf in epoch 3"),
        ([0.5, "x"], "not a number in epoch 2"),
        ("0.5", "numbers"),
    ],
)
def test_bad_histories(history: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        should_start(history)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be 'max' or 'min', got 'up'"):
        should_start(IMPROVING, mode="up")


# --- diagnose ---------------------------------------------------------------------------------------------------------

CLIMB = [0.50 + 0.01 * epoch for epoch in range(20)]


def test_worse_because_it_is_too_early() -> None:
    """Decay 0.9999 for three epochs of 400 updates: nearly nine tenths of the average are the first weights."""
    found = diagnose([0.60, 0.62, 0.64], [0.31, 0.33, 0.36], 0.9999, 400)
    assert found[0].kind == "too early"
    assert found[0].evidence["initial_share"] == pytest.approx(0.9999**1200)
    assert found[0].evidence["judge_from_epoch"] == 75  # ln(1/0.05) windows of 25 epochs
    assert "epoch 75" in found[0].next_step


def test_worse_because_the_decay_lags() -> None:
    """The average has settled, and stands where a still climbing model stood some epochs ago."""
    behind = [value - 0.05 for value in CLIMB]
    found = diagnose(CLIMB, behind, 0.999, 200)
    assert found[0].kind == "lags"
    assert found[0].evidence["lag_epochs"] == pytest.approx(5)
    assert found[0].evidence["expected_gap"] == pytest.approx(0.05, rel=0.05)
    assert 0.9 <= found[0].evidence["better_decay"] < 0.999


def test_worse_because_the_training_is_unstable() -> None:
    base = [0.62, 0.60, 0.63, 0.5987, 0.6123, 0.5856, 0.60, 0.57, 0.585, 0.55]
    found = diagnose(base, [value - 0.03 for value in base], 0.99, 400)
    assert found[0].kind == "unstable"
    assert "learning rate" in found[0].next_step


def test_a_collapse_is_told_even_where_the_average_still_holds() -> None:
    found = diagnose([0.50, 0.53, 0.548, 0.1136], [0.49, 0.52, 0.53, 0.50], 0.99, 400)
    assert found[0].kind == "unstable"
    assert found[0].evidence["gap"] == pytest.approx(0.3864)


def test_marginal_because_already_smooth() -> None:
    base = [0.30, 0.50, 0.60, 0.65, 0.68, 0.690, 0.6905, 0.6903, 0.6907, 0.6906, 0.6908, 0.6907]
    found = diagnose(base, [value + 0.0002 for value in base], 0.99, 400)
    assert found[0].kind == "marginal"


def test_a_gain_of_many_noises_is_not_called_nothing() -> None:
    """Our own run on cell nuclei: three epochs, the average behind in the first and well ahead in the others."""
    base, ema = [0.6864, 0.6872, 0.6904], [0.6478, 0.7096, 0.7149]
    found = diagnose(base, ema, 0.999, 61, decay_type="threshold")
    assert found[0].kind == "marginal"
    assert "No clear difference yet" in found[0].text


def test_fine() -> None:
    base = [0.30, 0.50, 0.60, *OSCILLATION]
    found = diagnose(base, [0.29, 0.51, 0.62, 0.71, 0.715, 0.717, 0.72, 0.722, 0.723, 0.724, 0.725], 0.99, 400)
    assert [finding.kind for finding in found] == ["fine"]
    assert found[0].evidence["gap"] > 0


def test_worse_for_a_reason_the_history_does_not_show_is_said_to_be_so() -> None:
    base = [0.30, 0.50, 0.60, *OSCILLATION, *OSCILLATION]
    found = diagnose(base, [value - 0.2 for value in base], 0.9, 400)
    assert [finding.kind for finding in found] == ["unexplained"]
    assert "BatchNorm" in found[0].next_step


def test_two_epochs_prove_nothing() -> None:
    for ema, kind in (([0.49, 0.51], "behind"), ([0.499, 0.519], "marginal"), ([0.51, 0.53], "marginal")):
        found = diagnose([0.50, 0.52], ema, 0.9, 400)
        assert [finding.kind for finding in found] == [kind]
        assert "too few epochs" in found[0].text


def test_a_late_start_counts_from_there() -> None:
    base = [0.5 + 0.01 * i for i in range(12)]
    late = [None] * 10 + [base[10] - 0.05, base[11] - 0.05]
    found = diagnose(base, late, 0.999, 200)
    assert found[0].kind == "too early"
    assert found[0].evidence["updates"] == 400
    assert diagnose(base, [v - 0.05 for v in base], 0.999, 200, started_at=10)[0].evidence["updates"] == 400


def test_a_schedule_settles_sooner() -> None:
    base, ema = CLIMB[:5], [value - 0.004 for value in CLIMB[:5]]
    assert diagnose(base, ema, 0.9999, 400)[0].kind == "too early"
    lagging = diagnose(base, ema, 0.9999, 400, decay_type="threshold")[0]
    assert lagging.kind == "lags"
    assert lagging.evidence["lag_epochs"] == pytest.approx(2010 / 9 / 400)  # 1 / (1 - 2001 / 2010), not 25


@pytest.mark.parametrize(("scale", "offset"), [(100, 0), (1e-6, 0), (1, 5), (250, -40)])
def test_findings_do_not_depend_on_scale_and_direction(scale: float, offset: float) -> None:
    oscillating = [0.30, 0.45, 0.55, 0.62, 0.66, *OSCILLATION, *OSCILLATION]
    cases = [
        ([0.60, 0.62, 0.64], [0.31, 0.33, 0.36], 0.9999, 400),
        (CLIMB, [value - 0.05 for value in CLIMB], 0.999, 200),
        (oscillating, [0.02 + value for value in [*oscillating[:5], *[0.7] * 16]], 0.99, 400),
        (HISTORIES["plateau"], [value + 1e-5 for value in HISTORIES["plateau"]], 0.99, 400),
    ]
    for base, ema, decay, rate in cases:
        expected = [finding.kind for finding in diagnose(base, ema, decay, rate)]
        base, ema = ([scale * value + offset for value in values] for values in (base, ema))
        assert [finding.kind for finding in diagnose(base, ema, decay, rate)] == expected
        base, ema = ([-value for value in values] for values in (base, ema))
        assert [finding.kind for finding in diagnose(base, ema, decay, rate, mode="min")] == expected


@pytest.mark.parametrize(
    ("base", "ema", "message"),
    [
        ([0.1, 0.2], [0.1], "base has 2 epochs and ema 1"),
        ([], [], "empty"),
        ([0.1, math.nan], [0.1, 0.2], "base: nan in epoch 2"),
        ([0.1, 0.2], [0.1, math.nan], "ema: nan in epoch 2"),
        ([0.1, 0.2], [None, None], "ema has no value"),
        ([0.1, 0.2, 0.3], [0.1, None, 0.3], "ema: not a number in epoch 2"),
    ],
)
def test_bad_pairs(base: list[float], ema: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(base, ema, 0.9, 10)


def test_a_start_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="started_at must be an int from 0 to 1, got 2"):
        diagnose([0.1, 0.2], [0.1, 0.2], 0.9, 10, started_at=2)

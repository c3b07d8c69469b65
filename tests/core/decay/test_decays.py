"""Schedules that see the last update, averages that differ in schedule, and decays that are set in mid-run."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastema import EMA_DECAY_FUNCTIONS, FastEMA, IDecayFunction
from fastema.schedules import PowerDecay, gamma_of, sigma_rel_of


def made(decay: Any = 0.999, **arguments: Any) -> tuple[torch.Tensor, FastEMA]:
    weight = torch.zeros(1, dtype=torch.float64)
    return weight, FastEMA([("w", weight)], decay, **arguments)


def weights_of_steps(steps: list[int], passed: bool = False, **arguments: Any) -> list[float]:
    """Measure the weight of each step in the average after the last of `steps`, with one run for each."""
    found = []
    for which in [0, *steps]:
        weight = torch.full((1,), 1.0 if which == 0 else 0.0, dtype=torch.float64)
        ema = FastEMA([("w", weight)], **arguments)
        for step in range(1, steps[-1] + 1):
            weight.fill_(1.0 if step == which else 0.0)
            if not passed:
                ema.update()
            elif step in steps:
                ema.update(step=step)
        found.append(ema.state_dict()["shadow"]["w"].item())
    return found


# ---- warm-up as others have it ----


def timm_warmup(decay: float, step: int, after: int, gamma: float, power: float) -> float:
    """timm's `ModelEmaV3.get_decay` and diffusers' `EMAModel.get_decay`, as their documentation has it."""
    step = max(0, step - after - 1)
    return 0.0 if step <= 0 else max(min(1 - (1 + step / gamma) ** -power, decay), 0.0)


@pytest.mark.parametrize("after", [0, 1, 100])
@pytest.mark.parametrize(("gamma", "power"), [(1.0, 2 / 3), (5.0, 0.75)])
def test_warmup_is_timms_and_diffusers_to_the_bit(after: int, gamma: float, power: float) -> None:
    _, ema = made(0.9999, decay_type="warmup", update_after_step=after, inv_gamma=gamma, power=power)
    for step in [*range(1, 300), 10_000, 10**7]:
        assert ema.decay_at(step) == timm_warmup(0.9999, step, after, gamma, power)


def test_warmup_at_the_issues_steps() -> None:
    _, ema = made(0.9999, decay_type="warmup", update_after_step=100)
    assert ema.decay_at(101) == 0.0
    assert ema.decay_at(102) == pytest.approx(0.370, abs=5e-4)


def test_warmup_beside_the_installed_originals() -> None:
    diffusers = pytest.importorskip("diffusers.training_utils", exc_type=Exception)
    theirs = diffusers.EMAModel([torch.zeros(1)], 0.9999, update_after_step=3, use_ema_warmup=True)
    _, ema = made(0.9999, decay_type="warmup", update_after_step=3)
    assert [ema.decay_at(step) for step in range(1, 200)] == [theirs.get_decay(step) for step in range(1, 200)]


def test_warmup_beside_the_installed_ema_pytorch() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch", exc_type=Exception)
    theirs = ema_pytorch.EMA(torch.nn.Linear(1, 1), beta=0.9999, update_after_step=3, update_every=1)
    _, ema = made(0.9999, decay_type="warmup", update_after_step=3)
    for step in range(1, 200):
        theirs.step.fill_(step)
        assert ema.decay_at(step) == pytest.approx(float(theirs.get_current_decay()), abs=1e-7)


# ---- power ----


@pytest.mark.parametrize("sigma_rel", [0.001, 0.02, 0.05, 0.1, 0.2, 0.28])
def test_gamma_is_the_largest_real_root(sigma_rel: float) -> None:
    gamma, inverse = gamma_of(sigma_rel), sigma_rel**-2
    np = pytest.importorskip("numpy")
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    assert gamma == pytest.approx(max(root.real for root in roots if abs(root.imag) < 1e-9), rel=1e-9)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-13)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.29, 1, float("nan"), float("inf"), True, "0.1", None])
def test_a_sigma_that_no_profile_has_is_refused(sigma_rel: Any) -> None:
    with pytest.raises(ValueError, match="sigma_rel"):
        gamma_of(sigma_rel)
    with pytest.raises(ValueError, match="sigma_rel"):
        made(decay_type="power", sigma_rel=sigma_rel)


@pytest.mark.parametrize("arguments", [{}, {"sigma_rel": 0.1, "gamma": 3}, {"gamma": -1}, {"gamma": math.inf}])
def test_power_takes_one_of_two(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gamma"):
        made(decay_type="power", **arguments)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("after", [0, 6])
def test_the_profile_is_the_power_function(every: int, after: int) -> None:
    """Updates at every third step give each third step the weight that those three have together."""
    last = 24
    found = weights_of_steps(
        list(range(1, last + 1)), decay_type="power", gamma=3.0, update_every=every, update_after_step=after
    )
    share = [(max(0, step - after) / (last - after)) ** 4 for step in range(last + 1)]
    expected = [
        share[step] - share[step - every] if step > after and step % every == 0 else 0.0 for step in range(last + 1)
    ]
    assert found == pytest.approx(expected, abs=1e-15)
    assert sum(found) == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore:the first update is told")
def test_irregular_steps_keep_the_profile() -> None:
    steps = [2, 3, 10, 11, 20]
    found = weights_of_steps(steps, passed=True, decay_type="power", gamma=3.0)
    share = [(step / 20) ** 4 for step in [0, *steps]]
    assert found == pytest.approx([0.0, *(b - a for a, b in pairwise(share))], abs=1e-15)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_standard_deviation_is_sigma_rel(sigma_rel: float) -> None:
    schedule, steps = PowerDecay(sigma_rel=sigma_rel), 4000
    share, mean, square = 1.0, 0.0, 0.0
    for step in range(steps, 0, -1):
        decay = schedule(0.0, step, None)
        mean += share * (1 - decay) * step
        square += share * (1 - decay) * step**2
        share *= decay
    assert math.sqrt(square - mean**2) / steps == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.filterwarnings("ignore:the first update is told")
def test_a_step_before_the_last_updates_is_refused_and_the_same_one_adds_nothing() -> None:
    weight, ema = made(decay_type="power", gamma=3.0)
    for step in (5, 9):
        weight.fill_(float(step))
        ema.update(step=step)
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match="step 7 lies before the last update's, 9"):
        ema.update(step=7)
    ema.update(step=9)
    assert torch.equal(ema.state_dict()["shadow"]["w"], before["shadow"]["w"])


@pytest.mark.filterwarnings("ignore:the first update is told")
def test_the_state_knows_the_last_update() -> None:
    weight, ema = made(decay_type="power", gamma=3.0)
    ema.update(step=4)
    ema.update(step=6)
    assert ema.state_dict()["last_update"] == 6
    twin = made(decay_type="power", gamma=3.0)[1]
    twin.load_state_dict(copy.deepcopy(ema.state_dict()))
    for each, live in ((ema, weight), (twin, twin.source[0][1])):  # type: ignore[index]
        live.fill_(1.0)
        each.update(step=10)
    assert ema.state_dict()["shadow"]["w"].item() == pytest.approx(1 - 0.6**4)
    assert torch.equal(ema.state_dict()["shadow"]["w"], twin.state_dict()["shadow"]["w"])


# ---- other profiles ----


def test_half_lives() -> None:
    assert made(decay_type="half_life", half_life=10)[1].decay_at(7) ** 10 == pytest.approx(0.5)
    images = made(decay_type="half_life", half_life=1000, batch_size=100)[1]
    assert images.decay_at(7) ** 10 == pytest.approx(0.5)
    every = made(decay_type="half_life", half_life=10, update_every=5)[1]
    assert every.decay_at(5) ** 2 == pytest.approx(0.5)
    ramped = made(decay_type="half_life", half_life=10, rampup_ratio=0.05)[1]
    assert ramped.decay_at(100) == pytest.approx(2 ** (-1 / 5)) and ramped.decay_at(300) == pytest.approx(2**-0.1)
    fraction = made(decay_type="half_life_fraction")[1]
    assert fraction.decay_at(1) == 2.0**-20 and fraction.decay_at(1000) == pytest.approx(2 ** (-1 / 50))


@pytest.mark.parametrize("after", [0, 4])
@pytest.mark.parametrize("every", [1, 2])
def test_debiased_forgets_the_initial_weights_at_once(every: int, after: int) -> None:
    found = weights_of_steps(
        list(range(1, 13)), decay=0.5, decay_type="debiased", update_every=every, update_after_step=after
    )
    updates = [step for step in range(after + 1, 13) if step % every == 0]
    halves = {step: 0.5**age for age, step in enumerate(reversed(updates))}
    assert found == pytest.approx([halves.get(step, 0.0) / sum(halves.values()) for step in range(13)], abs=1e-15)


def test_debiased_at_decay_1_is_the_mean() -> None:
    found = weights_of_steps(list(range(1, 11)), decay=1.0, decay_type="debiased", update_after_step=2)
    assert found == pytest.approx([0.0] * 3 + [1 / 8] * 8, abs=1e-15)


@pytest.mark.parametrize(
    ("decay_type", "arguments"),
    [
        ("half_life", {"half_life": 0}),
        ("half_life", {"half_life": 3, "batch_size": -1}),
        ("half_life", {"half_life": 3, "rampup_ratio": float("nan")}),
        ("half_life_fraction", {"half_life_fraction": 0}),
    ],
)
def test_half_lives_must_be_positive(decay_type: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a positive number"):
        made(decay_type=decay_type, **arguments)


# ---- schedules of one's own ----


def test_a_schedule_of_ones_own_may_see_the_last_update(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seeing(IDecayFunction):
        def at(self, decay: float, step: int, total_steps: int | None, last_update: int, after: int) -> float:
            seen.append((decay, step, total_steps, last_update, after))
            return decay

    seen: list[tuple[Any, ...]] = []
    monkeypatch.setitem(EMA_DECAY_FUNCTIONS, "seeing", Seeing)
    _, ema = made(0.5, decay_type="seeing", total_steps=9, update_every=2, update_after_step=1)
    for _ in range(4):
        ema.update()
    assert seen == [(0.5, 2, 9, 0, 1), (0.5, 4, 9, 2, 1)]


def test_a_schedule_must_define_one_of_the_two() -> None:
    class Empty(IDecayFunction):
        pass

    for kind in (Empty, IDecayFunction):
        with pytest.raises(TypeError, match="abstract"):
            kind()


# ---- several averages ----


def test_a_sequence_of_sigmas_keeps_as_many_averages() -> None:
    weight, several = made(decay_type="power", sigma_rel=[0.05, 0.1])
    singles = [FastEMA([("w", weight)], decay_type="power", sigma_rel=sigma) for sigma in (0.05, 0.1)]
    for step in range(20):
        weight.fill_(float(step))
        for ema in (several, *singles):
            ema.update()
    for which, single in enumerate(singles):
        assert torch.equal(several.shadow_state_dict(which=which)["w"], single.shadow_state_dict()["w"])
    assert several.decay_at(7) == (singles[0].decay_at(7), singles[1].decay_at(7))
    assert several.state_dict()["decay_args"] == {"sigma_rel": [0.05, 0.1]}


def test_decay_type_is_one_name() -> None:
    with pytest.raises(
        TypeError, match=r"decay_type is one name, .* got \['threshold', 'constant'\]: build a FastEMA for"
    ):
        made([0.9, 0.8], decay_type=["threshold", "constant"])


def test_a_state_of_0_2_0_with_a_schedule_for_each_average_loads_where_they_are_the_same() -> None:
    _, ema = made([0.9, 0.8], decay_type="constant")
    state = {**ema.state_dict(), "decay": [0.7, 0.6], "decay_type": ["constant", "constant"]}
    ema.load_state_dict(state)
    assert ema.decay == (0.7, 0.6) and ema.state_dict()["decay_type"] == "constant"
    with pytest.raises(ValueError, match="decay_type is one name"):
        ema.load_state_dict({**state, "decay_type": ["constant", "threshold"]})


@pytest.mark.parametrize(
    "arguments",
    [
        {"decay": [0.9, 0.99], "decay_type": "power", "sigma_rel": [0.1, 0.2, 0.05]},
        {"decay_type": "power", "sigma_rel": []},
    ],
)
def test_sequences_must_be_as_long_as_each_other(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one entry for each average"):
        made(**arguments)


def test_an_argument_that_no_schedule_takes_is_refused() -> None:
    with pytest.raises(TypeError, match="do not take the arguments: beta"):
        made(decay_type="threshold", beta=3)


# ---- the default ----


def test_the_default_is_0999_with_the_threshold_schedule() -> None:
    _, ema = made()
    assert ema.decay == 0.999
    assert [ema.decay_at(step) for step in (1, 8990, 8991)] == [2 / 11, 8991 / 9000, 0.999]


# ---- set_decay ----


@pytest.mark.parametrize("capturable", [False, True])
def test_a_decay_set_in_mid_run_is_that_of_the_next_update(backend: str, capturable: bool) -> None:
    weight, ema = made(0.9, decay_type="constant", backend=backend, capturable=capturable)
    weight.fill_(1.0)
    ema.update()
    ema.set_decay(0.5)
    ema.update()
    assert ema.decay == 0.5
    assert ema.state_dict()["shadow"]["w"].item() == pytest.approx(0.1 + 0.5 * 0.9)
    twin = made(0.9, decay_type="constant", backend=backend, capturable=capturable)[1]
    with pytest.warns(UserWarning, match=r"decay=0\.5 and goes on with it, not with 0\.9"):
        twin.load_state_dict(ema.state_dict())
    assert twin.decay == 0.5 and twin.decay_at(3) == 0.5


def test_one_decay_for_all_or_one_for_each() -> None:
    _, ema = made([0.9, 0.99], decay_type="threshold")
    ema.set_decay([0.5, 0.6])
    assert ema.decay == (0.5, 0.6)
    ema.set_decay(0.7)
    assert ema.decay == (0.7, 0.7)


def test_a_captured_table_is_rewritten_where_it_is(backend: str) -> None:
    weight, ema = made(0.9, decay_type="threshold", backend=backend, capturable=True)
    eager = FastEMA([("w", weight)], 0.9, decay_type="threshold", backend=backend)
    assert ema.counter is not None
    address = ema.counter._table.data_ptr()
    for step in range(1, 60):
        weight.fill_(float(step))
        if step == 7:
            ema.set_decay(0.7)
            eager.set_decay(0.7)
        ema.update()
        eager.update()
    assert ema.counter._table.data_ptr() == address
    assert torch.equal(ema.state_dict()["shadow"]["w"], eager.state_dict()["shadow"]["w"])
    with pytest.raises(ValueError, match="the table has room for 80 updates, and 8990 are needed"):
        ema.set_decay(0.999)
    assert ema.decay == 0.7 and ema.decay_at(500) == 0.7


@pytest.mark.parametrize("decay", [1.5, -0.1, float("nan"), "0.9", None, [0.9], [0.9, 0.9, 0.9], [0.9, 2]])
def test_bad_decays_change_nothing(decay: Any) -> None:
    _, ema = made([0.9, 0.99])
    with pytest.raises(ValueError, match="decay"):
        ema.set_decay(decay)
    assert ema.decay == (0.9, 0.99)


@pytest.mark.parametrize(
    "arguments",
    [
        {"decay_type": "power", "sigma_rel": 0.1},
        {"decay_type": "half_life", "half_life": 9},
        {"decay_type": "half_life_fraction"},
    ],
)
def test_schedules_without_a_target_refuse_one(arguments: dict[str, Any]) -> None:
    _, ema = made(**arguments)
    with pytest.raises(ValueError, match=r"set_decay\(\) needs a target decay, and the '[a-z_]+' schedule has none"):
        ema.set_decay(0.9)
    with pytest.raises(ValueError, match=r"update\(decay=\) needs a target decay, and the '[a-z_]+' schedule has none"):
        ema.update(decay=0.9)
    assert ema.num_updates == 0


@pytest.mark.parametrize("decay_type", ["power", "half_life", "half_life_fraction"])
def test_no_16_bit_average_where_decays_come_close_to_1(decay_type: str) -> None:
    arguments = {"power": {"sigma_rel": 0.1}, "half_life": {"half_life": 1000}}.get(decay_type, {})
    with pytest.raises(ValueError, match="stands still"):
        made(0.5, decay_type=decay_type, dtype=torch.bfloat16, **arguments)


def test_window_and_lag_of_a_power_schedule_are_those_of_now() -> None:
    _, ema = made(decay_type="power", gamma=4.0)
    for _ in range(1000):
        ema.update()
    assert ema.window() == pytest.approx(200, rel=0.01)  # t / (gamma + 1)
    assert ema.lag(100) == pytest.approx(2, rel=0.01)


# ---- states of others ----


def test_a_loaded_state_keeps_its_own_schedule() -> None:
    _, ema = made(decay_type="power", sigma_rel=0.1)
    ema.update()
    twin = made()[1]
    with pytest.warns(UserWarning) as seen:
        twin.load_state_dict(ema.state_dict())
    told = [str(warning.message) for warning in seen]
    assert any("decay_type='power' and goes on with it, not with 'threshold'" in text for text in told)
    assert twin.decay_at(50) == ema.decay_at(50)


def test_a_schedule_that_cannot_be_built_here_changes_nothing() -> None:
    _, ema = made(0.9, decay_type="constant")
    state = {**copy.deepcopy(ema.state_dict()), "step": 7, "decay_type": "exp"}
    with pytest.raises(ValueError, match=r"the state was averaged with .*'exp' needs total_steps"):
        ema.load_state_dict(state)
    assert ema.state_dict()["step"] == 0


def of_0_1_0(ema: FastEMA) -> dict[str, Any]:
    return {key: value for key, value in ema.state_dict().items() if key not in ("last_update", "decay_args")}


def test_a_state_of_0_1_0_loads() -> None:
    _, ema = made(0.9, decay_type="threshold", update_every=4)
    for _ in range(10):
        ema.update()
    twin = made(0.9, decay_type="threshold", update_every=4)[1]
    twin.load_state_dict(of_0_1_0(ema))
    assert twin.state_dict()["last_update"] == ema.state_dict()["last_update"] == 8


@pytest.mark.parametrize(
    "arguments",
    [
        {"decay_type": "power", "sigma_rel": 0.1},
        {"decay_type": "debiased"},
        {"decay_type": "half_life", "half_life": 1000},
        {"decay_type": "half_life_fraction"},
        {"decay_type": "power", "sigma_rel": [0.1, 0.2]},
    ],
)
def test_a_first_step_that_is_late_says_what_is_lost(arguments: dict[str, Any]) -> None:
    """The obvious way to go on with another average: build on it, load the live weights, tell the step."""
    weight, ema = made(**arguments)
    weight.fill_(1.0)
    with pytest.warns(UserWarning, match=r"told step 100001: .* load_state_dict\(\{'step': 100000") as said:
        ema.update(step=100_001)
    assert [each.filename for each in said] == [__file__]
    ema.update(step=100_002)
    assert len(said) == 1, "the first alone"


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"decay_type": "threshold"}, [100_001]),
        ({"decay_type": "warmup"}, [100_001]),
        ({"decay_type": "power", "gamma": 3.0, "update_every": 10}, [10, 20]),
        ({"decay_type": "power", "gamma": 3.0}, [1, 2]),
        ({"decay_type": "power", "gamma": 3.0, "update_after_step": 1000}, [1000, 1001]),
    ],
)
def test_no_warning_where_nothing_is_lost(
    arguments: dict[str, Any], steps: list[int], recwarn: pytest.WarningsRecorder
) -> None:
    _, ema = made(**arguments)
    for step in steps:
        ema.update(step=step)
    loaded = made(**arguments)[1]
    loaded.load_state_dict({**ema.state_dict(), "step": 100_000, "num_updates": 100_000, "last_update": 100_000})
    loaded.update(step=100_001)
    assert not recwarn.list

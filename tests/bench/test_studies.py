"""The simulation behind the advisor's figures: its losses, its noise, and that the seed determines them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.studies import advisor
from bench.studies.advisor import SITUATIONS, run_decays, run_starts
from bench.studies.advisor_problems import FLOOR, SETS, Simulation, linear

CONSTANT = ("constant", 1.0)
FAMILIES = [family for chosen in SETS.values() for family in chosen.families]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_gradient_is_that_of_the_loss(family) -> None:
    simulation = Simulation(family, torch.Generator().manual_seed(0), problems=2, replicas=3)
    weights = simulation.weights.double().requires_grad_()
    (wanted,) = torch.autograd.grad(simulation.loss(weights).sum(), weights)
    slope = simulation.curvature * family.residual(weights)
    assert torch.allclose(slope[..., None, :] * family.pull(weights), wanted)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_nothing_beats_the_floor_and_the_optimum_reaches_it(family) -> None:
    simulation = Simulation(family, torch.Generator().manual_seed(0), problems=2, replicas=3)
    assert (simulation.loss() > FLOOR).all()
    best = (
        torch.zeros_like(simulation.weights) if family.name.startswith("least") else torch.ones_like(simulation.weights)
    )
    assert torch.allclose(simulation.loss(best), torch.tensor(FLOOR), rtol=1e-6)


@pytest.mark.parametrize("heavy_tails", [False, True])
def test_the_noise_is_what_it_says(heavy_tails: bool) -> None:
    """Least squares at the optimum: one step moves by rate x noise, of variance curvature / batch."""
    family = linear("x", (10, 10), heavy_tails)
    simulation = Simulation(family, torch.Generator().manual_seed(0), 1, 200_000, rate=(0.1, 0.1), batch=(4, 4))
    simulation.weights = torch.zeros_like(simulation.weights)
    simulation.step(torch.ones(1))
    moved = simulation.weights[0, :, 0] / 0.1
    # The fourth moment of t with 3 degrees of freedom is infinite: its sample variance is a coarse estimate.
    tolerance = 0.25 if heavy_tails else 0.02
    assert torch.allclose(moved.var(0), simulation.curvature[0, 0] / 4, rtol=tolerance)


def test_tune_and_report_share_nothing() -> None:
    tune, report = SETS["tune"], SETS["report"]
    assert tune.seed != report.seed
    assert not {family.name for family in tune.families} & {family.name for family in report.families}
    assert not set(tune.lengths) & set(report.lengths)


def test_the_candidates_are_what_fastema_computes() -> None:
    """Against the averages of one run, in plain arithmetic; decay 0 ends where the run does."""
    family = SETS["tune"].families[0]
    result = run_decays(family, 60, (CONSTANT,), seed=3, problems=2)
    simulation = Simulation(family, torch.Generator().manual_seed(3), problems=2, replicas=4)
    shadow = simulation.weights.double()
    for step in range(1, 61):
        simulation.step(torch.ones(2))
        decay = min(0.9, (1 + step) / (10 + step))
        shadow = decay * shadow + (1 - decay) * simulation.weights
    assert torch.allclose(result.of(0.0, "constant"), simulation.loss().mean(-1))
    assert torch.allclose(result.of(0.9, "threshold"), simulation.loss(shadow).mean(-1).float(), rtol=1e-4)


def test_the_same_seed_gives_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = SETS["report"].families[0]
    runs = [run_decays(family, 200, (("cosine", 0.0),), seed=1, problems=2) for _ in range(2)]
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert run_starts(family, SITUATIONS[0], seed=1, problems=2) == run_starts(family, SITUATIONS[0], 1, 2)
    first = advisor.run("report", problems=2, lengths=(200,))
    advisor.print_figures(first)
    assert "should_start, asked after every epoch" in capsys.readouterr().out
    json.dumps(first, allow_nan=False)


def test_a_training_that_falls_apart_is_named_so() -> None:
    result = run_starts(SETS["tune"].families[0], SITUATIONS[-1], seed=0, problems=8)
    assert [each.action for each in result.asked].count("fix first") == 8


def test_the_recommendation_and_the_outlook_hold_on_a_small_sample() -> None:
    """The bounds of the study, on problems that it has not: other seeds, 1,200 updates."""
    results = [
        run_decays(family, 1200, SETS["report"].rates, seed=90 + i, problems=12)
        for i, family in enumerate(SETS["report"].families)
    ]
    figures = {row["policy"]: row for row in advisor.decay_figures(results)}
    advised = figures["recommend_decay"]
    assert advised["within_2_percent"] >= 0.95
    assert advised["worse_than_base"] == 0
    for policy, row in figures.items():
        assert advised["within_2_percent"] >= row["within_2_percent"], policy
    outlook = {row["case"]: row for row in advisor.outlook_figures(results)}
    assert outlook["little"]["right"] >= 0.9
    assert outlook["much"]["ahead_by_2_percent"] > outlook["little"]["ahead_by_2_percent"]
    assert all(row["behind_by_2_percent"] == 0 for row in outlook.values())


def test_following_should_start_costs_next_to_nothing() -> None:
    asked = [
        each
        for i, situation in enumerate(SITUATIONS[:3])
        for each in run_starts(SETS["report"].families[0], situation, seed=70 + i, problems=4).asked
    ]
    assert max(each.regret for each in asked) < 0.02


def test_runs_that_diverge_are_left_out_and_counted() -> None:
    """Four factors at a rate far beyond what they stand."""
    family = replace(SETS["report"].families[3], start=lambda z: 3 + torch.cat([z[:1] * 9, z[1:] * 0]))
    result = run_decays(family, 50, (CONSTANT,), seed=0, problems=4)
    assert result.diverged >= 1
    assert result.losses.shape[1] == 4 - result.diverged
    assert result.losses.isfinite().all()


@pytest.mark.parametrize("arguments", [["--problems", "0"], ["--json", "no/such/folder/x.json"], ["--set", "mine"]])
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        advisor.main(arguments)
    assert caught.value.code == 2

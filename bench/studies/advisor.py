"""Measure how often the advice is right, with noisy SGD on losses of known optimum and known noise.

    python -m bench.studies.advisor                # problems that nothing was tuned on: the figures to quote
    python -m bench.studies.advisor --set tune     # problems that the advisor's constants were chosen on
    python -m bench.studies.advisor --json advisor.json

A loss is `floor + excess`: the floor is the noise of the labels, which no weights can beat, the excess is 0 at the
optimum. All decays of a grid run at once. The best decay in hindsight is the one of the grid, with one of two
schedules, or no average, that has the least loss at the end of the run, a mean over replicas. The two sets share no
family, no seed and no run length.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.console import print_table
from bench.studies.advisor_problems import FLOOR, SETS, Family, Simulation, rates_at
from fastema.advisor import recommend_decay, should_start
from fastema.schedules import EMA_DECAY_FUNCTIONS

GRID = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
SCHEDULES = ("constant", "threshold")
NEAR = 1.02
UPDATES_PER_EPOCH = 50


# --- which decay ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecayResult:
    """One family at one length: losses at the end, [candidates, problems]; decay 0 is no average.

    Problems of which a replica diverged are left out: no decay is the best there.
    """

    family: str
    length: int
    candidates: tuple[tuple[float, str], ...]
    losses: Tensor
    diverged: int

    def of(self, decay: float, decay_type: str) -> Tensor:
        return self.losses[self.candidates.index((decay, decay_type))]


def run_decays(
    family: Family, length: int, rates: Sequence[str], seed: int, problems: int, extra: Sequence[tuple[float, str]] = ()
) -> DecayResult:
    """Simulate one family at one length with every decay at once."""
    generator = torch.Generator().manual_seed(seed)
    simulation = Simulation(family, generator, problems, replicas=4)
    kinds = [rates[i % len(rates)] for i in range(problems)]
    grid = [(decay, schedule) for schedule in SCHEDULES for decay in GRID]
    advised = recommend_decay(max(1, length // UPDATES_PER_EPOCH), UPDATES_PER_EPOCH)
    candidates = list(dict.fromkeys([*grid, (advised.decay, advised.decay_type), *extra, (0.0, "constant")]))
    targets = torch.tensor([decay for decay, _ in candidates], dtype=torch.float64)
    warm = torch.tensor([schedule == "threshold" for _, schedule in candidates])
    threshold = EMA_DECAY_FUNCTIONS["threshold"]()
    averages = simulation.weights.expand(len(candidates), *simulation.weights.shape).clone()
    for step in range(1, length + 1):
        simulation.step(torch.tensor(rates_at(kinds, step / length)))
        limit = threshold(1.0, step, length)
        decays = torch.where(warm, targets.clamp(max=limit), targets)
        averages.lerp_(simulation.weights, (1 - decays).float()[:, None, None, None, None])
    losses = simulation.loss(averages).mean(-1)
    finite = losses.isfinite().all(0)
    return DecayResult(family.name, length, tuple(candidates), losses[:, finite], int((~finite).sum()))


def decay_figures(results: Sequence[DecayResult]) -> list[dict[str, Any]]:
    """Compute how often each policy is within 2 % of the best in hindsight; the advisor first."""

    def advised(result: DecayResult) -> tuple[float, str]:
        advice = recommend_decay(max(1, result.length // UPDATES_PER_EPOCH), UPDATES_PER_EPOCH)
        return advice.decay, advice.decay_type

    policies: dict[str, Callable[[DecayResult], tuple[float, str]]] = {"recommend_decay": advised}
    for decay in (0.99, 0.999, 0.9999):
        for schedule in SCHEDULES:
            policies[f"always {decay:g}, {schedule}"] = lambda _, choice=(decay, schedule): choice  # type: ignore[misc]
    policies["no average"] = lambda _: (0.0, "constant")
    figures = []
    for name, choose in policies.items():
        best = torch.cat([result.losses.min(0).values for result in results])
        got = torch.cat([result.of(*choose(result)) for result in results])
        base = torch.cat([result.of(0.0, "constant") for result in results])
        # Elsewhere no average gains 2 %, so no decay can be wrong.
        gaining = base > NEAR * best
        share = ((base - got) / (base - best))[gaining]
        near = got <= NEAR * best
        figures.append(
            {
                "policy": name,
                "within_2_percent": float(near.float().mean()),
                "within_2_percent_where_it_matters": float(near[gaining].float().mean()) if gaining.any() else None,
                "worse_than_base": float((got > NEAR * base).float().mean()),
                "mean_regret": float((got / best - 1).mean()),
                "median_excess_ratio": float(((got - FLOOR) / (best - FLOOR)).median()),
                "median_share_of_gain": float(share.median()) if len(share) else None,
                "problems": len(best),
                "problems_where_it_matters": int(gaining.sum()),
                "diverged": sum(result.diverged for result in results),
            }
        )
    return figures


# --- when to start ----------------------------------------------------------------------------------------------------

EPOCHS_SEEN = 12
EPOCHS_AFTER = 20


@dataclass(frozen=True)
class Situation:
    """A state of training when the advisor is asked: ranges of the simulation, updates before the first epoch."""

    name: str
    rate: tuple[float, float]
    batch: tuple[float, float]
    done_before: int = 0
    scale_of_start: float = 1.0


SITUATIONS = (
    Situation("learning, noisy", (0.02, 0.1), (1, 8)),
    Situation("at its noise level", (0.1, 0.4), (1, 4), done_before=1500),
    Situation("converged, hardly any noise", (0.1, 0.3), (20_000, 100_000), done_before=3000),
    Situation("stuck at a saddle", (0.001, 0.002), (1e8, 1e9), scale_of_start=1e-3),
    Situation("falls apart", (0.2, 0.4), (1, 4), done_before=300),
)


@dataclass(frozen=True)
class Asked:
    """One answer of should_start, and the effect of a start at that moment."""

    action: str
    pattern: str
    paid: bool
    hurt: bool

    @property
    def right(self) -> bool:
        return (self.action == "start") == self.paid


@dataclass(frozen=True)
class StartResult:
    """One situation of one family."""

    family: str
    situation: str
    asked: tuple[Asked, ...]


def run_starts(family: Family, situation: Situation, seed: int, problems: int) -> StartResult:
    """Ask the advisor after some epochs, start the average in any case, and compare.

    A start paid if at the end the average is at least 2 % better than the model beside it, and better than the model
    was when the average was started: an average of a diverging training may beat its model and is of no use. It hurt if
    the average is at least 2 % worse than the model beside it.
    """
    generator = torch.Generator().manual_seed(seed)
    simulation = Simulation(family, generator, problems, 1, situation.rate, situation.batch)
    simulation.weights = simulation.weights * situation.scale_of_start
    full = torch.ones(problems)
    for _ in range(situation.done_before):
        simulation.step(full)
    history = []
    for epoch in range(EPOCHS_SEEN):
        # From the third epoch before the question on, the learning rate is so high that least squares diverge.
        apart = situation.name == "falls apart" and epoch >= EPOCHS_SEEN - 3
        for _ in range(UPDATES_PER_EPOCH):
            simulation.step(_breaking(simulation) if apart else full)
        history.append(_bounded(simulation.loss()[:, 0]))
    advices = [should_start([float(loss[i]) for loss in history], mode="min") for i in range(problems)]

    advised = recommend_decay(EPOCHS_AFTER, UPDATES_PER_EPOCH)
    schedule = EMA_DECAY_FUNCTIONS[advised.decay_type]()
    average = simulation.weights.clone()
    ends = []
    for step in range(1, EPOCHS_AFTER * UPDATES_PER_EPOCH + 1):
        simulation.step(_breaking(simulation) if situation.name == "falls apart" else full)
        average.lerp_(simulation.weights, 1 - schedule(advised.decay, step, None))
        # The model's loss is noisy from step to step, so its end is the mean of the last epoch.
        if step > (EPOCHS_AFTER - 1) * UPDATES_PER_EPOCH:
            ends.append(torch.stack([_bounded(simulation.loss()[:, 0]), _bounded(simulation.loss(average)[:, 0])]))
    model, averaged = torch.stack(ends).mean(0)
    then = torch.stack(history[-3:]).mean(0)
    paid = (averaged * NEAR <= model) & (averaged <= then)
    hurt = averaged >= NEAR * model
    return StartResult(
        family.name,
        situation.name,
        tuple(Asked(advice.action, advice.pattern, bool(paid[i]), bool(hurt[i])) for i, advice in enumerate(advices)),
    )


def _breaking(simulation: Simulation) -> Tensor:
    """Return the factor that makes the learning rate 2.02, at which least squares diverge."""
    return 2.02 / simulation.rate


def _bounded(loss: Tensor) -> Tensor:
    """Return the loss, at most 1e6 and finite."""
    return loss.nan_to_num(1e6, 1e6).clamp(max=1e6)


# --- the command ------------------------------------------------------------------------------------------------------


def run(name: str, problems: int = 24, lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """Simulate a whole set; return plain values."""
    chosen = SETS[name]
    decays = [
        run_decays(family, length, chosen.rates, 1000 * chosen.seed + 10 * i + j, problems)
        for i, family in enumerate(chosen.families)
        for j, length in enumerate(chosen.lengths if lengths is None else lengths)
    ]
    starts = [
        run_starts(family, situation, 5000 * chosen.seed + 10 * i + j, problems)
        for i, family in enumerate(chosen.families)
        for j, situation in enumerate(SITUATIONS)
        if not (situation.name == "stuck at a saddle" and family.name.startswith("least squares"))  # has none
    ]
    by_length = [{"family": result.family, "updates": result.length, **decay_figures([result])[0]} for result in decays]
    situations = [
        {
            "situation": situation.name,
            **start_figures([each for result in starts if result.situation == situation.name for each in result.asked]),
        }
        for situation in SITUATIONS
    ]
    return {
        "set": name,
        "decays": decay_figures(decays),
        "by_length": by_length,
        "starts": situations,
        "starts_in_all": start_figures([each for result in starts for each in result.asked]),
    }


def start_figures(asked: Sequence[Asked]) -> dict[str, Any]:
    """Compute how often the advice was right, and the cost of following it."""
    started = [each for each in asked if each.action == "start"]
    patterns = sorted({each.pattern for each in asked})
    return {
        "runs": len(asked),
        "right": sum(each.right for each in asked) / len(asked),
        "paid": sum(each.paid for each in asked) / len(asked),
        "missed": sum(each.paid and each.action != "start" for each in asked) / len(asked),
        "hurt_when_advised": sum(each.hurt for each in started) / len(started) if started else None,
        "patterns": {pattern: sum(each.pattern == pattern for each in asked) for pattern in patterns},
    }


def print_figures(found: dict[str, Any]) -> None:
    """Print the tables."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.0f} %"

    first = found["decays"][0]
    print_table(
        f"Which decay ({found['set']} problems): loss at the end, against the best of the grid in hindsight; "
        f"{first['problems']} runs, {first['problems_where_it_matters']} where the best average gains 2 % or more, "
        f"{first['diverged']} diverged and left out",
        ("policy", "within 2 %", "where it matters", "2 % worse than no average", "mean regret", "share of the gain"),
        [
            (
                row["policy"],
                percent(row["within_2_percent"]),
                percent(row["within_2_percent_where_it_matters"]),
                percent(row["worse_than_base"]),
                f"{100 * row['mean_regret']:.1f} %",
                percent(row["median_share_of_gain"]),
            )
            for row in found["decays"]
        ],
    )
    print_table(
        "recommend_decay, by problem and length",
        ("problem", "updates", "within 2 %", "where it matters", "mean regret", "excess / best excess (median)"),
        [
            (
                row["family"],
                f"{row['updates']:,}",
                percent(row["within_2_percent"]),
                percent(row["within_2_percent_where_it_matters"]),
                f"{100 * row['mean_regret']:.1f} %",
                f"{row['median_excess_ratio']:.2f}",
            )
            for row in found["by_length"]
        ],
    )
    everything = found["starts_in_all"]
    print_table(
        f"should_start: right in {percent(everything['right'])} of {everything['runs']} runs "
        f"(always starting would be in {percent(everything['paid'])}).\n"
        "paid: a start brought 2 % or more. missed: it would have, but was advised against. hurt: of the advised ones",
        ("situation", "runs", "paid", "right", "missed", "hurt", "patterns seen"),
        [
            (
                row["situation"],
                str(row["runs"]),
                percent(row["paid"]),
                percent(row["right"]),
                percent(row["missed"]),
                percent(row["hurt_when_advised"]),
                ", ".join(f"{name} {count}" for name, count in row["patterns"].items()),
            )
            for row in found["starts"]
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.studies.advisor", description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=sorted(SETS), default="report", help="which problems (default: report)")
    parser.add_argument("--problems", type=int, default=24, metavar="N", help="problems a family (default: 24)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    parsed = parser.parse_args(arguments)
    if parsed.problems < 1:
        parser.error(f"--problems must be at least 1, got {parsed.problems}")
    if parsed.json is not None and not parsed.json.parent.is_dir():
        parser.error(f"--json: there is no folder {parsed.json.parent}")
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
    started = time.perf_counter()
    found = run(parsed.set, parsed.problems)
    print_figures(found)
    print(f"{time.perf_counter() - started:.0f} s")
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {parsed.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from bench.harness.console import print_table
from bench.studies.advisor_problems import FLOOR, SETS, Family, Simulation
from fastema.advisor import StartAdvice, expect, recommend_decay, should_start
from fastema.advisor.outlook import rate_at
from fastema.advisor.recommendation import DECAY, SCHEDULE
from fastema.schedules import EMA_DECAY_FUNCTIONS

GRID = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
SCHEDULES = ("constant", "threshold")
NEAR = 1.02
UPDATES_PER_EPOCH = 50


# --- which decay ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecayResult:
    """One family at one length: losses at the end, [candidates, problems]; decay 0 is no average.

    `rates` has the learning-rate schedule and final share of each problem.

    Problems of which a replica diverged are left out: no decay is the best there.
    """

    family: str
    length: int
    candidates: tuple[tuple[float, str], ...]
    rates: tuple[tuple[str, float], ...]
    losses: Tensor
    diverged: int

    def of(self, decay: float, decay_type: str) -> Tensor:
        return self.losses[self.candidates.index((decay, decay_type))]


def run_decays(
    family: Family, length: int, rates: Sequence[tuple[str, float]], seed: int, problems: int
) -> DecayResult:
    """Simulate one family at one length with every decay at once."""
    generator = torch.Generator().manual_seed(seed)
    simulation = Simulation(family, generator, problems, replicas=4)
    kinds = [rates[i % len(rates)] for i in range(problems)]
    grid = [(decay, schedule) for schedule in SCHEDULES for decay in GRID]
    candidates = list(dict.fromkeys([*grid, *(_advised(length, *kind) for kind in rates), (0.0, "constant")]))
    targets = torch.tensor([decay for decay, _ in candidates], dtype=torch.float64)
    warm = torch.tensor([schedule == "threshold" for _, schedule in candidates])
    threshold = EMA_DECAY_FUNCTIONS["threshold"]()
    averages = simulation.weights.expand(len(candidates), *simulation.weights.shape).clone()
    for step in range(1, length + 1):
        now = {kind: rate_at(kind[0], step / length, kind[1]) for kind in rates}
        simulation.step(torch.tensor([now[kind] for kind in kinds]))
        limit = threshold(1.0, step, length)
        decays = torch.where(warm, targets.clamp(max=limit), targets)
        averages.lerp_(simulation.weights, (1 - decays).float()[:, None, None, None, None])
    losses = simulation.loss(averages).mean(-1)
    finite = losses.isfinite().all(0)
    kept = tuple(kind for kind, keep in zip(kinds, finite.tolist(), strict=True) if keep)
    return DecayResult(family.name, length, tuple(candidates), kept, losses[:, finite], int((~finite).sum()))


def _advised(length: int, lr_schedule: str, final_lr: float) -> tuple[float, str]:
    advice = recommend_decay(max(1, length // UPDATES_PER_EPOCH), UPDATES_PER_EPOCH, lr_schedule, final_lr)
    return advice.decay, advice.decay_type


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


# --- what to expect ---------------------------------------------------------------------------------------------------


def outlook_figures(results: Sequence[DecayResult]) -> list[dict[str, Any]]:
    """Compare what `expect()` says before a run with the loss at its end, for the recommended average.

    "much" is right if the average is ahead, "some" if it is not 2 % behind, "little" if the two are within 2 %.
    """
    by_case: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        for i, kind in enumerate(result.rates):
            case = expect(result.length, *kind).case
            base, average = float(result.of(0.0, "constant")[i]), float(result.of(*_advised(result.length, *kind))[i])
            by_case.setdefault(case, []).append((base, average))
    figures = []
    for name, pairs in sorted(by_case.items()):
        lowest, highest = {"much": (0.0, 1.0), "some": (0.0, NEAR), "little": (1 / NEAR, NEAR)}[name]
        right = [lowest < average / base < highest for base, average in pairs]
        figures.append(
            {
                "case": name,
                "runs": len(pairs),
                "right": fmean(right),
                "ahead": fmean(average < base for base, average in pairs),
                "ahead_by_2_percent": fmean(average * NEAR <= base for base, average in pairs),
                "behind_by_2_percent": fmean(average >= base * NEAR for base, average in pairs),
                # An excess that float32 rounds to 0 has no ratio.
                "median_excess_ratio": median((a - FLOOR) / (base - FLOOR) for base, a in pairs if base > FLOOR),
            }
        )
    return figures


# --- when to start ----------------------------------------------------------------------------------------------------

EPOCHS_SEEN = 12
EPOCHS_AFTER = 10


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
    """A run in which should_start was asked after every epoch, until it said start.

    Attributes:
        pattern: what it saw after EPOCHS_SEEN epochs.
        action: what it advised then.
        started: the epoch after which the average was started; None: never.
        followed: the loss at the end of the better of model and average.
        from_first: the same with an average from the first step.
    """

    pattern: str
    action: str
    started: int | None
    followed: float
    from_first: float

    @property
    def regret(self) -> float:
        """The loss beyond that with an average from the first step, as a share of the latter."""
        return self.followed / self.from_first - 1


@dataclass(frozen=True)
class StartResult:
    """One situation of one family."""

    family: str
    situation: str
    asked: tuple[Asked, ...]


def run_starts(family: Family, situation: Situation, seed: int, problems: int) -> StartResult:
    """Run two averages beside a training: from the first step, and from when the advisor says start."""
    generator = torch.Generator().manual_seed(seed)
    simulation = Simulation(family, generator, problems, 1, situation.rate, situation.batch)
    simulation.weights = simulation.weights * situation.scale_of_start
    full = torch.ones(problems)
    for _ in range(situation.done_before):
        simulation.step(full)
    threshold = EMA_DECAY_FUNCTIONS[SCHEDULE]()
    averages = simulation.weights.expand(2, *simulation.weights.shape).clone()  # from the first step; as advised
    history: list[Tensor] = []
    started: list[int | None] = [None] * problems
    advices: list[StartAdvice] = []
    ends = []
    for epoch in range(1, EPOCHS_SEEN + EPOCHS_AFTER + 1):
        # From the third epoch before the question on, the learning rate is so high that least squares diverge.
        apart = situation.name == "falls apart" and epoch > EPOCHS_SEEN - 3
        for step in range((epoch - 1) * UPDATES_PER_EPOCH + 1, epoch * UPDATES_PER_EPOCH + 1):
            simulation.step(_breaking(simulation) if apart else full)
            # Before its start the second average is the model itself.
            own = [0.0 if at is None else threshold(DECAY, step - at * UPDATES_PER_EPOCH, None) for at in started]
            decays = torch.tensor([[threshold(DECAY, step, None)] * problems, own])
            averages.lerp_(simulation.weights, (1 - decays)[..., None, None, None])
            # The model's loss is noisy from step to step, so its end is the mean of the last epoch.
            if epoch == EPOCHS_SEEN + EPOCHS_AFTER:
                ends.append(_bounded(torch.stack([simulation.loss(each)[:, 0] for each in averages])))
                ends[-1] = torch.cat([_bounded(simulation.loss()[:, 0])[None], ends[-1]])
        history.append(_bounded(simulation.loss()[:, 0]))
        answers = [should_start([float(loss[i]) for loss in history], mode="min") for i in range(problems)]
        if epoch == EPOCHS_SEEN:
            advices = answers
        started = [
            epoch if at is None and answer.action == "start" else at
            for at, answer in zip(started, answers, strict=True)
        ]
    model, first, advised = torch.stack(ends).mean(0)
    return StartResult(
        family.name,
        situation.name,
        tuple(
            Asked(
                advice.pattern,
                advice.action,
                started[i],
                float(torch.minimum(model, advised)[i]),
                float(torch.minimum(model, first)[i]),
            )
            for i, advice in enumerate(advices)
        ),
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
        "outlook": outlook_figures(decays),
        "starts": situations,
        "starts_in_all": start_figures([each for result in starts for each in result.asked]),
    }


def start_figures(asked: Sequence[Asked]) -> dict[str, Any]:
    """Compute what following should_start cost, against an average from the first step."""
    patterns = sorted({each.pattern for each in asked})
    regrets = [each.regret for each in asked]
    return {
        "runs": len(asked),
        "started": sum(each.started is not None for each in asked) / len(asked),
        "mean_regret": fmean(regrets),
        "worst_regret": max(regrets),
        "best_regret": min(regrets),
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
    print_table(
        "What expect() says, against the end. Right: ahead (much), not 2 % behind (some), within 2 % (little)",
        ("case", "runs", "right", "ahead", "2 % ahead", "2 % behind", "excess / excess of no average (median)"),
        [
            (
                row["case"],
                str(row["runs"]),
                percent(row["right"]),
                percent(row["ahead"]),
                percent(row["ahead_by_2_percent"]),
                percent(row["behind_by_2_percent"]),
                f"{row['median_excess_ratio']:.2f}",
            )
            for row in found["outlook"]
        ],
    )
    print_table(
        "should_start, asked after every epoch: more loss at the end than with an average from the first step",
        ("situation", "runs", "started", "mean", "worst", "best", f"patterns after epoch {EPOCHS_SEEN}"),
        [
            (
                row["situation"],
                str(row["runs"]),
                percent(row["started"]),
                *(f"{100 * row[name]:+.2f} %" for name in ("mean_regret", "worst_regret", "best_regret")),
                ", ".join(f"{name} {count}" for name, count in row["patterns"].items()),
            )
            for row in [*found["starts"], {"situation": "all", **found["starts_in_all"]}]
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

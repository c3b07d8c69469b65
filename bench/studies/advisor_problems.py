"""The problems of bench.studies.advisor: losses of known optimum and noise, and SGD on many of them side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 0.5  # labels with noise of variance 1: half of it is the loss of the perfect model
DIMENSIONS = 16


@dataclass(frozen=True)
class Family:
    """A kind of loss; every tensor is [..., factors, DIMENSIONS] for weights, [..., DIMENSIONS] for curvature.

    Attributes:
        name: in tables.
        factors: number of weights per coordinate.
        residual: distance of a coordinate from its optimum.
        pull: derivative of the residual by each weight.
        start: the first weights, from standard normal numbers.
        condition: the range of the ratio of largest to smallest curvature.
        heavy_tails: gradient noise of Student's t with 3 degrees of freedom instead of a normal one.
    """

    name: str
    factors: int
    residual: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]
    start: Callable[[Tensor], Tensor]
    condition: tuple[float, float]
    heavy_tails: bool = False

    def excess(self, weights: Tensor, curvature: Tensor) -> Tensor:
        return 0.5 * (curvature * self.residual(weights) ** 2).sum(-1)


def _others(weights: Tensor) -> Tensor:
    """Return, for each factor, the product of the others."""
    count = weights.shape[-2]
    return torch.stack([weights[..., [j for j in range(count) if j != i], :].prod(-2) for i in range(count)], -2)


def linear(name: str, condition: tuple[float, float], heavy_tails: bool = False) -> Family:
    """Return least squares in the eigenbasis: the curvature is the variance of the inputs."""
    return Family(name, 1, lambda w: w[..., 0, :], torch.ones_like, lambda z: 2 * z, condition, heavy_tails)


def _product(name: str, factors: int) -> Family:
    """Return a diagonal linear network: a product of weights should be 1. Non-convex, with a saddle at 0."""
    return Family(name, factors, lambda w: w.prod(-2) - 1, _others, lambda z: 0.6 + 0.1 * z, (10, 100))


def _double_well() -> Family:
    """Return (x² - 1)² / 4: two optima with a barrier between them; curvature 1 at either."""
    return Family(
        "double well, non-convex",
        1,
        lambda w: (w[..., 0, :] ** 2 - 1) / 2,
        lambda w: w,
        lambda z: z,
        (10, 100),
    )


def _neuron() -> Family:
    """Return (tanh x - tanh 1)² / 2: flat far from the optimum, so that a bad start is left slowly."""
    return Family(
        "tanh neurons, non-convex",
        1,
        lambda w: w[..., 0, :].tanh() - math.tanh(1.0),
        lambda w: 1 - w.tanh() ** 2,
        lambda z: z,
        (10, 100),
    )


def _flat() -> Family:
    """Return |x - 1|⁴ / 2: no curvature at the optimum, which is neared ever more slowly."""
    return Family(
        "flat optimum",
        1,
        lambda w: (w[..., 0, :] - 1) * (w[..., 0, :] - 1).abs(),
        lambda w: 2 * (w - 1).abs(),
        lambda z: 0.5 * z,
        (10, 100),
    )


@dataclass(frozen=True)
class ProblemSet:
    """The simulated families, run lengths in updates, and learning-rate schedules with their final shares."""

    seed: int
    families: tuple[Family, ...]
    lengths: tuple[int, ...]
    rates: tuple[tuple[str, float], ...]


RATES = (("constant", 1.0), ("cosine", 0.0), ("cosine", 0.2), ("linear", 0.0), ("wsd", 0.0), ("restarts", 0.0))

SETS = {
    "tune": ProblemSet(
        1,
        (
            linear("least squares", (10, 100)),
            linear("least squares, ill-conditioned, heavy tails", (100, 1000), heavy_tails=True),
            _double_well(),
            _product("two factors, non-convex", 2),
            _product("three factors, non-convex", 3),
        ),
        (500, 3_000, 12_000, 40_000),
        RATES,
    ),
    "report": ProblemSet(
        3,
        (
            linear("least squares, very ill-conditioned", (1000, 10_000)),
            _neuron(),
            _flat(),
            _product("four factors, non-convex", 4),
        ),
        (800, 5_000, 16_000, 64_000),
        RATES,
    ),
}


class Simulation:
    """Many runs of one family side by side: problems x replicas; a problem has its curvature, batch and learning rate.

    Args:
        family: the loss.
        generator: of all random numbers.
        problems, replicas: number of each; the replicas of a problem differ by start and noise.
        rate: the range of the highest learning rate, times the largest curvature (1): 2 diverges in least squares.
        batch: the range of the batch size, which divides the variance of the gradient noise.
    """

    def __init__(
        self,
        family: Family,
        generator: torch.Generator,
        problems: int,
        replicas: int,
        rate: tuple[float, float] = (0.02, 0.3),
        batch: tuple[float, float] = (1, 32),
    ) -> None:
        self.family = family
        self._generator = generator
        condition = self._between(*family.condition, problems, 1)
        spread = torch.linspace(0, 1, DIMENSIONS)
        self.curvature = (condition**-spread)[:, None, :]  # [problems, 1, dims]
        self.rate = self._between(*rate, problems)
        self._noise = (self.curvature / self._between(*batch, problems)[:, None, None]).sqrt()
        shape = (problems, replicas, family.factors, DIMENSIONS)
        self.weights = family.start(torch.randn(shape, generator=generator))

    def step(self, share_of_rate: Tensor) -> None:
        """Take one step of SGD; `share_of_rate` is [problems]."""
        weights, family = self.weights, self.family
        noise = torch.randn(weights[..., 0, :].shape, generator=self._generator)
        if family.heavy_tails:
            # t with 3 degrees of freedom, scaled to variance 1: normal over the root of a mean of three squares.
            squares = torch.randn((3, *noise.shape), generator=self._generator).square_().mean(0)
            noise = noise / squares.sqrt() / math.sqrt(3)
        slope = self.curvature * family.residual(weights) + self._noise * noise
        rate = (self.rate * share_of_rate)[:, None, None, None]
        self.weights = weights - rate * slope[..., None, :] * family.pull(weights)

    def loss(self, weights: Tensor | None = None) -> Tensor:
        """Return the loss of the current weights, or of others: [..., problems, replicas]."""
        weights = self.weights if weights is None else weights
        return FLOOR + self.family.excess(weights, self.curvature)

    def _between(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw log-uniform numbers."""
        dice = torch.rand(shape, generator=self._generator)
        return low * (high / low) ** dice

"""An implementation on one model: its interface, its checks, its memory, and the copies that all are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from bench.harness.cases import Case, Unavailable, build_model
from bench.harness.meters import Meter

#: Largest error of a float32 average against float64, for values around 1.
TOLERANCE = 2e-6
_MOST_LIMIT_ELEMENTS = 64_000_000

Result = TypeVar("Result")


@dataclass
class Contender:
    """An implementation built on one model.

    Args:
        run: one update.
        averages: the averaged parameters, in the model's order.
        enter, leave: put the averages into the model for a validation and restore it; None where it cannot.
        second_module: the copy of the model that is validated instead.
        backend: whose kernels it runs, where only building it decides.
        model: referenced here, because some peers do not.
    """

    run: Callable[[], object]
    averages: Callable[[], Sequence[Tensor]]
    enter: Callable[[], object] | None = None
    leave: Callable[[], object] | None = None
    second_module: nn.Module | None = None
    backend: str | None = None
    model: nn.Module | None = None

    def swap(self) -> None:
        """Put the averages into the model and restore it."""
        assert self.enter is not None and self.leave is not None
        self.enter()
        self.leave()


Build = Callable[[nn.Module, Case], Contender]


@dataclass(frozen=True)
class Peer:
    """An implementation to build.

    Args:
        name: in tables.
        build: from a model and its case; may raise `Unavailable`.
        averages: False for a plain copy.
        copies: of the shadow that are in memory at once.
    """

    name: str
    build: Build
    averages: bool = True
    copies: int = 1

    def floor(self, case: Case) -> int:
        """Return the least bytes to read and write."""
        if self is LIMIT:
            return 2 * case.shadow_dtype.itemsize * min(case.params, _MOST_LIMIT_ELEMENTS)
        return case.update_bytes if self.averages else case.live_bytes + case.shadow_bytes


def lives_of(model: nn.Module) -> list[Tensor]:
    """Return the parameters, detached."""
    return [parameter.detach() for parameter in model.parameters()]


def shadows_of(model: nn.Module, case: Case) -> list[Tensor]:
    """Return copies of them in the shadow's dtype."""
    return [parameter.detach().to(case.shadow_dtype, copy=True) for parameter in model.parameters()]


# ---- plain copies ----


def _limit(model: nn.Module, case: Case) -> Contender:
    device = next(model.parameters()).device
    source = torch.ones(min(case.params, _MOST_LIMIT_ELEMENTS), dtype=case.shadow_dtype, device=device)
    target = torch.zeros_like(source)
    return Contender(lambda: target.copy_(source), lambda: [target])


def _copy(model: nn.Module, case: Case) -> Contender:
    lives, shadows = lives_of(model), shadows_of(model, case)
    return Contender(lambda: torch._foreach_copy_(shadows, lives), lambda: shadows)


LIMIT = Peer("torch copy_, one tensor", _limit, averages=False)
COPY = Peer("torch._foreach_copy_", _copy, averages=False)


# ---- checks ----


def check_update(peer: Peer, case: Case, device: torch.device) -> None:
    """Compare three updates of a small model of the case's dtypes with float64.

    Raises:
        Unavailable: it is missing, raises, or computes another average.
    """
    small = case.with_shapes([(3, 5), (17,), (1,), (64, 65), (1024,)])
    model = build_model(small, device)
    expected = [live.double() for live in lives_of(model)]
    contender = built(peer, model, small)
    half = case.shadow_dtype.itemsize == 2  # a 16-bit average rounds at every step
    tolerance = torch.finfo(case.shadow_dtype).eps if half else TOLERANCE
    for step in range(1, 4):
        nudge(model, 1 + step / 4)
        attempt(contender.run)
        averages = contender.averages()
        expected = [
            torch.lerp(old, live.double(), 1 - case.decay) for old, live in zip(expected, lives_of(model), strict=True)
        ]
        for average, wanted in zip(averages, expected, strict=True):
            if average.dtype != case.shadow_dtype:
                raise Unavailable(f"keeps the average in {average.dtype}")
            error = ((average.double() - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
            if not error <= tolerance:
                raise Unavailable(f"computes another average, off by {error:.1e}")
        if half:
            expected = [average.double() for average in averages]


def _is_rounded(live: Tensor, average: Tensor) -> bool:
    """Return whether `live` is the average in its own dtype, rounded to nearest; a tie may go either way."""
    cast = average.to(live.dtype).to(average.dtype)
    return bool(((live.to(average.dtype) - average).abs() <= (cast - average).abs()).all())


def check_swap(peer: Peer, case: Case, device: torch.device) -> None:
    """Check that `enter` puts the averages into the model and `leave` restores every bit.

    Raises:
        Unavailable: it does not, or it has a second module instead.
    """
    small = case.with_shapes([(3, 5), (17,), (1,), (64, 65)])
    model = build_model(small, device)
    contender = built(peer, model, small)
    if contender.enter is None or contender.leave is None:
        raise Unavailable("has a second module" if contender.second_module is not None else "exchanges nothing")
    nudge(model)
    attempt(contender.run)
    lives = [live.clone() for live in lives_of(model)]
    averages = [average.clone() for average in contender.averages()]
    if averages[0].dtype != case.shadow_dtype:
        raise Unavailable(f"keeps the average in {averages[0].dtype}")
    for _ in range(2):
        attempt(contender.enter)
        entered = all(_is_rounded(now, average) for now, average in zip(lives_of(model), averages, strict=True))
        attempt(contender.leave)
        left = all(torch.equal(now, live) for now, live in zip(lives_of(model), lives, strict=True))
        if not (entered and left):
            raise Unavailable("does not exchange the weights exactly")


def built(peer: Peer, model: nn.Module, case: Case) -> Contender:
    """Build the contender and run its first update, which is special for some (AveragedModel copies).

    Raises:
        Unavailable: it is missing or raises.
    """
    contender = attempt(lambda: peer.build(model, case))
    contender.model = model
    attempt(contender.run)
    return contender


def attempt(call: Callable[[], Result]) -> Result:
    """Return what the call returns.

    Raises:
        Unavailable: the call raised; with its message.
    """
    try:
        return call()
    except Unavailable:
        raise
    except Exception as error:  # a peer's failure is a result
        raise Unavailable(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


@torch.no_grad()
def nudge(model: nn.Module, factor: float = 0.5) -> None:
    """Move the weights off their averages, so that an update changes them."""
    for parameter in model.parameters():
        parameter.mul_(factor)


# ---- memory ----


@dataclass(frozen=True)
class Footprint:
    """Bytes beyond the model and one average. `validation`: None where the average cannot be validated."""

    kept: int
    update: int
    validation: int | None


def footprint(meter: Meter, peer: Peer, model: nn.Module, case: Case) -> tuple[Footprint, Contender]:
    """Build the peer and measure its memory.

    Raises:
        Unavailable: it is missing or raises.
    """
    found: list[Contender] = []
    kept = meter.allocated(lambda: found.append(built(peer, model, case))).kept - case.shadow_bytes
    contender = found[0]
    validation = None
    if contender.enter is not None and contender.leave is not None:
        first = meter.allocated(contender.swap).kept  # allocated at the first swap and held from then on
        validation = kept + first + meter.allocated(contender.swap).peak
    elif contender.second_module is not None:
        validation = kept
    return Footprint(kept, kept + meter.allocated(contender.run).peak, validation), contender

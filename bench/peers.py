"""Who is measured: fastema, and what people use instead, as its users call it.

Every one is first checked to compute the same average on a small model (`check_update`), or to exchange the weights and
put them back (`check_swap`). One that is missing or cannot do a case says so in its place in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from bench.cases import Case, Unavailable, build_model, import_timm
from fastema import FastEMA

DECAY = 0.999
#: Of the float32 averages from one computed in float64, for values around 1.
TOLERANCE = 2e-6
FOUR_AT_ONCE = "fastema, four decays"
FOUR_SINGLES = "fastema, four times one"
OURS = "fastema"

Result = TypeVar("Result")


@dataclass
class Contender:
    """An implementation on one model, ready to run.

    Args:
        run: one update.
        averages: the averaged parameters, in the model's order.
        kept_bytes: memory it keeps beyond the model and one shadow.
    """

    run: Callable[[], object]
    averages: Callable[[], Sequence[Tensor]]
    kept_bytes: int = 0


@dataclass
class Swapper:
    """A way to validate the averaged weights: `enter` puts them into the model, `leave` takes them out again."""

    enter: Callable[[], object]
    leave: Callable[[], object]
    kept_bytes: int = 0

    def run(self) -> None:
        self.enter()
        self.leave()


@dataclass(frozen=True)
class Peer:
    """An implementation to build.

    Args:
        name: as the table shows it.
        build: from a model and its case.
        backend: whose kernels it runs.
        from_a_library: False for what nobody ships, but a careful user could write.
        averages: False for the plain copy, which is there to compare with.
    """

    name: str
    build: Callable[[nn.Module, Case], Contender]
    backend: str = "torch"
    from_a_library: bool = True
    averages: bool = True

    def floor(self, case: Case) -> int:
        """Bytes that must be read and written."""
        return case.update_bytes if self.averages else case.live_bytes + case.shadow_bytes


@dataclass(frozen=True)
class SwapPeer:
    """A way to validate, to build from a model and the averages of its parameters."""

    name: str
    build: Callable[[nn.Module, Sequence[Tensor]], Swapper]
    backend: str = "torch"


# ---- updates ----


def _lives(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


def _shadows(model: nn.Module, case: Case) -> list[Tensor]:
    return [parameter.detach().to(case.shadow_dtype, copy=True) for parameter in model.parameters()]


def _fastema(backend: str) -> Callable[[nn.Module, Case], Contender]:
    def build(model: nn.Module, case: Case) -> Contender:
        try:
            ema = FastEMA(model, decay=DECAY, dtype=case.shadow_dtype, backend=backend)
        except ValueError as error:  # the backend is not built here
            raise Unavailable(str(error)) from None
        return Contender(ema.update, lambda: list(ema.shadow_state_dict().values()))

    return build


def _averaged_model(**fns: Any) -> Callable[[nn.Module, Case], Contender]:
    def build(model: nn.Module, case: Case) -> Contender:
        averaged = AveragedModel(model, **fns)
        if case.shadow_dtype != case.live_dtype:
            averaged.module.to(case.shadow_dtype)
        return Contender(lambda: averaged.update_parameters(model), lambda: _lives(averaged.module))

    return build


def _timm(model: nn.Module, case: Case) -> Contender:
    dtype = None if case.shadow_dtype == case.live_dtype else case.shadow_dtype
    ema = import_timm().utils.ModelEmaV3(model, decay=DECAY, dtype=dtype)
    return Contender(lambda: ema.update(model), lambda: _lives(ema.module))


def _copy(model: nn.Module, case: Case) -> Contender:
    lives, shadows = _lives(model), _shadows(model, case)
    return Contender(lambda: torch._foreach_copy_(shadows, lives), lambda: shadows)


def _foreach_lerp(model: nn.Module, case: Case) -> Contender:
    # Bare: the lists are made once, which no library but the leanest does.
    lives, shadows = _lives(model), _shadows(model, case)
    return Contender(lambda: torch._foreach_lerp_(shadows, lives, 1 - DECAY), lambda: shadows)


def _foreach_lerp_of_casts(model: nn.Module, case: Case) -> Contender:
    lives, shadows = _lives(model), _shadows(model, case)

    def run() -> None:
        torch._foreach_lerp_(shadows, [live.to(case.shadow_dtype) for live in lives], 1 - DECAY)

    return Contender(run, lambda: shadows)


def _lerp_of_cast(model: nn.Module, case: Case) -> Contender:
    lives, shadows = _lives(model), _shadows(model, case)

    def run() -> None:
        for shadow, live in zip(shadows, lives, strict=True):
            shadow.lerp_(live.to(case.shadow_dtype), 1 - DECAY)

    return Contender(run, lambda: shadows)


def _mul_add(model: nn.Module, case: Case) -> Contender:
    lives, shadows = _lives(model), _shadows(model, case)

    def run() -> None:
        for shadow, live in zip(shadows, lives, strict=True):
            shadow.mul_(DECAY).add_(live, alpha=1 - DECAY)

    return Contender(run, lambda: shadows)


def _foreach_mul_add(model: nn.Module, case: Case) -> Contender:
    lives, shadows = _lives(model), _shadows(model, case)

    def run() -> None:
        torch._foreach_mul_(shadows, DECAY)
        torch._foreach_add_(shadows, lives, alpha=1 - DECAY)

    return Contender(run, lambda: shadows)


def _foreach_lerp_of_kept_copy(model: nn.Module, case: Case) -> Contender:
    # A third copy of the model, but no allocation in the step.
    lives, shadows = _lives(model), _shadows(model, case)
    kept = [torch.empty_like(shadow) for shadow in shadows]

    def run() -> None:
        torch._foreach_copy_(kept, lives)
        torch._foreach_lerp_(shadows, kept, 1 - DECAY)

    return Contender(run, lambda: shadows, kept_bytes=case.shadow_bytes)


def _lerp_in_blocks(elements: int) -> Callable[[nn.Module, Case], Contender]:
    # The cast stays in the cache if it goes through one small buffer: the best that plain torch can do, as far as we
    # know. The views are made once.
    def build(model: nn.Module, case: Case) -> Contender:
        lives, shadows = _lives(model), _shadows(model, case)
        buffer = torch.empty(elements, dtype=case.shadow_dtype, device=shadows[0].device)
        blocks = [
            (to, of, buffer[: to.numel()])
            for shadow, live in zip(shadows, lives, strict=True)
            for to, of in zip(shadow.view(-1).split(elements), live.view(-1).split(elements), strict=True)
        ]

        def run() -> None:
            for shadow, live, cast in blocks:
                shadow.lerp_(cast.copy_(live), 1 - DECAY)

        return Contender(run, lambda: shadows, kept_bytes=buffer.nbytes)

    return build


def _compiled_lerp(model: nn.Module, case: Case) -> Contender:
    lives, shadows = _lives(model), _shadows(model, case)

    @torch.compile
    def lerp(shadow: Tensor, live: Tensor) -> None:
        shadow.lerp_(live.to(case.shadow_dtype), 1 - DECAY)

    def run() -> None:
        for shadow, live in zip(shadows, lives, strict=True):
            lerp(shadow, live)

    return Contender(run, lambda: shadows)


NATIVE = Peer(OURS, _fastema("auto"), backend="auto")
PLAIN = Peer("fastema, torch backend", _fastema("torch"))
MULTI_FN = Peer("AveragedModel, ema multi fn", _averaged_model(multi_avg_fn=get_ema_multi_avg_fn(DECAY)))
AVG_FN = Peer("AveragedModel, ema avg fn", _averaged_model(avg_fn=get_ema_avg_fn(DECAY)))
FOREACH = Peer("torch._foreach_lerp_", _foreach_lerp)
TIMM = Peer("timm ModelEmaV3", _timm)
COPY = Peer("only a copy: torch._foreach_copy_", _copy, from_a_library=False, averages=False)

SAME_DTYPE = (NATIVE, FOREACH, MULTI_FN, AVG_FN, TIMM)

#: All that we know for a float32 average of 16-bit weights. Foreach, lerp_ and AveragedModel alone refuse the mix.
MIXED_DTYPES = (
    NATIVE,
    Peer("foreach lerp_ of .float()", _foreach_lerp_of_casts),
    Peer("lerp_ of .float(), per tensor", _lerp_of_cast),
    Peer("mul_, add_ per tensor", _mul_add),
    Peer("foreach mul_, add_", _foreach_mul_add),
    Peer("foreach copy_ to a kept f32 copy, lerp_", _foreach_lerp_of_kept_copy, from_a_library=False),
    Peer("copy_, lerp_ in blocks of 64 K", _lerp_in_blocks(1 << 16), from_a_library=False),
    Peer("copy_, lerp_ in blocks of 1 M", _lerp_in_blocks(1 << 20), from_a_library=False),
    MULTI_FN,
    AVG_FN,
    TIMM,
)

#: Compiles for half a minute, so it is in full runs only.
COMPILED = Peer("torch.compile of lerp_", _compiled_lerp, backend="inductor", from_a_library=False)


def check_update(peer: Peer, case: Case, device: torch.device) -> None:
    """Three updates on a small model of the case's dtypes, against float64.

    Raises:
        Unavailable: it is missing, raises, or computes another average.
    """
    small = case.with_shapes([(3, 5), (17,), (1,), (64, 65), (1024,)])
    model = build_model(small, device)
    expected = [live.double() for live in _lives(model)]
    contender = built(peer, model, small)
    for step in range(1, 4):
        nudge(model, 1 + step / 4)
        _attempt(contender.run)
        expected = [
            torch.lerp(old, live.double(), 1 - DECAY) for old, live in zip(expected, _lives(model), strict=True)
        ]
    for average, wanted in zip(contender.averages(), expected, strict=True):
        if average.dtype != case.shadow_dtype:
            raise Unavailable(f"keeps the average in {average.dtype}")
        error = (average.double() - wanted).abs().max().item()
        if not error <= TOLERANCE:
            raise Unavailable(f"computes another average, off by {error:.1e}")


def built(peer: Peer, model: nn.Module, case: Case) -> Contender:
    """The contender after its first update, which is special for some (AveragedModel copies, plans are built).

    Raises:
        Unavailable: it is missing or raises.
    """
    contender = _attempt(lambda: peer.build(model, case))
    _attempt(contender.run)
    return contender


def _attempt(call: Callable[[], Result]) -> Result:
    try:
        return call()
    except Unavailable:
        raise
    except Exception as error:  # a peer's failure is a result, whatever it raises
        raise Unavailable(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


@torch.no_grad()
def nudge(model: nn.Module, factor: float = 0.5) -> None:
    """Moves the weights off their averages, so that an update has something to do."""
    for parameter in model.parameters():
        parameter.mul_(factor)


# ---- validation ----


def _fastema_swap(model: nn.Module, averages: Sequence[Tensor]) -> Swapper:
    ema = FastEMA(model, decay=DECAY)
    with ema.swapped(), torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), list(averages))
    return Swapper(ema.apply_shadow, ema.restore)


@dataclass
class _Stored:
    """What the peers' users call store(), copy_to() and restore()."""

    lives: list[Tensor]
    averages: list[Tensor]
    stored: list[Tensor] = field(default_factory=list)

    def clone_and_copy(self) -> None:
        self.stored = [live.clone() for live in self.lives]
        for live, average in zip(self.lives, self.averages, strict=True):
            live.copy_(average)

    def copy_back(self) -> None:
        for live, stored in zip(self.lives, self.stored, strict=True):
            live.copy_(stored)
        self.stored = []

    def foreach_clone_and_copy(self) -> None:
        self.stored = [live.clone() for live in self.lives]
        torch._foreach_copy_(self.lives, self.averages)

    def foreach_copy_back(self) -> None:
        torch._foreach_copy_(self.lives, self.stored)
        self.stored = []

    def keep_and_copy(self) -> None:
        torch._foreach_copy_(self.stored, self.lives)
        torch._foreach_copy_(self.lives, self.averages)

    def copy_kept_back(self) -> None:
        torch._foreach_copy_(self.lives, self.stored)


def _clone_copy_copy(model: nn.Module, averages: Sequence[Tensor]) -> Swapper:
    stored = _Stored(_lives(model), list(averages))
    return Swapper(stored.clone_and_copy, stored.copy_back)


def _foreach_clone_copy_copy(model: nn.Module, averages: Sequence[Tensor]) -> Swapper:
    stored = _Stored(_lives(model), list(averages))
    return Swapper(stored.foreach_clone_and_copy, stored.foreach_copy_back)


def _kept_copy_copy(model: nn.Module, averages: Sequence[Tensor]) -> Swapper:
    stored = _Stored(_lives(model), list(averages), [torch.empty_like(average) for average in averages])
    return Swapper(stored.keep_and_copy, stored.copy_kept_back, kept_bytes=sum(kept.nbytes for kept in stored.stored))


SWAPS = (
    SwapPeer(OURS, _fastema_swap, backend="auto"),
    SwapPeer("clone, copy_, copy_ per tensor", _clone_copy_copy),
    SwapPeer("clone, foreach copy_, foreach copy_", _foreach_clone_copy_copy),
    SwapPeer("3 foreach copy_ through kept memory", _kept_copy_copy),
)


def built_swap(peer: SwapPeer, model: nn.Module, averages: Sequence[Tensor]) -> Swapper:
    """Ready to run.

    Raises:
        Unavailable: it raises.
    """
    return _attempt(lambda: peer.build(model, averages))


def check_swap(peer: SwapPeer, case: Case, device: torch.device) -> None:
    """The averages are in the model after `enter`, and every live bit is back after `leave`.

    Raises:
        Unavailable: not so.
    """
    model = build_model(case.with_shapes([(3, 5), (17,), (1,), (64, 65)]), device)
    lives = [live.clone() for live in _lives(model)]
    averages = [live * 0.5 for live in lives]
    swapper = built_swap(peer, model, averages)
    for _ in range(2):
        swapper.enter()
        entered = all(torch.equal(now, average) for now, average in zip(_lives(model), averages, strict=True))
        swapper.leave()
        left = all(torch.equal(now, live) for now, live in zip(_lives(model), lives, strict=True))
        if not (entered and left):
            raise Unavailable("does not exchange the weights exactly")

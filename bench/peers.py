"""Who is measured: fastema, and what a careful user of plain torch could write; other packages are in `libraries`.

Every one is first checked to compute the same average on a small model (`check_update`), and to exchange the weights
and put them back (`check_swap`). One that is missing or cannot do a case says so in its place in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from bench.cases import Case, Unavailable, build_model
from bench.clocks import captured
from fastema import FastEMA

#: Of the float32 averages from one computed in float64, for values around 1.
TOLERANCE = 2e-6
_MOST_LIMIT_ELEMENTS = 64_000_000

Result = TypeVar("Result")


@dataclass
class Contender:
    """An implementation on one model, ready to run.

    Args:
        run: one update.
        averages: the averaged parameters, in the model's order.
        enter, leave: put the averages into the model for a validation, and take them out again; None: no such thing.
        second_module: the copy of the model that is validated instead.
        backend: whose kernels it runs, where that is settled only when it is built.
        model: kept here, because some peers do not.
    """

    run: Callable[[], object]
    averages: Callable[[], Sequence[Tensor]]
    enter: Callable[[], object] | None = None
    leave: Callable[[], object] | None = None
    second_module: nn.Module | None = None
    backend: str | None = None
    model: nn.Module | None = None

    def swap(self) -> None:
        """In and out again."""
        assert self.enter is not None and self.leave is not None
        self.enter()
        self.leave()


Build = Callable[[nn.Module, Case], Contender]


@dataclass(frozen=True)
class Peer:
    """An implementation to build.

    Args:
        name: as the table shows it.
        build: from a model and its case; may raise `Unavailable`.
        from_a_library: False for what nobody ships, but a careful user could write.
        averages: False for a plain copy, which is there to compare with.
        copies: of the shadow, in memory, that it needs at once.
    """

    name: str
    build: Build
    from_a_library: bool = True
    averages: bool = True
    copies: int = 1

    def floor(self, case: Case) -> int:
        """Bytes that must be read and written."""
        if self is LIMIT:
            return 2 * case.shadow_dtype.itemsize * min(case.params, _MOST_LIMIT_ELEMENTS)
        return case.update_bytes if self.averages else case.live_bytes + case.shadow_bytes


def lives_of(model: nn.Module) -> list[Tensor]:
    """The parameters, without their history."""
    return [parameter.detach() for parameter in model.parameters()]


def shadows_of(model: nn.Module, case: Case) -> list[Tensor]:
    """Copies of them, in the shadow's dtype."""
    return [parameter.detach().to(case.shadow_dtype, copy=True) for parameter in model.parameters()]


# ---- fastema ----


def _fastema(backend: str, in_place: bool = False) -> Build:
    def build(model: nn.Module, case: Case) -> Contender:
        try:
            ema = FastEMA(model, decay=case.decay, decay_type="constant", dtype=case.shadow_dtype, backend=backend)
        except ValueError as error:  # the backend is not built here
            raise Unavailable(str(error)) from None
        return Contender(
            run=ema.update,
            averages=lambda: list(ema.shadow_state_dict().values()),
            enter=lambda: ema.apply_shadow(in_place=in_place),
            leave=ema.restore,
            backend=ema.backend_name,
        )

    return build


def _fastema_graph(model: nn.Module, case: Case) -> Contender:
    ema = FastEMA(model, decay=case.decay, decay_type="constant", dtype=case.shadow_dtype, capturable=True)
    return Contender(_graph(ema.update), lambda: list(ema.shadow_state_dict().values()), backend=ema.backend_name)


def _graph(call: Callable[[], object]) -> Callable[[], object]:
    if not torch.cuda.is_available():
        raise Unavailable("a CUDA graph needs a CUDA device")
    return captured(call)


def _swa_utils(model: nn.Module, case: Case) -> Contender:
    from fastema import swa_utils

    return _of_averaged_model(
        swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(case.decay)), model, case
    )


# ---- torch ----


def _averaged_model_multi(model: nn.Module, case: Case) -> Contender:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(case.decay))
    return _of_averaged_model(averaged, model, case)


def _averaged_model_single(model: nn.Module, case: Case) -> Contender:
    return _of_averaged_model(AveragedModel(model, avg_fn=get_ema_avg_fn(case.decay)), model, case)


def _of_averaged_model(averaged: AveragedModel, model: nn.Module, case: Case) -> Contender:
    if case.shadow_dtype != case.live_dtype:
        averaged.module.to(case.shadow_dtype)
    return Contender(
        lambda: averaged.update_parameters(model),
        lambda: lives_of(averaged.module),
        second_module=averaged.module,
    )


def _limit(model: nn.Module, case: Case) -> Contender:
    device = next(model.parameters()).device
    source = torch.ones(min(case.params, _MOST_LIMIT_ELEMENTS), dtype=case.shadow_dtype, device=device)
    target = torch.zeros_like(source)
    return Contender(lambda: target.copy_(source), lambda: [target])


def _copy(model: nn.Module, case: Case) -> Contender:
    lives, shadows = lives_of(model), shadows_of(model, case)
    return Contender(lambda: torch._foreach_copy_(shadows, lives), lambda: shadows)


def _foreach_lerp(model: nn.Module, case: Case) -> Contender:
    # Bare: the lists are made once, which no library but the leanest does.
    lives, shadows = lives_of(model), shadows_of(model, case)
    return Contender(lambda: torch._foreach_lerp_(shadows, lives, 1 - case.decay), lambda: shadows)


def _foreach_lerp_graph(model: nn.Module, case: Case) -> Contender:
    plain = _foreach_lerp(model, case)
    return Contender(_graph(plain.run), plain.averages)


def _foreach_lerp_of_casts(model: nn.Module, case: Case) -> Contender:
    lives, shadows = lives_of(model), shadows_of(model, case)

    def run() -> None:
        torch._foreach_lerp_(shadows, [live.to(case.shadow_dtype) for live in lives], 1 - case.decay)

    return Contender(run, lambda: shadows)


def _lerp_of_cast(model: nn.Module, case: Case) -> Contender:
    lives, shadows = lives_of(model), shadows_of(model, case)

    def run() -> None:
        for shadow, live in zip(shadows, lives, strict=True):
            shadow.lerp_(live.to(case.shadow_dtype), 1 - case.decay)

    return Contender(run, lambda: shadows)


def _mul_add(model: nn.Module, case: Case) -> Contender:
    lives, shadows = lives_of(model), shadows_of(model, case)

    def run() -> None:
        for shadow, live in zip(shadows, lives, strict=True):
            shadow.mul_(case.decay).add_(live, alpha=1 - case.decay)

    return Contender(run, lambda: shadows)


def _foreach_mul_add(model: nn.Module, case: Case) -> Contender:
    lives, shadows = lives_of(model), shadows_of(model, case)

    def run() -> None:
        torch._foreach_mul_(shadows, case.decay)
        torch._foreach_add_(shadows, lives, alpha=1 - case.decay)

    return Contender(run, lambda: shadows)


def _foreach_lerp_of_kept_copy(model: nn.Module, case: Case) -> Contender:
    # A third copy of the model, but no allocation in the step.
    lives, shadows = lives_of(model), shadows_of(model, case)
    kept = [torch.empty_like(shadow) for shadow in shadows]

    def run() -> None:
        torch._foreach_copy_(kept, lives)
        torch._foreach_lerp_(shadows, kept, 1 - case.decay)

    return Contender(run, lambda: shadows)


def _lerp_in_blocks(elements: int) -> Build:
    # The cast stays in the cache if it goes through one small buffer: the best that plain torch can do, as far as we
    # know. The views are made once.
    def build(model: nn.Module, case: Case) -> Contender:
        lives, shadows = lives_of(model), shadows_of(model, case)
        buffer = torch.empty(elements, dtype=case.shadow_dtype, device=shadows[0].device)
        blocks = [
            (to, of, buffer[: to.numel()])
            for shadow, live in zip(shadows, lives, strict=True)
            for to, of in zip(shadow.view(-1).split(elements), live.view(-1).split(elements), strict=True)
        ]

        def run() -> None:
            for shadow, live, cast in blocks:
                shadow.lerp_(cast.copy_(live), 1 - case.decay)

        return Contender(run, lambda: shadows)

    return build


def _compiled_lerp(model: nn.Module, case: Case) -> Contender:
    lives, shadows = lives_of(model), shadows_of(model, case)

    @torch.compile
    def lerp(shadow: Tensor, live: Tensor) -> None:
        shadow.lerp_(live.to(case.shadow_dtype), 1 - case.decay)

    def run() -> None:
        for shadow, live in zip(shadows, lives, strict=True):
            lerp(shadow, live)

    return Contender(run, lambda: shadows, backend="inductor")


OURS = Peer("fastema", _fastema("auto"))
OURS_IN_PLACE = Peer("fastema, in place", _fastema("auto", in_place=True))
OURS_TORCH = Peer("fastema, torch backend", _fastema("torch"))
OURS_TRITON = Peer("fastema, triton backend", _fastema("triton"))
OURS_SWA_UTILS = Peer("fastema.swa_utils AveragedModel", _swa_utils)
OURS_GRAPH = Peer("fastema, graph replay", _fastema_graph)
LIMIT = Peer("torch copy_, one tensor", _limit, from_a_library=False, averages=False)
COPY = Peer("torch._foreach_copy_", _copy, from_a_library=False, averages=False)
FOREACH = Peer("torch._foreach_lerp_", _foreach_lerp)
FOREACH_GRAPH = Peer("torch._foreach_lerp_, graph replay", _foreach_lerp_graph, from_a_library=False)
MULTI_FN = Peer("AveragedModel, ema multi fn", _averaged_model_multi)
AVG_FN = Peer("AveragedModel, ema avg fn", _averaged_model_single)

#: What plain torch can do for a float32 average of 16-bit weights; foreach, lerp_ and AveragedModel refuse the mix.
CASTS = (
    Peer("foreach lerp_ of .float()", _foreach_lerp_of_casts, copies=2),
    Peer("lerp_ of .float(), per tensor", _lerp_of_cast),
    Peer("mul_, add_ per tensor", _mul_add),
    Peer("foreach mul_, add_", _foreach_mul_add),
    Peer("foreach copy_ to a kept f32 copy, lerp_", _foreach_lerp_of_kept_copy, from_a_library=False, copies=2),
    Peer("copy_, lerp_ in blocks of 64 K", _lerp_in_blocks(1 << 16), from_a_library=False),
    Peer("copy_, lerp_ in blocks of 1 M", _lerp_in_blocks(1 << 20), from_a_library=False),
)
#: Compiles for half a minute, so it is in full runs only.
COMPILED = Peer("torch.compile of lerp_", _compiled_lerp, from_a_library=False)


# ---- checks ----


def check_update(peer: Peer, case: Case, device: torch.device) -> None:
    """Three updates on a small model of the case's dtypes, against float64.

    Raises:
        Unavailable: it is missing, raises, or computes another average.
    """
    small = case.with_shapes([(3, 5), (17,), (1,), (64, 65), (1024,)])
    model = build_model(small, device)
    expected = [live.double() for live in lives_of(model)]
    contender = built(peer, model, small)
    half = case.shadow_dtype.itemsize == 2  # such an average rounds at every step
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


def check_swap(peer: Peer, case: Case, device: torch.device) -> None:
    """The averages are in the model after `enter`, and every live bit is back after `leave`.

    Raises:
        Unavailable: not so, or it has a second module instead.
    """
    small = case.with_shapes([(3, 5), (17,), (1,), (64, 65)])
    model = build_model(small, device)
    contender = built(peer, model, small)
    if contender.enter is None or contender.leave is None:
        raise Unavailable("has a second module" if contender.second_module is not None else "exchanges nothing")
    nudge(model)
    attempt(contender.run)
    lives = [live.clone() for live in lives_of(model)]
    averages = [average.to(case.live_dtype, copy=True) for average in contender.averages()]
    for _ in range(2):
        attempt(contender.enter)
        entered = all(torch.equal(now, average) for now, average in zip(lives_of(model), averages, strict=True))
        attempt(contender.leave)
        left = all(torch.equal(now, live) for now, live in zip(lives_of(model), lives, strict=True))
        if not (entered and left):
            raise Unavailable("does not exchange the weights exactly")


def built(peer: Peer, model: nn.Module, case: Case) -> Contender:
    """The contender after its first update, which is special for some (AveragedModel copies, plans are built).

    Raises:
        Unavailable: it is missing or raises.
    """
    contender = attempt(lambda: peer.build(model, case))
    contender.model = model
    attempt(contender.run)
    return contender


def attempt(call: Callable[[], Result]) -> Result:
    """What the call returns.

    Raises:
        Unavailable: it raised; with its words.
    """
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

"""Ours, and what a careful user of plain torch could write; other packages are in `libraries`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from bench.harness.cases import Case, Unavailable
from bench.harness.contender import Build, Contender, Peer, lives_of, shadows_of
from bench.harness.meters import captured
from fastema import FastEMA

# ---- rows of tables that are no peer ----

TOGETHER, APART = "fastema, in one read", "fastema, one after the other"
STEP = "the training step itself"
BASE_TWICE = "the base weights twice, no average"


# ---- fastema ----


def _fastema(backend: str, in_place: bool = False) -> Build:
    def build(model: nn.Module, case: Case) -> Contender:
        try:
            ema = FastEMA(model, decay=case.decay, decay_type="constant", dtype=case.shadow_dtype, backend=backend)
        except ValueError as error:  # this backend is not built here
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


def _foreach_lerp(model: nn.Module, case: Case) -> Contender:
    # The lists are made once; most libraries make them at every update.
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
    # Another copy of the model, but no allocation in the step.
    lives, shadows = lives_of(model), shadows_of(model, case)
    kept = [torch.empty_like(shadow) for shadow in shadows]

    def run() -> None:
        torch._foreach_copy_(kept, lives)
        torch._foreach_lerp_(shadows, kept, 1 - case.decay)

    return Contender(run, lambda: shadows)


def _lerp_in_blocks(elements: int) -> Build:
    # The cast goes through one small buffer, which stays in the cache: the best in plain torch that we know of. The
    # views are made once.
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
FOREACH = Peer("torch._foreach_lerp_", _foreach_lerp)
FOREACH_GRAPH = Peer("torch._foreach_lerp_, graph replay", _foreach_lerp_graph)
MULTI_FN = Peer("AveragedModel, ema multi fn", _averaged_model_multi)
AVG_FN = Peer("AveragedModel, ema avg fn", _averaged_model_single)

#: Plain torch for a float32 average of 16-bit weights; foreach, lerp_ and AveragedModel refuse mixed dtypes.
CASTS = (
    Peer("foreach lerp_ of .float()", _foreach_lerp_of_casts, copies=2),
    Peer("lerp_ of .float(), per tensor", _lerp_of_cast),
    Peer("mul_, add_ per tensor", _mul_add),
    Peer("foreach mul_, add_", _foreach_mul_add),
    Peer("foreach copy_ to a kept f32 copy, lerp_", _foreach_lerp_of_kept_copy, copies=2),
    Peer("copy_, lerp_ in blocks of 64 K", _lerp_in_blocks(1 << 16)),
    Peer("copy_, lerp_ in blocks of 1 M", _lerp_in_blocks(1 << 20)),
)
#: In full runs only, because it compiles for half a minute.
COMPILED = Peer("torch.compile of lerp_", _compiled_lerp)


# ---- swaps by hand ----


def _by_hand(swapper: Callable[[list[Tensor], list[Tensor]], tuple[Callable[[], None], Callable[[], None]]]) -> Build:
    """Return a peer that updates with `_foreach_lerp_` and swaps as given."""

    def build(model: nn.Module, case: Case) -> Contender:
        contender = FOREACH.build(model, case)
        contender.enter, contender.leave = swapper(lives_of(model), list(contender.averages()))
        return contender

    return build


def _clone_and_copy(lives: list[Tensor], averages: list[Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    stored: list[Tensor] = []

    def enter() -> None:
        stored[:] = [live.clone() for live in lives]
        torch._foreach_copy_(lives, averages)

    def leave() -> None:
        torch._foreach_copy_(lives, stored)
        stored.clear()

    return enter, leave


def _copy_through_kept(lives: list[Tensor], averages: list[Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    kept = [torch.empty_like(live) for live in lives]

    def enter() -> None:
        torch._foreach_copy_(kept, lives)
        torch._foreach_copy_(lives, averages)

    def leave() -> None:
        torch._foreach_copy_(lives, kept)

    return enter, leave


def _exchange_data(model: nn.Module, case: Case) -> Contender:
    # Moves no byte either; but views and aliases (tied weights, RNNs' flat weights, FSDP's second view of a shard) stay
    # with the old memory and are silently wrong.
    contender = FOREACH.build(model, case)
    parameters, averages = list(model.parameters()), list(contender.averages())

    def exchange() -> None:
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.data, average.data = average.data, parameter.data

    contender.enter = contender.leave = exchange
    return contender


SWAPS_BY_HAND = (
    Peer("clone, foreach copy_, foreach copy_", _by_hand(_clone_and_copy)),
    Peer("3 foreach copy_ through kept memory", _by_hand(_copy_through_kept), copies=2),
    Peer("exchange of .data per tensor", _exchange_data),
)

"""`python -m bench.integrations [--json FILE] [--seconds N] [--threads N]`

What an update costs in the frameworks that people use, and with fastema in its place: each is called as its users call
it, or as its trainer does, on the same models in the same run, and first checked to compute the same average. The
method is that of `bench.measure`. What is not installed is named.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench import cases, peers
from bench.cases import Case, Unavailable
from bench.measure import Budget, clock_for, environment
from bench.peers import DECAY, Contender, Peer
from bench.session import Group, Session, add_common_arguments, apply_common_arguments
from bench.table import duration, number, print_table
from bench.update import measure_copy, measure_update, print_environment, to_json

_Build = Callable[[nn.Module, Case], Contender]


def _lives(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


def _import(build: Callable[[nn.Module], Contender]) -> _Build:
    """`build`, which imports a package; where that is missing, the table says so."""

    def built(model: nn.Module, case: Case) -> Contender:
        try:
            _make_torchvision_work()
            return build(model)
        except ImportError as error:
            raise Unavailable(f"not installed ({error})") from None

    return built


def _make_torchvision_work() -> None:
    """Transformers and torchmetrics import it where it is installed, and next to a CPU-only torch it does not load."""
    try:
        from fastema.segmentation.torchvision_shim import import_torchvision

        import_torchvision()
    except ImportError:
        pass  # not installed: then nobody imports it


# ---- torch ----


def _swa_utils(model: nn.Module) -> Contender:
    from fastema.swa_utils import AveragedModel, get_ema_multi_avg_fn

    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return Contender(lambda: averaged.update_parameters(model), lambda: _lives(averaged.module))


# ---- timm ----


def _timm(model: nn.Module) -> Contender:
    from fastema.integrations.timm import ModelEmaV3

    ema = ModelEmaV3(model, decay=DECAY)
    return Contender(lambda: ema.update(model), lambda: _lives(ema.module))


# ---- diffusers ----


def _diffusers(ours: bool, foreach: bool = False) -> Callable[[nn.Module], Contender]:
    def build(model: nn.Module) -> Contender:
        kind: Any
        if ours:
            from fastema.integrations.diffusers import EMAModel as kind
        else:
            from diffusers.training_utils import EMAModel as kind
        ema = kind(model.parameters(), decay=DECAY, foreach=foreach)
        ema.optimization_step = 10**6  # past its warm-up, whose first step is a copy
        return Contender(lambda: ema.step(model.parameters()), lambda: list(ema.shadow_params))

    return build


# ---- Lightning ----


def _lightning_module(model: nn.Module) -> Any:
    from lightning.pytorch import LightningModule

    module: Any = LightningModule()
    module.net = model
    return module


def _weight_averaging(model: nn.Module) -> Contender:
    """Lightning's own callback, through the hook that its Trainer calls after each batch."""
    module = _lightning_module(model)
    from lightning.pytorch.callbacks import EMAWeightAveraging

    callback = EMAWeightAveraging(decay=DECAY)
    trainer: Any = SimpleNamespace(global_step=0)
    callback.setup(trainer, module, "fit")

    def run() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    averaged: Any = callback._average_model
    return Contender(run, lambda: _lives(averaged.module))


def _fastema_callback(model: nn.Module) -> Contender:
    """Ours, through what it hung on the optimizer's step; the hooks that have nothing to do are called as well."""
    module = _lightning_module(model)
    from fastema.integrations.lightning import FastEMACallback

    callback = FastEMACallback(decay=DECAY)
    optimizer = torch.optim.SGD(module.parameters())
    trainer: Any = SimpleNamespace(optimizers=[optimizer], global_step=0, current_epoch=0)
    callback.on_train_start(trainer, module)
    callback.on_train_batch_start(trainer, module, None, 0)

    def run() -> None:
        callback.on_train_batch_start(trainer, module, None, 0)
        for hook in list(optimizer._optimizer_step_post_hooks.values()):
            hook(optimizer, (), {})
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return Contender(run, lambda: list(callback.ema_state_dict().values()))


# ---- the table ----

_DIFFUSERS = Peer("diffusers EMAModel", _import(_diffusers(ours=False)))
_DIFFUSERS_FOREACH = Peer("diffusers EMAModel, foreach", _import(_diffusers(ours=False, foreach=True)))
_LIGHTNING = Peer("Lightning EMAWeightAveraging", _import(_weight_averaging))
_OUR_SWA_UTILS = Peer("fastema.swa_utils AveragedModel", _import(_swa_utils), backend="auto")
_OUR_TIMM = Peer("fastema ModelEmaV3", _import(_timm), backend="auto")
_OUR_DIFFUSERS = Peer("fastema EMAModel", _import(_diffusers(ours=True)), backend="auto")
_OUR_LIGHTNING = Peer("fastema FastEMACallback", _import(_fastema_callback), backend="auto")

#: (original, what stands in its place)
PAIRS = (
    (peers.MULTI_FN, _OUR_SWA_UTILS),
    (peers.TIMM, _OUR_TIMM),
    (_DIFFUSERS, _OUR_DIFFUSERS),
    (_DIFFUSERS_FOREACH, _OUR_DIFFUSERS),
    (_LIGHTNING, _OUR_LIGHTNING),
)
EVERYBODY = (peers.NATIVE, *dict.fromkeys(itertools.chain.from_iterable(PAIRS)))


def plan(seconds: float = 1.0) -> list[Group]:
    """The tables: a net in few large tensors, and one in many small ones."""
    notes = {
        cases.resnet50: "Parameters only: buffers are averaged by some, copied by others and left alone by others.",
        cases.small_tensors: "Next to nothing to move: what remains is the way through the model and its tensors.",
    }
    return [Group("update", make, EVERYBODY, "cold", Budget(8 * seconds), note) for make, note in notes.items()]


def run(groups: Sequence[Group], copy_elements: int = 64_000_000, copy_budget: Budget = Budget(1.5)) -> Session:  # noqa: B008  # frozen
    """Measures and prints, table by table, then the pairs."""
    device = torch.device("cpu")
    session = Session(device, clock_for(device))
    measure_copy(session, copy_elements, copy_budget)
    for group in groups:
        measure_update(session, group)
    print_pairs(session)
    return session


def print_pairs(session: Session) -> None:
    """What changes for whoever changes one import."""
    medians = {(record.case, record.impl): record.median_us for record in session.records}
    rows = []
    for case in dict.fromkeys(record.case for record in session.records if record.bench == "update"):
        for original, ours in PAIRS:
            before, after = medians.get((case, original.name)), medians.get((case, ours.name))
            rows.append(
                [
                    original.name,
                    ours.name,
                    case,
                    "" if before is None else duration(before),
                    "" if after is None else duration(after),
                    "" if before is None or after is None else f"{number(before / after)} x",
                ]
            )
    columns = ["before", "after", "model", "before", "after", "faster"]
    print_table("an update, before and after: medians of the tables above", columns, rows, left=3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.integrations", description="What an update costs in the frameworks people use."
    )
    add_common_arguments(parser)
    parsed = parser.parse_args(arguments)
    apply_common_arguments(parser, parsed)
    found = environment(torch.device("cpu"))
    print_environment(found)
    session = run(plan(parsed.seconds), copy_budget=Budget(1.5 * parsed.seconds))
    if parsed.json is not None:
        parsed.json.write_text(to_json(session, found, []))
        print(f"written: {parsed.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Averages of other packages, called as their users or trainers call them, and fastema's replacements of them.

A package is imported when its peer is built; tables name the packages that are not installed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bench.contenders.peers import AVG_FN, MULTI_FN, OURS_SWA_UTILS
from bench.harness.cases import Case, Unavailable, import_timm, make_torchvision_work
from bench.harness.contender import Build, Contender, Peer, lives_of

_LONG_AGO = 10**9  # step at which every schedule has reached its last decay
_ultralytics_settings: tempfile.TemporaryDirectory[str] | None = None


def _if_installed(build: Build) -> Build:
    def built(model: nn.Module, case: Case) -> Contender:
        make_torchvision_work()
        try:
            return build(model, case)
        except ImportError as error:
            raise Unavailable(f"not installed ({error})") from None

    return built


def _mixes(case: Case) -> bool:
    return case.shadow_dtype != case.live_dtype


# ---- timm ----


def _timm(ours: bool) -> Build:
    def build(model: nn.Module, case: Case) -> Contender:
        kind: Any
        if ours:
            from fastema.integrations.timm import ModelEmaV3 as kind
        else:
            kind = import_timm().utils.ModelEmaV3
        ema = kind(model, decay=case.decay, **({"dtype": case.shadow_dtype} if _mixes(case) and not ours else {}))
        return Contender(lambda: ema.update(model), lambda: lives_of(ema.module), second_module=ema.module)

    return build


# ---- ema-pytorch ----


def _ema_pytorch(foreach: bool) -> Build:
    def build(model: nn.Module, case: Case) -> Contender:
        from ema_pytorch import EMA

        # min_value: this decay from the first step on; update_every is 10 by default, here every call updates.
        more = {"update_after_step": 0, "update_every": 1, "min_value": case.decay, "include_online_model": False}
        ema = EMA(model, beta=case.decay, use_foreach=foreach, coerce_dtype=_mixes(case), **more)
        if _mixes(case):
            ema.ema_model.to(case.shadow_dtype)
        return Contender(ema.update, lambda: lives_of(ema.ema_model), second_module=ema.ema_model)

    return build


# ---- torch-ema ----


def _torch_ema(model: nn.Module, case: Case) -> Contender:
    from torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(model.parameters(), decay=case.decay, use_num_updates=False)
    if _mixes(case):
        ema.to(dtype=case.shadow_dtype)

    def enter() -> None:
        ema.store()
        ema.copy_to()

    def leave() -> None:
        ema.restore()
        ema.collected_params = None  # else the next store() would hold two copies at once

    return Contender(ema.update, lambda: list(ema.shadow_params), enter, leave)


# ---- diffusers ----


def _diffusers(ours: bool = False, foreach: bool = False) -> Build:
    def build(model: nn.Module, case: Case) -> Contender:
        kind: Any
        if ours:
            from fastema.integrations.diffusers import EMAModel as kind
        else:
            from diffusers.training_utils import EMAModel as kind
        ema = kind(model.parameters(), decay=case.decay, foreach=foreach)
        if _mixes(case):
            ema.to(dtype=case.shadow_dtype)
        ema.optimization_step = _LONG_AGO  # past its warm-up, whose first step is a copy

        def enter() -> None:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())

        def leave() -> None:
            ema.restore(model.parameters())

        return Contender(lambda: ema.step(model.parameters()), lambda: list(ema.shadow_params), enter, leave)

    return build


# ---- Lightning ----


def _lightning_module(model: nn.Module) -> Any:
    from lightning.pytorch import LightningModule

    module: Any = LightningModule()
    module.net = model
    return module


def _weight_averaging(model: nn.Module, case: Case) -> Contender:
    """Return Lightning's callback, called through the hooks of its Trainer."""
    module = _lightning_module(model)
    from lightning.pytorch.callbacks import EMAWeightAveraging

    callback = EMAWeightAveraging(decay=case.decay)
    trainer: Any = SimpleNamespace(global_step=0)
    callback.setup(trainer, module, "fit")
    averaged: Any = callback._average_model

    def run() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return Contender(
        run,
        lambda: lives_of(averaged.module),
        enter=lambda: callback.on_validation_epoch_start(trainer, module),
        leave=lambda: callback.on_validation_epoch_end(trainer, module),
    )


def _fastema_callback(model: nn.Module, case: Case) -> Contender:
    """Return our callback, called through the hooks of the Trainer and of the optimizer."""
    module = _lightning_module(model)
    from fastema.integrations.lightning import FastEMACallback

    callback = FastEMACallback(decay=case.decay, decay_type="constant")
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


# ---- ultralytics ----


def _ultralytics(model: nn.Module, case: Case) -> Contender:
    _keep_ultralytics_quiet()
    with _process_as_it_was():
        from ultralytics.utils.torch_utils import ModelEMA

    ema = ModelEMA(model, decay=case.decay, updates=_LONG_AGO)
    if _mixes(case):
        ema.ema.to(case.shadow_dtype)
    return Contender(lambda: ema.update(model), lambda: lives_of(ema.ema), second_module=ema.ema)


@contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Undo what an import patches: torch.save, PIL's Image.open, the environment."""
    environment, save = dict(os.environ), torch.save
    try:
        from PIL import Image
    except ImportError:
        Image = None  # type: ignore[assignment]
    open_image = Image.open if Image is not None else None
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.save = save
        torch.set_printoptions(profile="default")
        if Image is not None and open_image is not None:
            Image.open = open_image


def _keep_ultralytics_quiet() -> None:
    """Keep its import from asking the network and from writing settings into the user's home."""
    global _ultralytics_settings
    if "YOLO_CONFIG_DIR" not in os.environ:
        _ultralytics_settings = tempfile.TemporaryDirectory()
        os.environ["YOLO_CONFIG_DIR"] = _ultralytics_settings.name
    for name, value in {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "YOLO_AUTOINSTALL": "false"}.items():
        os.environ.setdefault(name, value)


# ---- the peers ----

TIMM = Peer("timm ModelEmaV3", _if_installed(_timm(ours=False)))
EMA_PYTORCH = Peer("ema-pytorch", _if_installed(_ema_pytorch(foreach=False)))
EMA_PYTORCH_FOREACH = Peer("ema-pytorch, foreach", _if_installed(_ema_pytorch(foreach=True)), copies=2)
TORCH_EMA = Peer("torch-ema", _if_installed(_torch_ema))
DIFFUSERS = Peer("diffusers EMAModel", _if_installed(_diffusers()))
DIFFUSERS_FOREACH = Peer("diffusers EMAModel, foreach", _if_installed(_diffusers(foreach=True)), copies=2)
LIGHTNING = Peer("Lightning EMAWeightAveraging", _if_installed(_weight_averaging))
ULTRALYTICS = Peer("ultralytics ModelEMA", _if_installed(_ultralytics))

OUR_TIMM = Peer("fastema ModelEmaV3", _if_installed(_timm(ours=True)))
OUR_DIFFUSERS = Peer("fastema EMAModel", _if_installed(_diffusers(ours=True)))
OUR_LIGHTNING = Peer("fastema FastEMACallback", _if_installed(_fastema_callback))

#: Every package's averages, torch's first.
LIBRARIES = (
    *(MULTI_FN, AVG_FN, TIMM, ULTRALYTICS, EMA_PYTORCH, EMA_PYTORCH_FOREACH),
    *(TORCH_EMA, DIFFUSERS, DIFFUSERS_FOREACH, LIGHTNING),
)
#: For a quick run: those that import within two seconds.
QUICK_LIBRARIES = (MULTI_FN, AVG_FN, TIMM, TORCH_EMA)

#: (original, its replacement after one changed import)
REPLACEMENTS: tuple[tuple[Peer, Peer], ...] = (
    (MULTI_FN, OURS_SWA_UTILS),
    (TIMM, OUR_TIMM),
    (DIFFUSERS, OUR_DIFFUSERS),
    (DIFFUSERS_FOREACH, OUR_DIFFUSERS),
    (LIGHTNING, OUR_LIGHTNING),
)
REPLACING = tuple(dict.fromkeys(ours for _, ours in REPLACEMENTS))

#: Packages that put the averages into the model; all others validate a second module.
SWAPPING = (TORCH_EMA, DIFFUSERS, DIFFUSERS_FOREACH, LIGHTNING)

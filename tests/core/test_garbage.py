"""Circular references to a model and its average are freed: native types show the collector what they hold."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastema import FastEMA
from fastema.integrations.timm import ModelEmaV3
from fastema.swa_utils import AveragedModel

pytestmark = pytest.mark.usefixtures("one_thread")


class Owner:
    """Somebody who has the model and its average, as a trainer has."""


def fast_ema(model: nn.Module) -> Any:
    ema = FastEMA(model)
    ema.update()
    with ema.swapped():
        pass
    with ema.swapped(in_place=True):
        pass
    return ema


def timms(model: nn.Module) -> Any:
    ema = ModelEmaV3(model)
    ema.update(model)
    return ema


def averaged_model(model: nn.Module) -> Any:
    averaged = AveragedModel(model)
    for _ in range(2):
        averaged.update_parameters(model)
    with averaged.swapped(model):
        pass
    return averaged


def module_hook(model: nn.Module, owner: Owner) -> None:
    model.register_forward_hook(lambda *_, owner=owner: None)


def parameter_hook(model: nn.Module, owner: Owner) -> None:
    next(model.parameters()).register_hook(lambda grad, owner=owner: None)


@pytest.mark.parametrize("hook", [None, module_hook, parameter_hook], ids=["no_hook", "module_hook", "parameter_hook"])
@pytest.mark.parametrize("make", [fast_ema, timms, averaged_model])
def test_a_circle_through_model_and_average_is_freed(
    make: Callable[[nn.Module], Any],
    hook: Callable[[nn.Module, Owner], None] | None,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTEMA_BACKEND", backend)
    owner, model = Owner(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    if hook is not None:
        hook(model, owner)
    owner.model, owner.ema = model, make(model)  # type: ignore[attr-defined]
    freed = [weakref.ref(owner), weakref.ref(model), weakref.ref(owner.ema)]  # type: ignore[attr-defined]
    del owner, model
    gc.collect()
    assert [reference() for reference in freed] == [None, None, None]


def test_a_watch_can_be_collected_while_it_is_used_up() -> None:
    native = pytest.importorskip("fastema._C")
    model = nn.Linear(2, 2)
    watch = native.Watch([model._parameters], list(model.parameters()))
    assert gc.is_tracked(watch)
    assert model._parameters in gc.get_referents(watch)
    assert all(any(each is p for each in gc.get_referents(watch)) for p in model.parameters())


def test_conversion_by_swapping_tensors_works(backend: str) -> None:
    """torch.utils.swap_tensors refuses tensors that C++ refers to, or that have weak references."""
    model = nn.Linear(3, 3)
    ema = FastEMA(model, decay=0.5, backend=backend)
    ema.update()
    with ema.swapped():
        pass
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        model.float()
        model.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    ema.update()
    assert ema.num_updates == 2


SILENT = {
    "a FastEMA in a circle": """
import torch
from fastema import FastEMA
class Owner: ...
owner = Owner(); owner.me = owner
owner.ema = FastEMA(torch.nn.Linear(2, 2))
owner.ema.update()
""",
    "import without numpy": """
import sys
sys.modules["numpy"] = None
import fastema
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("code", SILENT.values(), ids=SILENT.keys())
def test_nothing_is_printed_at_import_and_exit(code: str) -> None:
    command = [sys.executable, "-W", "ignore:fastema runs its torch backend", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")

"""After a fit, trainer, module and average are freed, whichever callback averaged and whatever hooks refer to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cases.lightning import Net, loader, trainer
from fastema.integrations.lightning import EMAWeightAveraging, FastEMACallback


class Inner(Net):
    """A LightningModule within another."""


class Outer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()


def module_hook(model: nn.Module, owner: Any) -> None:
    model.register_forward_hook(lambda *_, owner=owner: None)


def parameter_hook(model: nn.Module, owner: Any) -> None:
    next(model.parameters()).register_hook(lambda grad, owner=owner: None)


@pytest.mark.slow
@pytest.mark.parametrize("make", [FastEMACallback, EMAWeightAveraging])
@pytest.mark.parametrize("hook", [None, module_hook, parameter_hook], ids=["no_hook", "module_hook", "parameter_hook"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_nothing_of_a_fit_stays_alive(
    tmp_path: Path,
    make: Callable[[], Any],
    hook: Callable[[nn.Module, Any], None] | None,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTEMA_BACKEND", backend)
    model, callback = Outer(), make()
    fit = trainer(tmp_path, callback, max_epochs=1)
    if hook is not None:
        hook(model, fit)
    fit.fit(model, loader(), loader())
    freed = [weakref.ref(each) for each in (model, fit, callback, model.inner)]
    del model, fit, callback
    gc.collect()
    assert [reference() for reference in freed] == [None] * 4

"""Any accelerator that torch knows, with a module that stands in for the one of its kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastema.errors import UserError
from fastema.segmentation.devices import Precision, accelerator, select_device
from fastema.segmentation.train_extra import missing_packages


@pytest.fixture
def xpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Pretend that there are two XPUs, which know no bfloat16."""
    module = SimpleNamespace(
        is_bf16_supported=lambda: False, get_rng_state_all=lambda: ["a", "b"], set_rng_state_all=lambda states: None
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return module


def test_auto_is_the_accelerator_that_is_there(xpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_device("auto") == torch.device("xpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert select_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert accelerator() is None


def test_bfloat16_is_refused_where_the_accelerator_has_none(xpus: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="xpu:1 has no bfloat16: use --amp fp16, or none"):
        Precision("bf16", torch.device("xpu:1"))


@pytest.mark.skipif(bool(missing_packages()), reason="the train extra is not installed")
def test_the_accelerators_generators_are_saved_under_its_kind(
    xpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastema.segmentation.train.checkpoints import restore_rng, rng_states

    restored: list[Any] = []
    xpus.set_rng_state_all = restored.append
    states = rng_states()
    assert states["xpu"] == ["a", "b"]
    restore_rng(states)
    restore_rng({**states, "xpu": ["a"]})  # of a machine with one of them
    states.pop("xpu")
    restore_rng({**states, "cuda": ["a", "b"]})
    assert restored == [["a", "b"]]

"""The examples in the docstrings run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pathlib
import pkgutil
from types import ModuleType

import pytest
import torch
from torch import nn

import fastema
import fastema.backends

GLOBALS = {
    "torch": torch,
    "nn": nn,
    "FastEMA": fastema.FastEMA,
    "IDecayFunction": fastema.IDecayFunction,
    "EMA_DECAY_FUNCTIONS": fastema.EMA_DECAY_FUNCTIONS,
}


def modules() -> list[ModuleType]:
    """Return the modules of `import fastema` and of the files beside it."""
    found = [fastema]
    for package in (fastema, fastema.backends):
        for info in pkgutil.iter_modules(package.__path__):
            if info.ispkg or info.name.startswith("_"):
                continue
            try:
                found.append(importlib.import_module(f"{package.__name__}.{info.name}"))
            except ImportError:  # an optional part, e.g. without triton
                continue
    return found


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__)
def test_examples(module: ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example may write a file
    torch.manual_seed(0)
    result = doctest.testmod(module, extraglobs=dict(GLOBALS), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed; see above"


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    assert sum(len(test.examples) for test in finder.find(fastema.FastEMA, extraglobs=dict(GLOBALS))) >= 5

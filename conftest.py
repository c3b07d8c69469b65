"""The code of README and docs is tested: every Python block runs, in order, with one namespace a page (Sybil).

A block that names "cuda" is compiled, and runs where there is a GPU. A block of a framework that is not installed is
skipped. Blocks share the names of `new_names()`, which stand for a reader's own model and data. An HTML comment
`invisible-code-block: python` runs what readers need not see.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from typing import Any

import pytest

try:
    from sybil import Example, Sybil
    from sybil.evaluators.python import PythonEvaluator
    from sybil.parsers.markdown import CodeBlockParser
except ModuleNotFoundError:  # the tests of a bare venv (make matrix, make gpu-build) do without
    Sybil = None

OPTIONAL = {
    "accelerate",
    "deepspeed",
    "diffusers",
    "ema_pytorch",
    "lightning",
    "peft",
    "safetensors",
    "timm",
    "torch_ema",
    "transformers",
}


def pytest_sessionstart() -> None:
    """Make torchvision work beside a CPU torch: timm, lightning and transformers import it.

    In every process: the one that collects the workers' warnings imports what they come from.
    """
    with contextlib.suppress(ImportError):
        import fastema.segmentation.torchvision_shim  # noqa: F401


def run(example: Example) -> None:
    """Run a block of Python, or compile it where it needs a GPU that is not there."""
    import torch

    if "cuda" in example.parsed and not torch.cuda.is_available():
        compile(example.parsed, example.path, "exec")
        pytest.skip("compiled, not run: it needs a GPU")
    try:
        PythonEvaluator()(example)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")


def new_names() -> dict[str, Any]:
    """Return what the pages take for granted: a model, an optimizer, data, a loss and a validation."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def validate(model: nn.Module) -> float:
        training = model.training
        model.eval()
        with torch.no_grad():
            total = sum(float(nn.functional.cross_entropy(model(x), y)) for x, y in loader)
        model.train(training)
        return total / len(loader)

    loader = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(4)]
    return {
        "torch": torch,
        "nn": nn,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "loader": loader,
        "loss_fn": nn.functional.cross_entropy,
        "validate": validate,
        "path": "checkpoint.pt",
    }


def enter(namespace: dict[str, Any]) -> None:
    """Give a page its names, and an empty folder to write to."""
    undo = contextlib.ExitStack()
    folder = undo.enter_context(tempfile.TemporaryDirectory())
    undo.callback(os.chdir, os.getcwd())
    os.chdir(folder)
    undo.callback(_restore_environment, dict(os.environ))
    os.environ["HF_HUB_OFFLINE"] = "1"
    namespace.update(new_names(), undo=undo)


def leave(namespace: dict[str, Any]) -> None:
    """Put everything back."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if "accelerate" in sys.modules:  # its Accelerators share a state, in which later tests would find this page's
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    namespace["undo"].close()


def _restore_environment(before: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(before)


if Sybil is not None:
    pytest_collect_file = Sybil(
        parsers=[CodeBlockParser("python", run)],
        patterns=["README.md", "docs/*.md", "docs/*/*.md"],
        setup=enter,
        teardown=leave,
    ).pytest()

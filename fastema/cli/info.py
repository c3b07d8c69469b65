"""`fastema info`: versions, and which backends are usable here."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

HELP = "versions, and which backends are usable here"
DESCRIPTION = "Prints versions, which backends are built and usable, and why one is not."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: there are no flags."""


def run(_: argparse.Namespace) -> None:
    """Print the table."""
    import torch

    import fastema
    from fastema import backends

    versions = {
        "fastema": fastema.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": _triton_version(),
        "cuda": _cuda(),
    }
    for name, version in versions.items():
        print(f"{name:<8} {version}")
    lines = backends.report()
    width = max(len(backend.name) for backend in lines)
    print("backends")
    for backend in lines:
        print(f"  {backend.name:<{width}}  {'usable' if backend.usable else 'not usable'}: {backend.detail}")


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "torch was built without it"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but no usable device"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"

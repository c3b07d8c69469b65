"""`python -m bench.gpu.usable [--device cuda:0]`: whether what is to be tested there can run at all.

Prints `fastema info`, and ends with 1, and the reasons, unless the package is this checkout's and both backends that
have kernels can run on the device: tests of a backend that cannot run skip, and a run of skips alone proves nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu.results import ROOT


def complaints(device: torch.device) -> list[str]:
    """Return why nothing that follows would mean anything."""
    import fastema
    from fastema import backends

    found = []
    place = Path(fastema.__file__).resolve().parent
    if place != ROOT / "fastema":
        found.append(f"fastema is imported from {place}, not from {ROOT}")
    for name in ("native", "triton"):
        backend = backends.BACKENDS[name]
        reason = backend.why_unusable(device.type) or backend.probe(device)
        if reason is not None:
            found.append(f"{name}: {reason}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.usable", description="Whether both backends can run.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    device = parser.parse_args(arguments).device
    from fastema.cli import main as fastema

    fastema(["info"])
    found = complaints(device)
    for line in found:
        print(f"unusable on {device}: {line}")
    if not found:
        print(f"usable on {device}: native, triton")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.studies.teacher [--rounds N] [--threads N] [--nets NAME ...] [--device DEV]`

Measure a teacher without a second module: a training step whose targets come from the swapped-in average, beside the
same step with a second module. Time per step, the ways in turns, and what each way holds beyond the student and its
optimizer. The targets of the swap and of the second module that FastEMA fills are compared bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.cases import import_timm
from fastema import FastEMA

DECAY = 0.999


def bytes_of(module: nn.Module) -> int:
    """Return the size of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def make_net(name: str, device: str) -> Any:
    """Return a network in train mode, the same each time."""
    timm = import_timm()

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=64).to(device)


def train_step(student: nn.Module, optimizer: torch.optim.Optimizer, target: Tensor, images: Tensor) -> None:
    """Train a step towards the teacher's output."""
    optimizer.zero_grad(set_to_none=True)
    (student(images) - target).square().mean().backward()
    optimizer.step()


class Way:
    """A student with its optimizer, and a teacher.

    Args:
        student: trained.
        images: of every step, [N, 3, H, W].
    """

    name = "swapped average"

    def __init__(self, student: nn.Module, images: Tensor) -> None:
        self.student, self.images = student, images
        self.optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
        self.ema: FastEMA | None = FastEMA(student, DECAY, decay_type="constant")
        self.teacher: nn.Module | None = None

    def target(self) -> Tensor:
        assert self.ema is not None
        with self.ema.swapped(), torch.no_grad():
            return self.student(self.images)

    def update(self) -> None:
        assert self.ema is not None
        self.ema.update()

    def step(self) -> Tensor:
        """Train a step; return its targets."""
        target = self.target()
        train_step(self.student, self.optimizer, target, self.images)
        self.update()
        return target

    def extra_bytes(self) -> int:
        """Return the bytes of averages and teacher."""
        own = bytes_of(self.student)
        return own * ((self.ema is not None) + (self.teacher is not None))


class SecondModule(Way):
    """A second module that is the average, updated by torch._foreach_lerp_."""

    name = "second module, foreach"

    def __init__(self, student: nn.Module, images: Tensor) -> None:
        super().__init__(student, images)
        self.ema, self.teacher = None, copy.deepcopy(student).requires_grad_(False)

    def target(self) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            return self.teacher(self.images)

    def update(self) -> None:
        assert self.teacher is not None
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - DECAY)


class FilledModule(SecondModule):
    """A second module that is filled from a FastEMA after each update."""

    name = "second module beside a FastEMA"

    def __init__(self, student: nn.Module, images: Tensor) -> None:
        super().__init__(student, images)
        self.ema = FastEMA(student, DECAY, decay_type="constant")

    def update(self) -> None:
        assert self.ema is not None and self.teacher is not None
        self.ema.update()
        self.ema.copy_to(self.teacher)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="bench.studies.teacher", description=__doc__)
    parser.add_argument("--nets", nargs="+", default=["edgenext_small", "resnet50"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {given.device}, {given.threads} threads; batch "
        f"{given.batch_size}, {given.img_size} px; median of {given.rounds} rounds, the ways in turns"
    )
    for name in given.nets:
        _measure(name, given)
    return 0


def _measure(name: str, given: argparse.Namespace) -> None:
    images = torch.randn(given.batch_size, 3, given.img_size, given.img_size, device=given.device)
    ways = [kind(make_net(name, given.device), images) for kind in (Way, SecondModule, FilledModule)]
    swapped, _, filled = targets = [way.step() for way in ways for _ in range(2)][1::2]
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for each in range(given.rounds):
        for way in (*ways[each % 3 :], *ways[: each % 3]):
            _wait(given.device)
            start = time.perf_counter()
            way.step()
            _wait(given.device)
            times[way.name].append(time.perf_counter() - start)
    print(
        f"{name}: {bytes_of(ways[0].student) / 1e6:.1f} MB of weights; targets of the second step equal to the bit: "
        f"{torch.equal(swapped, filled)} (largest target {targets[0].abs().max():.3g})"
    )
    for way in ways:
        print(
            f"  {way.name:<32} {median(times[way.name]) * 1e3:8.1f} ms a step  {way.extra_bytes() / 1e6:8.1f} MB extra"
        )


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())

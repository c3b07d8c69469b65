"""`python -m bench.train_step [--quick] [--json FILE] [--device cpu|cuda]`

Measure the average's share of a training step: real steps (forward, backward, optimizer), after each of which one
implementation updates its average, all in turns on one model, so caches are as a training step leaves them. The
update's time grows with the weights, the step's with batch and image, which are in the name of each case: here they
are small, so every share is larger than in a real training.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.contenders import libraries
from bench.contenders.libraries import LIBRARIES, QUICK_LIBRARIES
from bench.contenders.peers import FOREACH, OURS, STEP
from bench.harness.cases import Case, Unavailable, import_timm
from bench.harness.console import duration, print_table
from bench.harness.contender import Contender, Peer, built
from bench.harness.machine import tidy_up
from bench.harness.measure import Budget, timing_of
from bench.harness.records import Record
from bench.harness.session import Session, run_benchmarks

SWAPPING = (OURS, libraries.TORCH_EMA, libraries.DIFFUSERS)
_CLASSES = 100


@dataclass(frozen=True)
class Workload:
    """A model in training.

    Args:
        loss: computes the loss of one fixed batch.
    """

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]

    @property
    def case(self) -> Case:
        return Case(self.name, tuple(tuple(parameter.shape) for parameter in self.model.parameters()))

    def step_of(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            self.loss().backward()
            optimizer.step()

        return step


def classifier(architecture: str, name: str, batch: int, pixels: int, device: torch.device) -> Workload:
    """Return a classifier of timm.

    Raises:
        Unavailable: timm is missing.
    """
    timm = import_timm()
    options = {"img_size": pixels} if architecture.startswith("vit") else {}
    model = timm.create_model(architecture, num_classes=_CLASSES, **options).to(device).train()
    images = torch.rand(batch, 3, pixels, pixels, device=device)
    labels = torch.randint(_CLASSES, (batch,), device=device)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    return Workload(f"{name}, {batch} x {pixels} px", model, loss)


def segmentation(backbone: str, experts: int, batch: int, pixels: int, device: torch.device) -> Workload:
    """Return the reference trainer's net and loss.

    Raises:
        Unavailable: timm is missing.
    """
    import_timm()
    from fastema.segmentation.model.network import Architecture, create_net
    from fastema.segmentation.train.losses import training_loss

    net, _ = create_net(Architecture(backbone=backbone, num_experts=experts), pretrained=False)
    model = net.to(device).train()
    images = torch.rand(batch, 3, pixels, pixels, device=device)
    masks = (torch.rand(batch, 1, pixels, pixels, device=device) > 0.5).float()

    def loss() -> Tensor:
        return training_loss(model(images), masks)

    return Workload(f"{backbone} with {experts} experts, {batch} x {pixels} px", model, loss)


def workloads(session: Session) -> list[Callable[[], Workload]]:
    """Return the builders of all workloads."""
    device = session.device
    if session.quick:
        return [lambda: classifier("resnet50", "ResNet-50", 2, 64, device)]
    small = device.type == "cpu"
    return [
        lambda: classifier("resnet50", "ResNet-50", 8 if small else 64, 128 if small else 224, device),
        lambda: classifier("vit_small_patch16_224", "ViT-S/16", 4 if small else 64, 160 if small else 224, device),
        lambda: segmentation("edgenext_base", 7, 4 if small else 16, 128 if small else 384, device),
    ]


def measure(session: Session, workload: Workload, entrants: Sequence[Peer], budget: Budget) -> list[Record]:
    """Measure one table: a step, an update of one implementation, a step, an update of the next."""
    tidy_up()
    case = workload.case
    step = workload.step_of(torch.optim.SGD(workload.model.parameters(), lr=1e-4, momentum=0.9))
    contenders: dict[Peer, Contender] = {}
    for peer in entrants:
        try:
            contenders[peer] = built(peer, workload.model, case)
        except Unavailable as error:
            session.miss("train_step", case.name, peer.name, error)
            print(f"  not measured: {peer.name}: {error}")
    swapping = [peer for peer in contenders if peer in SWAPPING]
    samples = _samples(session, step, contenders, swapping, budget)
    records = [session.record("train_step", case, STEP, "torch", timing_of(samples["step", STEP]))]
    for bench, of in (("train_step", list(contenders)), ("train_step: swap", swapping)):
        for peer in of:
            backend = contenders[peer].backend or "torch"
            records.append(session.record(bench, case, peer.name, backend, timing_of(samples[bench, peer.name])))
    return records


def _samples(
    session: Session,
    step: Callable[[], None],
    contenders: dict[Peer, Contender],
    swapping: Sequence[Peer],
    budget: Budget,
) -> dict[tuple[str, str], list[float]]:
    meter = session.meter
    samples: dict[tuple[str, str], list[float]] = {("step", STEP): []}
    turns = [("train_step", peer.name, contenders[peer].run) for peer in contenders]
    turns += [("train_step: swap", peer.name, contenders[peer].swap) for peer in swapping]
    step()
    rounds, deadline = 0, time.perf_counter() + budget.seconds
    while rounds < budget.least or (rounds < budget.most and time.perf_counter() < deadline):
        random.Random(rounds).shuffle(turns)
        for bench, name, call in turns:
            samples["step", STEP].append(meter.wall_us(step))
            samples.setdefault((bench, name), []).append(meter.wall_us(call))
        rounds += 1
    return samples


def print_shares(records: Sequence[Record]) -> None:
    """Print shares of a step with its update, the smallest first; a swap counts as if it came with every step."""
    step = next(record.median_us for record in records if record.impl == STEP)
    assert step is not None
    rows = [[STEP, "", duration(step), ""]]
    for record in sorted(records[1:], key=lambda record: (record.bench, record.median_us or 0.0)):
        what = "swap, once a validation" if record.bench.endswith("swap") else "update"
        median = record.median_us or 0.0
        rows.append([record.impl, what, duration(median), f"{median / (step + median):.2%}"])
    title = f"train_step: {records[0].case}, float32, {records[0].params / 1e6:.1f} M parameters"
    print_table(title, ["", "", "median", "of the step"], rows, left=2)


def run(session: Session) -> None:
    """Measure all tables."""
    shipped = QUICK_LIBRARIES[:3] if session.quick else (*LIBRARIES[:5], *LIBRARIES[6:8], libraries.LIGHTNING)
    for make in workloads(session):
        try:
            workload = make()
        except (Unavailable, ImportError) as error:
            session.miss("train_step", "", "", error)
            print(f"train_step: left out: {error}\n")
            continue
        print_shares(measure(session, workload, (OURS, FOREACH, *shipped), session.budget(14, least=3)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_benchmarks("bench.train_step", "The average's share of a step.", {"train_step": run}, arguments)


if __name__ == "__main__":
    sys.exit(main())

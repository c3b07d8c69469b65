"""A plain training loop that keeps an average, validates both, saves, and resumes.

    python docs/examples/plain_loop.py

Two interleaved spirals, a small net, and a constant learning rate, at which the weights keep jumping about.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from fastema import FastEMA
from fastema.checkpoint import load_checkpoint, load_weights, save_checkpoint


def spirals(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (count,), generator=generator)
    radius = torch.rand(count, generator=generator) * 3
    angle = radius * 2 + label * math.pi
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return points + 0.15 * torch.randn(count, 2, generator=generator), label


def new_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )


@torch.no_grad()
def accuracy(net: nn.Module, points: Tensor, labels: Tensor) -> float:
    net.eval()
    found = float((net(points).argmax(1) == labels).float().mean())
    net.train()
    return found


def main(epochs: int = 6) -> None:
    points, labels = spirals(2048, seed=1)
    held_out = spirals(1024, seed=2)
    net = new_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    ema = FastEMA(net, decay=0.99)
    ema.attach(optimizer)  # an update after every step

    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(points)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(points[batch]), labels[batch]).backward()
            optimizer.step()
        base = accuracy(net, *held_out)
        with ema.swapped():
            averaged = accuracy(net, *held_out)
        print(f"epoch {epoch}: accuracy {base:.3f}, of the average {averaged:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.pth")
        save_checkpoint(path, net=net, ema=ema, optimizer=optimizer)
        again = new_net()
        resumed = FastEMA(again, decay=0.99)
        checkpoint = load_checkpoint(path)
        again.load_state_dict(checkpoint["net"])
        resumed.load_state_dict(checkpoint["ema"])
        print(f"resumed after {resumed.num_updates} updates")
        for_inference = new_net()
        print(f"loaded {load_weights(for_inference, path)}: accuracy {accuracy(for_inference, *held_out):.3f}")


if __name__ == "__main__":
    main()

"""`python -m bench.gpu.overlap [--device cuda|cpu]`: what an update beside the next forward would gain.

A training step without an average, with one on the training's stream, and with one on a side stream that is joined
before the next optimizer step. The three take turns. Predicted: .1 to .8 % of a step; from 1 % on it is worth a recipe
of three lines. Averages of parameters alone: a forward in training writes to buffers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bench.harness.cases import Unavailable, import_timm
from fastema import FastEMA

KINDS = ("none", "main", "side")


def workloads(device: torch.device) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield a name, a model in training and a batch; small ones on a CPU, where there is nothing to measure."""
    on_gpu = device.type == "cuda"
    width, layers, rows = (4096, 12, 2048) if on_gpu else (16, 2, 4)
    linear = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())]
    net = nn.Sequential(*linear, nn.Linear(width, 1000)).to(device)
    yield f"{layers} x {width} linear, {rows} rows", net, torch.randn(rows, width, device=device)
    if on_gpu:
        try:
            timm = import_timm()
        except Unavailable as error:
            print(f"ResNet-50 and ViT-S/16 are left out: timm is {error}")
            return
        images = torch.randn(64, 3, 224, 224, device=device)
        yield "ResNet-50, 64 x 224", timm.create_model("resnet50").to(device), images
        yield "ViT-S/16, 64 x 224", timm.create_model("vit_small_patch16_224").to(device), images


def measure(model: nn.Module, inputs: Tensor, turns: int, steps: int) -> dict[str, float]:
    """Return milliseconds a step, for each kind."""
    device = inputs.device
    streams = torch.get_device_module(device)
    labels = torch.randint(1000, (len(inputs),), device=device)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)
    ema = FastEMA(list(model.named_parameters()), decay=0.999)
    main, side = streams.current_stream(), streams.Stream()

    def step(kind: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        if kind == "side":
            main.wait_stream(side)
        optimizer.step()
        if kind == "main":
            ema.update()
        if kind == "side":
            side.wait_stream(main)
            with streams.stream(side):
                ema.update()

    seen: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(turns + 2):
        for kind in KINDS:
            streams.synchronize()
            begin = time.perf_counter()
            for _ in range(steps):
                step(kind)
            streams.synchronize()
            if turn >= 2:  # what is compiled, allocated or chosen at first use is done
                seen[kind].append((time.perf_counter() - begin) / steps * 1e3)
    return {kind: statistics.median(times) for kind, times in seen.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.overlap", description="An update beside a forward.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    turns, steps = (12, 20) if device.type == "cuda" else (1, 1)
    for name, model, inputs in workloads(device):
        ms = measure(model, inputs, turns, steps)
        cost, gain = (100 * part / ms["none"] for part in (ms["main"] - ms["none"], ms["main"] - ms["side"]))
        print(
            f"{name}: step {ms['none']:.3f} ms, its average {cost:+.2f} %, beside the next forward {gain:+.2f} % gained"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

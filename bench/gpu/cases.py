"""`python -m bench.gpu.cases [--device cuda|cpu] [--results FILE] [--scale X]`

The update and the exchange at the sizes that decide, each beside what was predicted of it before anything ran: bytes,
the floor at the bandwidth of the card's own copy, and the share of it. Both ceilings of the machine are measured beside
every case: a copy, and a triad (two reads to one write, as an update has). Launches are counted after all times are
taken, since a profiler may slow down what comes after it. A case that the file holds already, of the same sources, is
not measured again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.results import PACKAGE, read, sources_digest, write
from bench.harness.cases import segmentation_list
from bench.harness.measure import Budget, sweeper, take_turns
from bench.harness.meters import meter_for
from fastema import FastEMA, backends

ASSUMED_COPY_GBPS = 4300.0  # of an H200: for the floors of a dry run
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Prediction:
    """A case and what was expected of it.

    Args:
        sizes: elements of each tensor.
        shadow, live: dtypes.
        bytes: an element, read and written.
        share: least and most of the copy's bandwidth that was expected, in percent; None: bound by the launch.
        why: the reasoning, in words.
        shadows: averages of one model.
        planes: float32 averages of bfloat16 weights in two planes.
    """

    name: str
    sizes: tuple[int, ...]
    shadow: torch.dtype
    live: torch.dtype
    bytes: int
    share: tuple[int, int] | None
    why: str
    shadows: int = 1
    planes: bool = False

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    @property
    def total_bytes(self) -> int:
        return self.elements * self.bytes

    @property
    def wanted(self) -> str:
        """Return the prediction in words."""
        return "launch-bound" if self.share is None else f"{self.share[0]} to {self.share[1]} %"

    def floor_us(self, copy_gbps: float) -> float:
        return self.total_bytes / copy_gbps / 1e3

    def scaled(self, scale: float, most: int | None = None) -> Prediction:
        """Return the case with smaller tensors."""
        sizes = tuple(max(1, int(size * scale)) for size in self.sizes)
        return replace(self, sizes=tuple(min(size, most or size) for size in sizes))


_M = 1_000_000
_NET = tuple(math.prod(shape) for shape in segmentation_list().shapes)
PREDICTIONS = (
    Prediction("update f32, 25 M", (25 * _M,), F32, F32, 12, (94, 98), "ramp and drain of a launch: 4 us"),
    Prediction("update f32, 100 M", (100 * _M,), F32, F32, 12, (97, 100), "DRAM"),
    Prediction("update f32, 1 B", (1000 * _M,), F32, F32, 12, (98, 102), "2 reads to 1 write turn the bus less"),
    Prediction("update f32, 746 tensors", _NET, F32, F32, 12, (88, 93), "the last blocks, and tiny ones"),
    Prediction("update f32, 1,000 x 25,000", (25_000,) * 1000, F32, F32, 12, (85, 95), "a ragged chunk a tensor"),
    Prediction("update f32 <- bf16, 100 M", (100 * _M,), F32, BF16, 10, (96, 99), "live moves 8 bytes a load"),
    Prediction("update planes <- bf16, 100 M", (100 * _M,), F32, BF16, 10, (93, 98), "ALU 44 % busy", planes=True),
    Prediction("update bf16, 100 M", (100 * _M,), BF16, BF16, 6, (90, 98), "ALU 40 % busy"),
    Prediction("update f32, 25 M, 4 averages", (25 * _M,), F32, F32, 36, (85, 93), "one read of the weights", 4),
    Prediction("update f32, 1,000 x 256", (256,) * 1000, F32, F32, 12, None, "2.5 waves of two latencies: 5 to 7 us"),
    Prediction("exchange in place, f32, 64 M", (64 * _M,), F32, F32, 16, (95, 99), "4 pairs in flight"),
)
COLUMNS = ("case", "implementation", "MB", "floor us", "predicted", "measured us", "share", "host us", "launches")
CEILINGS = ("copy", "triad")


class _Plain(FastEMA):
    """One whose float32 averages of bfloat16 weights are plain arrays."""

    _may_split = False


def print_predictions(copy_gbps: float = ASSUMED_COPY_GBPS) -> None:
    """Print the table without measurements."""
    print(f"predictions, at a copy of {copy_gbps:g} GB/s")
    for one in PREDICTIONS:
        floor = one.floor_us(copy_gbps)
        print(f"  {one.name:<30} {one.total_bytes / 1e6:>9.1f} MB {floor:>8.1f} us  {one.wanted}: {one.why}")


def calls_of(case: Prediction, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return who takes turns: the ceilings, each backend with kernels here, and `_foreach_lerp_`."""
    lives = [torch.randn(size, device=device).to(case.live) for size in case.sizes]
    names = [f"w{index}" for index in range(len(lives))]
    decays: Any = [0.9 - 0.01 * index for index in range(case.shadows)] if case.shadows > 1 else 0.9
    calls: dict[str, Callable[[], object]] = {}
    source = torch.randn(max(1, case.total_bytes // 8), device=device)
    target = torch.zeros_like(source)
    calls["copy"] = lambda: target.copy_(source)
    parts = source[: source.numel() // 3 * 3].view(3, -1)  # less than a copy's memory, as many bytes an element as f32
    calls["triad"] = lambda: torch.add(parts[0], parts[1], alpha=0.5, out=parts[2])
    in_place = case.name.startswith("exchange")
    for backend in ("native", "triton"):
        module = backends.BACKENDS[backend]
        if module.why_unusable(device.type) is not None or module.probe(device) is not None:
            continue
        kind = FastEMA if case.planes else _Plain
        ema = kind(list(zip(names, lives, strict=True)), decay=decays, dtype=case.shadow, backend=backend)
        _move(lives)
        calls[backend] = _exchanging(ema) if in_place else ema.update
    if case.shadow == case.live and case.shadows == 1 and not in_place:
        shadows = [live.clone() for live in lives]
        calls["_foreach_lerp_"] = lambda: torch._foreach_lerp_(shadows, lives, 0.1)
    return calls


def _needed_bytes(case: Prediction) -> int:
    """Weights, an average for each of three implementations, and the copy's two sides."""
    return case.elements * (case.live.itemsize + 3 * case.shadows * case.shadow.itemsize) + case.total_bytes


def _fits(case: Prediction, device: torch.device) -> bool:
    return device.type == "cpu" or _needed_bytes(case) < 0.9 * torch.cuda.mem_get_info(device)[0]


def _move(lives: list[Tensor]) -> None:
    """Change the weights: zeros and equal operands can run faster than real data."""
    torch._foreach_add_(lives, 0.25)


def _exchanging(ema: FastEMA) -> Callable[[], object]:
    (plan,) = ema.engine.averages.plans.by_device
    return lambda: plan.exchange(0)


def measure(case: Prediction, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Return one row for each implementation; those of the ceilings are in every row."""
    meter = meter_for(device)
    sweep = sweeper(device)
    timings = take_turns(calls_of(case, device), meter, "cold", Budget(seconds, least=5), sweep)
    copy_us = timings.pop("copy").median_us
    copy_gbps = case.total_bytes / copy_us / 1e3
    triad_bytes = max(1, case.total_bytes // 8) // 3 * 12
    triad_gbps = triad_bytes / timings.pop("triad").median_us / 1e3
    return [
        {
            "case": case.name,
            "impl": name,
            "bytes": case.total_bytes,
            "copy_us": copy_us,
            "copy_gbps": copy_gbps,
            "triad_gbps": triad_gbps,
            "predicted": case.wanted,
            "median_us": timing.median_us,
            "p10_us": timing.p10_us,
            "p90_us": timing.p90_us,
            "host_us": timing.host_us,
            "share": 100 * copy_us / timing.median_us,
            "launches": None,
        }
        for name, timing in timings.items()
    ]


def count_launches(case: Prediction, rows: list[dict[str, Any]], device: torch.device) -> None:
    """Fill in how many kernels and copies one call is. The number does not depend on the size: a small one will do."""
    meter = meter_for(device)
    calls = calls_of(case.scaled(1, most=1 << 16), device)
    for row in rows:
        call = calls[row["impl"]]
        call()
        row["launches"] = meter.launches(call)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print what was measured beside what was predicted."""
    cells = [COLUMNS]
    for row in rows:
        floor = row["bytes"] / row["copy_gbps"] / 1e3
        host = "" if row["host_us"] is None else f"{row['host_us']:.1f}"
        launches = "" if row["launches"] is None else str(row["launches"])
        numbers = (
            f"{row['bytes'] / 1e6:.1f}",
            f"{floor:.1f}",
            row["predicted"],
            f"{row['median_us']:.1f}",
            f"{row['share']:.0f} %",
        )
        cells.append((row["case"], row["impl"], *numbers, host, launches))
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    largest = max(rows, key=lambda row: row["bytes"], default=None)
    if largest is not None:
        print(f"copy {largest['copy_gbps']:.0f} GB/s, triad {largest['triad_gbps']:.0f} GB/s ({largest['case']})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.cases", description="Predictions and measurements.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where the rows go; cases it holds are kept")
    parser.add_argument("--scale", type=float, default=1.0, help="of each tensor, for a look without a GPU")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each case")
    parsed = parser.parse_args(arguments)
    device = torch.device(parsed.device, 0) if parsed.device == "cuda" else torch.device("cpu")
    sources = sources_digest((*PACKAGE, "bench"))
    part = read(parsed.results) if parsed.results else {}
    if part.get("sources") != sources or part.get("scale") != parsed.scale:
        part = {"sources": sources, "torch": torch.__version__, "scale": parsed.scale}
    rows: list[dict[str, Any]] = part.setdefault("cases", [])

    def keep() -> None:
        if parsed.results is not None:
            write(parsed.results, part)

    cases = [one.scaled(parsed.scale) for one in PREDICTIONS]
    for case in cases:
        print(f"{case.name}", flush=True)
        if not _fits(case, device):
            print(f"{case.name}: left out: {_needed_bytes(case) / 1e9:.1f} GB do not fit")
        elif not any(row["case"] == case.name for row in rows):
            rows += measure(case, device, parsed.seconds)
            keep()
    for case in cases:  # last: see above
        own = [row for row in rows if row["case"] == case.name and row["launches"] is None]
        if own:
            count_launches(case, own, device)
    keep()
    print_rows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

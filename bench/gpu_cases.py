"""`python -m bench.gpu_cases [--device cuda|cpu] [--results FILE] [--scale X]`

The update and the exchange at the sizes that decide, each beside what was predicted of it before anything ran: bytes,
the floor at the copy's bandwidth, and the share of it. Launches are counted after all times are taken, since a profiler
may slow down what comes after it. A case that the file holds already, of the same sources, is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_results import read_results, sources_digest, write_part
from bench.harness.clocks import clock_for
from bench.harness.measure import Budget, sweeper, take_turns
from fastema import FastEMA, backends

ASSUMED_COPY_GBPS = 3000.0  # of an H100: for the floors of a dry run
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Prediction:
    """A case and what was expected of it.

    Args:
        tensors, elements: how many, of how many elements each.
        shadow, live: dtypes.
        shadows: averages of one model.
        bytes: an element, read and written.
        share: least share of the copy's bandwidth that was expected, in percent; 0: bound by the launch.
        why: the reasoning, in words.
    """

    name: str
    tensors: int
    elements: int
    shadow: torch.dtype
    live: torch.dtype
    shadows: int
    bytes: int
    share: int
    why: str

    @property
    def total_bytes(self) -> int:
        return self.tensors * self.elements * self.bytes

    def floor_us(self, copy_gbps: float) -> float:
        return self.total_bytes / copy_gbps / 1e3


_M = 1_000_000
PREDICTIONS = (
    Prediction("update f32 <- f32, 1 B", 1, 1000 * _M, F32, F32, 1, 12, 97, "2 reads to 1 write: may pass a copy"),
    Prediction("update f32 <- f32, 25 M", 1, 25 * _M, F32, F32, 1, 12, 92, "ramp and tail of a launch: 5 %"),
    Prediction("update f32 <- f32, 1,000 x 25,000", 1000, 25_000, F32, F32, 1, 12, 85, "a ragged chunk a tensor"),
    Prediction("update f32 <- bf16, 64 M", 1, 64 * _M, F32, BF16, 1, 10, 95, "live moves 8 bytes a load"),
    Prediction("update bf16 <- bf16, 64 M", 1, 64 * _M, BF16, BF16, 1, 6, 90, "32 elements in flight a thread"),
    Prediction("update f32 <- f32, 25 M, 4 averages", 1, 25 * _M, F32, F32, 4, 36, 90, "one read of the weights"),
    Prediction("update f32 <- f32, 1,000 x 256", 1000, 256, F32, F32, 1, 12, 0, "a launch: 3 to 5 us"),
    Prediction("exchange in place, f32, 64 M", 1, 64 * _M, F32, F32, 1, 16, 95, "4 pairs in flight"),
)
COLUMNS = ("case", "implementation", "MB", "floor us", "predicted", "measured us", "share", "host us", "launches")


def print_predictions(copy_gbps: float = ASSUMED_COPY_GBPS) -> None:
    """Print the table without measurements."""
    print(f"predictions, at a copy of {copy_gbps:g} GB/s")
    for one in PREDICTIONS:
        wanted = f">= {one.share} %" if one.share else "launch-bound"
        print(
            f"  {one.name:<38} {one.total_bytes / 1e6:>9.1f} MB {one.floor_us(copy_gbps):>9.1f} us  {wanted}: {one.why}"
        )


def calls_of(case: Prediction, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return who takes turns: a copy of as many bytes, each backend with kernels here, and `_foreach_lerp_`."""
    lives = [torch.randn(case.elements, device=device).to(case.live) for _ in range(case.tensors)]
    names = [f"w{index}" for index in range(case.tensors)]
    decays: Any = [0.9 - 0.01 * index for index in range(case.shadows)] if case.shadows > 1 else 0.9
    calls: dict[str, Callable[[], object]] = {}
    source = torch.randn(max(1, case.total_bytes // 8), device=device)
    target = torch.zeros_like(source)
    calls["copy"] = lambda: target.copy_(source)
    in_place = case.name.startswith("exchange")
    for backend in ("native", "triton"):
        module = backends.BACKENDS[backend]
        if module.why_unusable(device.type) is not None or module.probe(device) is not None:
            continue
        ema = FastEMA(list(zip(names, lives, strict=True)), decay=decays, dtype=case.shadow, backend=backend)
        _move(lives)
        calls[backend] = _exchanging(ema) if in_place else ema.update
    if case.shadow == case.live and case.shadows == 1 and not in_place:
        shadows = [live.clone() for live in lives]
        calls["_foreach_lerp_"] = lambda: torch._foreach_lerp_(shadows, lives, 0.1)
    return calls


def _needed_bytes(case: Prediction) -> int:
    """Weights, an average for each of three implementations, and the copy's two sides."""
    elements = case.tensors * case.elements
    return elements * (case.live.itemsize + 3 * case.shadows * case.shadow.itemsize) + case.total_bytes


def _fits(case: Prediction, device: torch.device) -> bool:
    return device.type == "cpu" or _needed_bytes(case) < 0.9 * torch.cuda.mem_get_info(device)[0]


def _move(lives: list[Tensor]) -> None:
    """Change the weights: zeros and equal operands can run faster than real data."""
    torch._foreach_add_(lives, 0.25)


def _exchanging(ema: FastEMA) -> Callable[[], object]:
    (plan,) = ema._shadow.plans.by_device
    return lambda: plan.exchange(0)


def measure(case: Prediction, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Return one row for each implementation but the copy, which is in every row."""
    clock = clock_for(device)
    sweep = sweeper(device)
    timings = take_turns(calls_of(case, device), clock, "cold", Budget(seconds, least=5), sweep)
    copy_us = timings.pop("copy").median_us
    copy_gbps = case.total_bytes / copy_us / 1e3
    return [
        {
            "case": case.name,
            "impl": name,
            "bytes": case.total_bytes,
            "copy_us": copy_us,
            "copy_gbps": copy_gbps,
            "predicted_share": case.share,
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
    clock = clock_for(device)
    calls = calls_of(replace(case, elements=min(case.elements, 1 << 16)), device)
    for row in rows:
        call = calls[row["impl"]]
        call()
        row["launches"] = clock.launches(call)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print what was measured beside what was predicted."""
    cells = [COLUMNS]
    for row in rows:
        floor = row["bytes"] / row["copy_gbps"] / 1e3
        wanted = f">= {row['predicted_share']} %" if row["predicted_share"] else "launch-bound"
        host = "" if row["host_us"] is None else f"{row['host_us']:.1f}"
        launches = "" if row["launches"] is None else str(row["launches"])
        numbers = (
            f"{row['bytes'] / 1e6:.1f}",
            f"{floor:.1f}",
            wanted,
            f"{row['median_us']:.1f}",
            f"{row['share']:.0f} %",
        )
        cells.append((row["case"], row["impl"], *numbers, host, launches))
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_cases", description="Predictions and measurements.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where the rows go; cases it holds are kept")
    parser.add_argument("--scale", type=float, default=1.0, help="of every tensor's size, for a look without a GPU")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each case")
    parsed = parser.parse_args(arguments)
    device = torch.device(parsed.device, 0) if parsed.device == "cuda" else torch.device("cpu")
    sources = sources_digest()
    part = read_results(parsed.results).get("bench", {}) if parsed.results else {}
    if part.get("sources") != sources or part.get("scale", 1.0) != parsed.scale:
        part = {"sources": sources, "torch": torch.__version__, "scale": parsed.scale, "steps": {}}
    rows: list[dict[str, Any]] = part.setdefault("cases", [])

    def keep() -> None:
        if parsed.results is not None:
            write_part(parsed.results, "bench", part)

    cases = [replace(one, elements=max(1, int(one.elements * parsed.scale))) for one in PREDICTIONS]
    for case in cases:
        if not _fits(case, device):
            print(f"{case.name}: left out: {_needed_bytes(case) / 1e9:.1f} GB do not fit")
        elif not any(row["case"] == case.name for row in rows):
            rows += measure(case, device, parsed.seconds)
            keep()
            print_rows([row for row in rows if row["case"] == case.name])
    for case in cases:  # last: see above
        own = [row for row in rows if row["case"] == case.name and row["launches"] is None]
        if own:
            count_launches(case, own, device)
    keep()
    print_rows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

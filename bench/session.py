"""One run of the benchmarks: what is measured, and what was found so far."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.measure import Budget, Cache, Clock, Record, Timing, device_name, versions
from bench.peers import Peer
from fastema import backends

CACHE_WORDS: dict[Cache, str] = {
    "warm": "warm: the same model again and again",
    "cold": "cold: rotating over models that together exceed the cache",
}


@dataclass(frozen=True)
class Group:
    """One table: a case, who runs it, in which cache.

    Args:
        bench: "update", or "host": the same call where there is nothing to move.
        make_case: builds the case; may raise `Unavailable`.
        peers: who.
        cache: of large cases the two are the same; "cold" then.
        note: a line under the table.
    """

    bench: str
    make_case: Callable[[], Case]
    peers: Sequence[Peer]
    cache: Cache
    budget: Budget
    note: str = ""


@dataclass
class Session:
    """One run: the machine, and what was found so far."""

    device: torch.device
    clock: Clock
    copy_gbps: float = float("nan")
    records: list[Record] = field(default_factory=list)
    unavailable: list[dict[str, str]] = field(default_factory=list)

    def miss(self, bench: str, case: str, impl: str, reason: object) -> None:
        self.unavailable.append({"bench": bench, "case": case, "impl": impl, "reason": str(reason)})

    def record(self, group: tuple[str, Case, Cache], impl: str, backend: str, timing: Timing, **more: Any) -> Record:
        bench, case, cache = group
        floor: int | None = more.get("bytes_floor")
        gbps = floor / timing.median_us / 1e3 if floor and bench != "host" else None
        # What lies in a cache has no share of the memory's bandwidth.
        share = gbps / self.copy_gbps if gbps is not None and cache == "cold" and bench != "copy" else None
        if backend == "auto":
            backend = "native" if backends.native.why_unusable(self.device.type) is None else "torch"
        record = Record(
            bench=bench,
            case=case.name,
            impl=impl,
            backend=backend,
            device=device_name(self.device),
            dtype_shadow=str(case.shadow_dtype).removeprefix("torch."),
            dtype_live=str(case.live_dtype).removeprefix("torch."),
            tensors=case.tensors,
            params=case.params,
            shadows=more.get("shadows", 1),
            median_us=timing.median_us,
            p10_us=timing.p10_us,
            p90_us=timing.p90_us,
            host_us=timing.median_us if bench == "host" and timing.host_us is None else timing.host_us,
            bytes_floor=floor,
            gbps=gbps,
            copy_share=share,
            launches=more.get("launches"),
            extra_bytes=more.get("extra_bytes"),
            versions=versions(),
            min_us=timing.min_us,
            samples=timing.samples,
            cache=cache,
        )
        self.records.append(record)
        return record

    def median(self, bench: str, case: str, impl: str, cache: Cache) -> float | None:
        """Of a record of this run; None where there is none."""
        for record in self.records:
            if (record.bench, record.case, record.impl, record.cache) == (bench, case, impl, cache):
                return record.median_us
        return None


# ---- what every benchmark's command line has ----


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """--json, --threads and --seconds."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=1.0, help="stretch the time of every table (default: 1)")


def apply_common_arguments(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Checks them before anything is measured, and sets the threads."""
    if parsed.threads is not None:
        if parsed.threads < 1:
            parser.error(f"--threads must be at least 1, got {parsed.threads}")
        torch.set_num_threads(parsed.threads)
    if not parsed.seconds > 0:
        parser.error(f"--seconds must be positive, got {parsed.seconds:g}")
    if parsed.json is not None and not parsed.json.parent.is_dir():
        parser.error(f"--json: there is no folder {parsed.json.parent}")

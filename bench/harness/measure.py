"""Time implementations in turns, one call each a round, in a new order every round.

Taking turns spreads other load on the machine over all of them. Warm: each timed call follows a millisecond of untimed
calls of the same implementation. Cold: each implementation has a model of its own, and a sweep that reads twice the
last-level cache precedes every round (on a GPU every call), so that model, average, Python objects and code come from
memory, as after a training step.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.harness.machine import cache_bytes
from bench.harness.meters import Call, Meter
from bench.harness.records import Cache, Timing

_WARM_UP_SECONDS = 1e-3


@dataclass(frozen=True)
class Budget:
    """The time for one table.

    Args:
        seconds: no new round begins after that.
        least, most: number of rounds, whatever the time.
    """

    seconds: float
    least: int = 5
    most: int = 2000


def take_turns(
    calls: Mapping[str, Call], meter: Meter, cache: Cache, budget: Budget, sweep: Call | None = None
) -> dict[str, Timing]:
    """Time all implementations of a case, one call each a round.

    Args:
        calls: by implementation.
        meter: of the device.
        cache: "warm" makes untimed calls of the same before each timed one.
        budget: how many rounds.
        sweep: empties the caches before each round, on a GPU before each call; None where the calls themselves move
            more than fits into them.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():  # plans, caches and thread pools are built on first use
        call()
        host[name].append(meter.host_us(call))
    order = list(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()  # as timeit does: a collection would count for one implementation only
    try:
        # On a GPU a round is either for the device's time or for the host's.
        rounds_a_sample = 2 if meter.has_host_part else 1
        deadline = time.perf_counter() + budget.seconds
        for turn in range(budget.most * rounds_a_sample):
            if turn >= budget.least * rounds_a_sample and time.perf_counter() > deadline:
                break
            shuffle(order)
            if sweep is not None and not meter.has_host_part:
                sweep()
            for name in order:
                call = calls[name]
                if sweep is not None and meter.has_host_part:  # cheap there, and a call leaves lines to be written back
                    sweep()
                if cache == "warm":
                    _warm_up(call)
                if turn % rounds_a_sample == 0:
                    samples[name].append(meter.device_us(call, host[name][-1]))
                else:
                    host[name].append(meter.host_us(call))
    finally:
        gc.enable()
    return {name: timing_of(samples[name], host[name] if meter.has_host_part else []) for name in calls}


def _warm_up(call: Call) -> None:
    """Call for a millisecond: one call of microseconds leaves another implementation's data in the caches."""
    until = time.perf_counter() + _WARM_UP_SECONDS
    call()
    while time.perf_counter() < until:
        call()


def timing_of(samples: Sequence[float], host: Sequence[float] = ()) -> Timing:
    """Summarise single measurements in microseconds; `host`: times until the calls returned."""
    ordered = sorted(samples)
    return Timing(
        median_us=percentile(ordered, 50),
        p10_us=percentile(ordered, 10),
        p90_us=percentile(ordered, 90),
        min_us=ordered[0],
        samples=len(ordered),
        host_us=percentile(sorted(host), 50) if host else None,
        mean_us=statistics.fmean(ordered),
        p95_us=percentile(ordered, 95),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of an ascending list, with linear interpolation.

    Example:
        >>> percentile([1.0, 2.0, 4.0], 50), percentile([1.0, 2.0, 4.0], 75)
        (2.0, 3.0)
    """
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def sweeper(device: torch.device) -> Callable[[], object]:
    """Return a call that reads twice the last-level cache, on every core.

    It writes next to nothing: lines that a sweep had written would be written back while the next call is timed.
    """
    swept = torch.zeros(cache_bytes(device) // 2, device=device)  # of 4 bytes
    total = torch.zeros((), device=device)
    return lambda: torch.sum(swept, 0, out=total)

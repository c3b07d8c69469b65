"""How it is measured.

Medians with p10 and p90 of single calls. All implementations of a case take turns within one run, in a new order every
round, so that whatever else the machine does hits all of them. Warm: each timed call follows a millisecond of untimed
ones of the same implementation. Cold: each implementation has a model of its own, and before every round twice the
last-level cache is swept through, so that model, average, their objects and the implementation's own code come from
memory, as after a training step. Bandwidth is the floor of bytes over time; its share is of the bandwidth of a plain
copy that took its turns in the same rounds.
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

from bench.clocks import Call, Clock
from bench.machine import cache_bytes
from bench.records import Cache, Timing

_WARM_UP_SECONDS = 1e-3


@dataclass(frozen=True)
class Budget:
    """How long one case may be measured.

    Args:
        seconds: rounds go on until then.
        least, most: rounds, whatever the time.
    """

    seconds: float
    least: int = 5
    most: int = 2000


def take_turns(
    calls: Mapping[str, Call], clock: Clock, cache: Cache, budget: Budget, sweep: Call | None = None
) -> dict[str, Timing]:
    """Times all implementations of a case, one call each a round.

    Args:
        calls: by implementation.
        clock: of the device.
        cache: "warm" makes untimed calls of the same before each timed one.
        budget: how many rounds.
        sweep: empties the caches before each round; None: the calls move so much that they do it for each other.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():  # what is built on first use (plans, caches, thread pools) is no update's cost
        call()
        host[name].append(clock.host_us(call))
    order = list(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()  # as timeit does: a collection would hit whoever is on at the time
    try:
        # On a GPU a round is either for the device's time or for the host's.
        rounds_a_sample = 2 if clock.has_host_part else 1
        deadline = time.perf_counter() + budget.seconds
        for turn in range(budget.most * rounds_a_sample):
            if turn >= budget.least * rounds_a_sample and time.perf_counter() > deadline:
                break
            shuffle(order)
            if sweep is not None:
                sweep()
            for name in order:
                call = calls[name]
                if cache == "warm":
                    _warm_up(call)
                if turn % rounds_a_sample == 0:
                    samples[name].append(clock.device_us(call, host[name][-1]))
                else:
                    host[name].append(clock.host_us(call))
    finally:
        gc.enable()
    return {name: timing_of(samples[name], host[name] if clock.has_host_part else []) for name in calls}


def _warm_up(call: Call) -> None:
    """Once is not enough for a call of microseconds: the last one's data and branches are still everywhere."""
    until = time.perf_counter() + _WARM_UP_SECONDS
    call()
    while time.perf_counter() < until:
        call()


def timing_of(samples: Sequence[float], host: Sequence[float] = ()) -> Timing:
    """Of single measurements in microseconds; `host`: of the calls' return."""
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
    """Of an ascending list, with linear interpolation.

    Example:
        >>> percentile([1.0, 2.0, 4.0], 50), percentile([1.0, 2.0, 4.0], 75)
        (2.0, 3.0)
    """
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def sweeper(device: torch.device) -> Callable[[], object]:
    """What reads and writes twice the last-level cache, on every core, so that all else is out of it."""
    swept = torch.zeros(cache_bytes(device) // 2, device=device)  # of 4 bytes
    return lambda: swept.add_(1)

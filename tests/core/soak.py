"""A long training with everything that happens to one, on both backends, beside its average in float64.

    PYTHONPATH=tests python tests/core/soak.py --updates 100000

Random swaps, saves, loads, `.to()`, assigned and frozen weights, copies; the error must stay within what rounding
allows, the backends agree to the bit, and memory stay flat. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cases.twins import Twins

_DECAYS = (0.9, 0.9999)
_PYTHON_GROWTH = 256 * 1024  # bytes; caches of Python and torch grow by some 60 KiB, whatever the number of updates
_RESIDENT_GROWTH = 16 * 2**20  # bytes; what allocators keep back


@dataclass
class Soak:
    """The result of a run."""

    updates: int = 0
    seconds: float = 0.0
    actions: Counter[str] = field(default_factory=Counter)
    error: float = 0.0  # the largest |shadow - float64|
    share: float = 0.0  # the largest share of what rounding allows
    python_growth: int = 0  # bytes that Python allocated in the last tenth and did not free
    resident_growth: int = 0  # bytes that the process grew by after the first tenth

    @property
    def is_flat(self) -> bool:
        return self.python_growth <= _PYTHON_GROWTH and self.resident_growth <= _RESIDENT_GROWTH

    def table(self) -> str:
        rows = [
            ("updates, on each backend", f"{self.updates:,} in {self.seconds:.0f} s"),
            ("other actions", ", ".join(f"{count:,} {name}" for name, count in sorted(self.actions.items()))),
            ("largest error against float64", f"{self.error:.2e}, {self.share:.0%} of what rounding allows"),
            ("native against torch", "equal, bit for bit"),
            ("Python's memory, last tenth", f"{self.python_growth / 1024:+.1f} KiB"),
            ("the process's memory, after the first tenth", f"{self.resident_growth / 2**20:+.1f} MiB"),
            ("verdict", "good" if self.is_flat else "MEMORY GROWS"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def soak(updates: int, seed: int = 0) -> Soak:
    """Trains for `updates` updates, half of them with bfloat16 weights among the others.

    Raises:
        AssertionError: a bit is not what it should be.
    """
    torch.manual_seed(seed)
    chance = random.Random(seed)
    result = Soak()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of non-finite weights
        for dtype in (torch.float32, torch.bfloat16):
            _half(result, Twins(_DECAYS, dtype, seed), updates // 2, chance, Path(folder) / "a.pth")
    result.seconds = time.perf_counter() - start
    return result


def _half(result: Soak, twins: Twins, updates: int, chance: random.Random, path: Path) -> None:
    which = lambda: chance.randrange(len(_DECAYS))  # noqa: E731
    actions: dict[str, tuple[float, Callable[[], None]]] = {  # in how many of all steps
        "swaps": (0.05, lambda: twins.swap(chance.random() < 0.5, which(), chance.random() < 0.3)),
        "freezes": (0.02, lambda: twins.freeze(chance.random() < 0.5)),
        "no-op .to()": (0.02, twins.to_nowhere),
        "saves": (0.02, twins.save),
        "assigns": (0.01, twins.assign),
        ".to() and back": (0.01, twins.to_another_dtype_and_back),
        "loads": (0.005, twins.load),
        "files": (0.002, lambda: twins.through_a_file(path)),
        "copies": (0.002, twins.copy),
        "copy_to()": (0.001, lambda: twins.copy_to(which())),
    }
    resident = traced = 0
    for step in range(updates):
        poisoned = chance.random() < 0.01
        twins.train(poison=chance.choice([math.nan, math.inf]) if poisoned else None)
        twins.update()
        if poisoned:
            result.actions["non-finite weights"] += 1
            twins.heal()
        for name, (probability, action) in actions.items():
            if chance.random() < probability:
                action()
                result.actions[name] += 1
        if step % 50 == 0 or step == updates - 1:
            twins.check()
        if step == updates // 10:
            gc.collect()
            resident = _resident()
        if step == updates - updates // 10:
            gc.collect()
            result.resident_growth = max(result.resident_growth, _resident() - resident)
            tracemalloc.start()
            traced = _warm(twins, path)
    gc.collect()
    if tracemalloc.is_tracing():
        result.python_growth = max(result.python_growth, tracemalloc.get_traced_memory()[0] - traced)
        tracemalloc.stop()
    result.updates += updates
    result.error, result.share = max(result.error, twins.error), max(result.share, twins.worst)


def _warm(twins: Twins, path: Path) -> int:
    """Return the memory that is traced once all that is kept was allocated under tracing."""
    for _ in range(2):
        twins.assign()
        twins.save()
        twins.through_a_file(path)
        twins.copy()
        twins.swap()
        twins.check()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def _resident() -> int:
    """Bytes of memory that the process has; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = soak(arguments.updates, arguments.seed)
    print(result.table())
    return 0 if result.is_flat else 1


if __name__ == "__main__":
    sys.exit(main())

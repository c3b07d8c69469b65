"""Averages are built, used and dropped, and the process is as large as before."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from fastema import FastEMA
from fastema.core import compiled, swap

CYCLES = 4_000
STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
@pytest.mark.usefixtures("one_thread")
def test_plans_are_built_and_destroyed_without_a_leak(backend: str) -> None:
    """A shadow of 8 KB that stayed behind in each cycle would be 32 MB."""
    model = nn.Linear(1000, 1)

    def cycle() -> None:
        ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
        ema.update()
        with ema.swapped():
            pass
        with ema.swapped(in_place=True):
            pass

    cycles = CYCLES if backend == "native" else CYCLES // 4
    for _ in range(cycles // 10):
        cycle()
    gc.collect()
    before, owners, registered = resident(), len(swap.entered), len(compiled._updates)
    gc.disable()  # nothing may need the collector: it comes late, and the weights of a model are large
    try:
        for _ in range(cycles):
            cycle()
    finally:
        gc.enable()
    grown = resident() - before
    assert grown < 4 * 2**20, f"{grown / cycles:.0f} bytes stay behind from each of {cycles:,} averages"
    assert (len(swap.entered), len(compiled._updates)) == (owners, registered)


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
@pytest.mark.usefixtures("one_thread")
def test_rebuilt_plans_and_failed_ones_leave_nothing_behind(backend: str) -> None:
    model = nn.Linear(1000, 1)
    ema = FastEMA(model, backend=backend)

    def cycle() -> None:
        model.weight = nn.Parameter(model.weight.detach().clone())
        ema.update()
        with pytest.raises(ValueError, match="could not be put back exactly"):
            FastEMA(model, dtype=torch.float64, backend=backend).apply_shadow(in_place=True)

    for _ in range(200):
        cycle()
    gc.collect()
    before = resident()
    for _ in range(1000):
        cycle()
    gc.collect()
    assert resident() - before < 4 * 2**20


def test_what_an_interrupt_left_behind_is_forgotten(backend: str) -> None:
    class Gone: ...

    model = nn.Linear(2, 2)
    ema = FastEMA(model, backend=backend)
    swap.entered[-1] = weakref.ref(Gone())  # type: ignore[assignment]
    ema.update()
    assert -1 not in swap.entered

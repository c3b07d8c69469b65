"""Threads and forks: a clear error or the right bits, never a mixture and never a process that waits forever.

FastEMA is for one thread at a time. A second one in the same moment is told so; one that comes in between, while the
average is applied, is refused as anybody would be.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastema import FastEMA

CLEAR = ("another thread is in update()", "while the EMA weights are applied", "without apply_shadow()")
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


def at_once(*actions: Callable[[], None], times: int) -> list[BaseException]:
    """Each action in a thread of its own, again and again; returns the exceptions that came out."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], None]) -> None:
        for _ in range(times):
            barrier.wait()
            try:
                action()
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    finally:
        sys.setswitchinterval(before)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return errors


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def constant_model(value: float) -> nn.Linear:
    """Large enough that an update takes a while, without the GIL."""
    model = nn.Linear(512, 1024)
    fill(model, value)
    return model


def values_of(tensors: list[Tensor]) -> set[float]:
    return {value for tensor in tensors for value in tensor.unique().tolist()}


@pytest.mark.slow
def test_validating_and_updating_at_once_is_an_error_or_right(backend: str) -> None:
    """The live weights are all 1, the average all 0: a bit in the wrong place would be seen."""
    model = constant_model(0.0)
    # The average stays 0, so every outcome is known.
    ema = FastEMA(model, decay=1.0, decay_type="constant", backend=backend)
    fill(model, 1.0)
    seen: list[set[float]] = []

    def validate() -> None:
        with ema.swapped():
            seen.append(values_of(list(model.parameters())))

    errors = at_once(validate, ema.update, times=300)
    assert all(isinstance(error, RuntimeError) and any(words in str(error) for words in CLEAR) for error in errors)
    assert not ema.is_applied
    assert values_of(list(model.parameters())) == {1.0}
    assert values_of(list(ema.shadow_state_dict().values())) == {0.0}
    assert all(values == {0.0} for values in seen), "validated on something else than the average"
    assert len(errors) + len(seen) + ema.num_updates == 600, "every call did its work or said why not"


def test_two_threads_updating_count_and_average_exactly_what_was_not_refused(backend: str) -> None:
    model = constant_model(0.0)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend, nonfinite="propagate")
    fill(model, 1.0)
    errors = at_once(ema.update, ema.update, times=10)
    assert all("another thread is in update()" in str(error) for error in errors)
    assert len(errors) + ema.num_updates == 20
    assert values_of(list(ema.shadow_state_dict().values())) == {1.0 - 0.5**ema.num_updates}


def test_two_threads_swapping_never_mix(backend: str) -> None:
    model = constant_model(0.0)
    ema = FastEMA(model, decay=1.0, decay_type="constant", backend=backend)
    fill(model, 1.0)
    inside = threading.Lock()
    overlaps: list[bool] = []

    def swap() -> None:
        ema.apply_shadow(in_place=True)
        overlaps.append(not inside.acquire(blocking=False))
        inside.release()
        ema.restore()

    at_once(swap, swap, times=200)
    if ema.is_applied:  # a restore() that came while the other thread was trying to apply was refused
        ema.restore()
    assert not any(overlaps), "two threads had it applied at once"
    assert values_of(list(model.parameters())) == {1.0}
    assert values_of(list(ema.shadow_state_dict().values())) == {0.0}


def test_a_thread_that_was_refused_does_not_shut_anyone_out(backend: str) -> None:
    ema = FastEMA(nn.Linear(2, 2), backend=backend)
    at_once(ema.update, ema.update, times=200)
    ema.update()
    pickle.loads(pickle.dumps(ema)).update()


# --- forks ------------------------------------------------------------------------------------------------------------


class WeightsInWorkers(Dataset[float]):
    """A data set that returns the weights that a DataLoader's worker sees."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        (value,) = values_of(list(self._model.parameters()))
        return value


@needs_fork
def test_workers_forked_while_applied_see_the_average_and_the_parent_restores(backend: str) -> None:
    model = constant_model(0.0)
    ema = FastEMA(model, decay=1.0, decay_type="constant", backend=backend)
    fill(model, 1.0)
    ema.update()
    loader = DataLoader(WeightsInWorkers(model), num_workers=2, multiprocessing_context="fork", timeout=60)
    with ema.swapped():
        assert [batch.item() for batch in loader] == [0.0] * 4
    assert values_of(list(model.parameters())) == {1.0}
    assert [batch.item() for batch in loader] == [1.0] * 4


_UPDATE_IN_A_CHILD = """
import os, sys, torch
from fastema import FastEMA

torch.set_num_threads(2)
model = torch.nn.Linear(2000, 2000)
ema = FastEMA(model, decay=[0.5, 0.9], decay_type="constant", backend=sys.argv[1])
ema.update()
model(torch.randn(500, 2000))  # torch's own threads run too
with ema.swapped(in_place=True):  # entered in the parent, left in the child
    child = os.fork()
    if child == 0 and sys.argv[1] == "torch":
        torch.set_num_threads(1)  # torch's own operations hang otherwise, as everywhere in a forked child
if child == 0:
    with torch.no_grad():
        model.weight[:2].add_(1.0)  # few enough for torch to stay on this thread
    expected = [ema.state_dict()["shadow"][which]["weight"][:2].clone() for which in range(2)]
    ema.update()
    for which, weight in enumerate((0.5, 0.1)):
        now = ema.state_dict()["shadow"][which]["weight"][:2]
        assert torch.allclose(now, torch.lerp(expected[which], model.weight[:2].detach(), weight), atol=1e-6)
    with ema.swapped():
        pass
    assert not ema.is_applied
    os._exit(0)
pid, status = os.waitpid(child, 0)
assert not ema.is_applied
ema.update()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
@needs_fork
def test_a_forked_child_updates_and_swaps_without_hanging(backend: str) -> None:
    """gcc's OpenMP waits forever in a forked child whose parent had a parallel region."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    child = subprocess.run(
        [sys.executable, "-c", _UPDATE_IN_A_CHILD, backend], capture_output=True, text=True, timeout=90, env=environment
    )
    assert child.returncode == 0, child.stderr

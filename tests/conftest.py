"""Fixtures of all folders. One thread unless OMP_NUM_THREADS says more: tensors are tiny and tests run in parallel."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that a test starts inherit it
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # Inductor compiles no probes of the instruction set: 5 s

import pytest
import torch

from fastema import backends
from fastema.backends import exchange

# A shell that starts a job in the background has it ignore Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests, so that no worker is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread, whatever OMP_NUM_THREADS says."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """Return every backend that can run on this machine's CPU."""
    reason = backends.BACKENDS[request.param].why_unusable("cpu")
    if request.param == "torch" and request.node.get_closest_marker("pointers") and not exchange.SWAPS_POINTERS:
        reason = "below torch 2.13 the torch backend exchanges contents"
    if reason is not None:
        pytest.skip(reason)
    return request.param

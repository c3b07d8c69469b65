"""Fixtures that several rooms share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from fastema import backends

# A shell that starts a job in the background has it ignore Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For rooms whose tensors are tiny: waiting for a second thread on a busy machine takes longer than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run on this machine's CPU."""
    reason = backends.BACKENDS[request.param].why_unusable("cpu")
    if reason is not None:
        pytest.skip(reason)
    return request.param

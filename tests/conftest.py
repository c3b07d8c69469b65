"""Fixtures that several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastema import backends


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

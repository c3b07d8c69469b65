"""The soak, short: `make long` runs the long one."""

from __future__ import annotations

import pytest
from soak import soak

from fastema import backends


@pytest.mark.slow
@pytest.mark.skipif(backends.native.why_unusable("cpu") is not None, reason="compares with fastema._C")
@pytest.mark.usefixtures("one_thread")
def test_a_thousand_updates_with_everything_in_between() -> None:
    result = soak(updates=1000, seed=1)
    assert result.is_flat, result.table()
    assert {"swaps", "loads", "assigns", ".to() and back", "copies", "non-finite weights"} <= set(result.actions)
    assert 0 < result.share <= 1

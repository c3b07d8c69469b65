"""Fixtures of the command's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def always_one_thread(one_thread: None) -> None:
    """Run on one thread: networks this small gain nothing from a second."""

"""Fixtures of the command's tests."""

from __future__ import annotations

import pytest

from fastema.segmentation.train_extra import missing_packages


@pytest.fixture(autouse=True, scope="module")
def always_one_thread(one_thread: None) -> None:
    """Networks this small gain nothing from a second thread."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures at the end of a run, which take a second."""
    if not missing_packages():
        from fastema.segmentation.train import trainer

        monkeypatch.setattr(trainer, "write_curves", lambda *_: None)
        monkeypatch.setattr(trainer, "write_predictions", lambda *_: None)

"""Fixtures of the trainer's tests."""

from __future__ import annotations

import pytest

from fastema.segmentation.train_extra import missing_packages

if not missing_packages():
    from fastema.segmentation.train import trainer as trainer_module
    from segmentation.runs import Pairs, tiny_pairs

    @pytest.fixture(scope="module")
    def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
        """Ten images to train on and four to validate on, 64 px."""
        return tiny_pairs(tmp_path_factory.mktemp("data"))

    @pytest.fixture(autouse=True)
    def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leave out the pictures at the end of a run, which take a second, unless a test asks for `pictures`."""
        if "pictures" not in request.fixturenames:
            monkeypatch.setattr(trainer_module, "write_curves", lambda *_: None)
            monkeypatch.setattr(trainer_module, "write_predictions", lambda *_: None)


@pytest.fixture
def pictures() -> None:
    """For a test that wants the pictures at the end of a run."""


@pytest.fixture(autouse=True, scope="module")
def always_one_thread(one_thread: None) -> None:
    """Networks this small gain nothing from a second thread."""

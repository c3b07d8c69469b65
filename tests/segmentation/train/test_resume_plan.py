"""A run that goes on with another batch size, number of epochs or images: half of the run is half of the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

from fastema.checkpoint import load_checkpoint
from segmentation.runs import Pairs, tiny_options, tiny_run

# Ten images: 3 steps an epoch in batches of 4, 5 in batches of 2, 2 with two batches of 4 a step.
AVERAGE = {"use_ema": True, "ema_decay": 0.9, "ema_decay_type": "linear"}
PROFILES = {"use_ema": True, "ema_profiles": (0.05, 0.1), "snapshots": 4}


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"batch_size": 2}, 6 + 10), ({"accumulation_steps": 2}, 6 + 4), ({"epochs": 8}, 6 + 18), ({}, 6 + 6)],
    ids=["batch size", "accumulation", "epochs", "none"],
)
@pytest.mark.parametrize("old", [False, True], ids=["", "file of an older version"])
def test_the_schedule_has_the_steps_done_and_those_to_come(
    pairs: Pairs, tmp_path: Path, changes: dict[str, Any], steps: int, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(pairs, tiny_options(tmp_path / "a", epochs=4, **AVERAGE))
    assert run.averages.total_steps == 12
    for epoch in (1, 2):
        run._record(epoch, run._train_epoch(epoch), run._validate(), 0.0)
    run._save()
    last = tmp_path / "a" / "last.pth"
    if old:
        content = load_checkpoint(last)
        content.pop("ema_plan")
        monkeypatch.setattr("fastema.segmentation.train.checkpoints.load_checkpoint", lambda _: content)
    again = tiny_run(pairs, tiny_options(tmp_path / "a", **{"epochs": 4, **AVERAGE, **changes, "resume_from": last}))
    assert again.averages.total_steps == steps
    assert again.averages.ema.decay_at(6) == pytest.approx(0.9 * 6 / steps)
    assert again.averages.ema.decay_at(steps) == pytest.approx(0.9)


def test_as_many_snapshots_as_asked_for(pairs: Pairs, tmp_path: Path) -> None:
    run = tiny_run(pairs, tiny_options(tmp_path / "a", epochs=4, **PROFILES))
    for epoch in (1, 2):
        run._record(epoch, run._train_epoch(epoch), run._validate(), 0.0)
    assert run.averages._due == {3, 6, 9, 12}
    run._save()
    last = tmp_path / "a" / "last.pth"
    for changes, due in (({}, {3, 6, 9, 12}), ({"batch_size": 2}, {11, 16}), ({"accumulation_steps": 2}, {8, 10})):
        given = {"epochs": 4, **PROFILES, **changes, "resume_from": last}
        again = tiny_run(pairs, tiny_options(tmp_path / "a", **given))
        again.averages.start_snapshots(tmp_path / "a" / "snapshots")
        assert again.averages._due == due


def test_what_was_held_out_stays_held_out_when_images_are_added(pairs: Pairs, tmp_path: Path) -> None:
    from fastema.segmentation.data.listing import hold_out

    training, validation = pairs
    names = [pair.stem for pair in validation]
    again = hold_out([*training, *validation], 0.1, names)
    assert sorted(pair.stem for pair in again[1]) == sorted(names)
    assert len(hold_out(training, 0.1, ["gone"])[1]) == 2  # another set

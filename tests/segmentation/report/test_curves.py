"""The curves of a run, read back from the picture's pixels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import numpy as np
from PIL import Image

from fastema.segmentation.report.history import EpochRecord
from fastema.segmentation.report.pictures import BASE, EMA, OTHERS, write_curves


def run(epochs: int, ema: bool = True, stage1: int = 0, others: tuple[str, ...] = ()) -> list[EpochRecord]:
    return [
        EpochRecord(
            epoch=epoch,
            loss=math.exp(-epoch / 10),
            iou=0.7 - 0.5 / epoch,
            ema_iou=0.75 - 0.4 / epoch if ema else None,
            lr=2e-4 / epoch,
            ema_decay=min(0.999, (1 + 50 * epoch) / (10 + 50 * epoch)) if ema else None,
            seconds=30.0,
            stage=1 if epoch <= stage1 else 2,
            other_ema_ious={name: float(name) / 3 - 0.1 / epoch for name in others},
            other_ema_decays={name: float(name) for name in others},
        )
        for epoch in range(1, epochs + 1)
    ]


def drawn(path: Path, history: list[EpochRecord]) -> np.ndarray:
    write_curves(path, history)
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB")).astype(int)


def pixels_of(picture: np.ndarray, colour: str) -> np.ndarray:
    """Where a colour is, in quarters: [top, bottom][left, right] counts."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    there = (np.abs(picture - wanted).max(axis=2) < 12).astype(int)
    half = there.shape[0] // 2, there.shape[1] // 2
    return np.array(
        [[there[rows, columns].sum() for columns in (slice(half[1]), slice(half[1], None))]
         for rows in (slice(half[0]), slice(half[0], None))]
    )  # fmt: skip


def test_base_and_average_are_told_apart(tmp_path: Path) -> None:
    picture = drawn(tmp_path / "curves.png", run(60))
    assert picture.shape == (600, 1000, 3)
    average, base = pixels_of(picture, EMA), pixels_of(picture, BASE)
    assert average[0, 1] > 100  # IoU
    assert average[1, 1] > 100  # its window
    assert average[:, 0].tolist() == [0, 0]
    assert base[0, 1] > 100


def test_without_an_average_none_is_drawn(tmp_path: Path) -> None:
    picture = drawn(tmp_path / "curves.png", run(60, ema=False))
    assert pixels_of(picture, EMA).sum() == 0
    assert pixels_of(picture, BASE)[0, 1] > 100


def test_every_average_has_a_colour_of_its_own(tmp_path: Path) -> None:
    picture = drawn(tmp_path / "curves.png", run(60, others=("0.9", "0.9999")))
    for colour in OTHERS[:2]:
        assert pixels_of(picture, colour)[0, 1] > 20
        assert pixels_of(picture, colour)[1, 1] > 20
    assert pixels_of(picture, OTHERS[2]).sum() == 0


def test_the_second_stage_is_marked_in_all_four(tmp_path: Path) -> None:
    plain = drawn(tmp_path / "plain.png", run(60, stage1=0))
    marked = drawn(tmp_path / "marked.png", run(60, stage1=20))
    changed = np.abs(plain - marked).max(axis=2) > 40
    height, width = changed.shape
    for rows in (slice(height // 2), slice(height // 2, None)):
        for columns in (slice(width // 2), slice(width // 2, None)):
            assert changed[rows, columns].sum(axis=0).max() > 50  # a dashed column of pixels
    assert np.array_equal(plain, drawn(tmp_path / "whole.png", run(60, stage1=60)))


@pytest.mark.parametrize(
    "history",
    [run(1), run(1, ema=False), run(2, stage1=1), run(200, others=("0.9",)), run(3)[1:]],
    ids=["one epoch", "one without EMA", "two stages of one", "long", "from epoch 2"],
)
def test_short_and_long_runs(tmp_path: Path, history: list[EpochRecord]) -> None:
    assert drawn(tmp_path / "curves.png", history).std() > 5


def test_odd_values_do_not_stop_the_picture(tmp_path: Path) -> None:
    """An average that stands still (decay 1), a rate of 0, an average that came late."""
    late, standing = run(4), [EpochRecord(e, 0.5, 0.5, 0.5, 0.0, 1.0, 1.0) for e in range(1, 4)]
    for history in (standing, [*run(2, ema=False), *late[2:]]):
        assert drawn(tmp_path / "curves.png", history).std() > 5

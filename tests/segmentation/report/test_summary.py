"""The summary and the pictures at the end of a run, and each epoch's line."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import torch
from PIL import Image
from rich.console import Console

from fastema.segmentation.console import progress
from fastema.segmentation.report.history import EpochRecord, write_csv
from fastema.segmentation.report.pictures import Example, write_predictions
from fastema.segmentation.report.summary import Comparison, print_summary
from fastema.segmentation.report.timers import Timers
from fastema.segmentation.train.messages import idle_experts, usage_line

BASE = [0.5, 0.6, 0.7, 0.8]


def record(epoch: int, iou: float, ema_iou: float | None) -> EpochRecord:
    return EpochRecord(epoch, 0.4938, iou, ema_iou, 0.0002, None if ema_iou is None else 0.99, 12.0)


def compared(ema: list[float], **changes: float) -> Comparison:
    values = {"updates": 1000, "window": 100, "updates_per_epoch": 50, "final_rate": 0.5, **changes}
    return Comparison(BASE, ema, **values)  # type: ignore[arg-type]


def test_the_line_of_an_epoch() -> None:
    assert record(3, 0.8704, 0.8731).line() == (
        "Epoch 3: Loss: 0.4938 | IoU: 0.8704 (base) | EMA IoU: 0.8731 | LR: 0.000200"
    )
    several = replace(record(3, 0.8704, 0.8731), other_ema_ious={"0.999": 0.8725, "0.9999": 0.71})
    assert several.line("0.99") == (
        "Epoch 3: Loss: 0.4938 | IoU: 0.8704 (base) | EMA IoU: 0.8731 (0.99), 0.8725 (0.999), 0.7100 (0.9999) | "
        "LR: 0.000200"
    )
    assert record(87, 0.635, None).line() == "Epoch 87: Loss: 0.4938 | IoU: 0.6350 | LR: 0.000200"


def test_history_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "history.csv", [record(1, 0.5, None)])
    write_csv(tmp_path / "history.csv", [record(1, 0.5, None), record(2, 0.6, 0.7)])
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [(row["epoch"], row["iou"], row["ema_iou"]) for row in rows] == [("1", "0.5", ""), ("2", "0.6", "0.7")]
    assert [file.name for file in tmp_path.iterdir()] == ["history.csv"]


def test_a_better_ema_is_said_to_be_better() -> None:
    verdict = compared([0.6, 0.7, 0.8, 0.9]).verdict()
    assert verdict == (
        "the EMA by 0.1000 IoU ± 0.0000 (last epoch, 4 validation images; another seed may differ by more). But 4 "
        "validation images cannot tell: give a larger --val-fraction, or evaluate on other images."
    )
    ten = Comparison([0.5] * 10, [0.6] * 10, updates=10, window=2, updates_per_epoch=5, final_rate=0.5)
    assert ten.verdict().endswith("may differ by more).")


def test_a_difference_within_the_noise_is_called_so() -> None:
    assert "within the noise" in compared([0.9, 0.2, 0.9, 0.7]).verdict()
    assert "within the noise" not in compared([0.61, 0.7, 0.8, 0.9]).verdict()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window": 1000, "updates": 180}, r"looks back over 1,000 updates \(20.0 epochs\) and there were only 180"),
        ({"final_rate": 0.01}, "learning rate was almost 0 at the end"),
        ({}, "if the base is still improving fast"),
    ],
)
def test_a_worse_ema_is_said_to_be_worse_with_a_likely_reason(changes: dict[str, float], reason: str) -> None:
    verdict = compared([0.4, 0.5, 0.6, 0.7], **changes).verdict()
    assert verdict.startswith("the base by 0.1000 IoU")
    assert re.search(reason, verdict)


def test_equal_and_single() -> None:
    assert compared(BASE).verdict().startswith("neither, base and EMA are equal")
    one = Comparison([0.5], [0.6], updates=10, window=2, updates_per_epoch=5, final_rate=0.5)
    assert "by 0.1000 IoU, which is within the noise (last epoch, 1 validation image;" in one.verdict()


def test_costs_are_medians() -> None:
    costs = Timers(step=[0.1, 0.2, 9.0], update=[100e-6, 400e-6, 200e-6], swap=[2e-6, 4e-3, 3e-6])
    assert costs.sentence() == (
        "ema.update() 200 µs, 0.10% of a training step of 200.0 ms; swap in and back 3 µs (medians of this run)"
    )
    assert "nothing to measure" in Timers().sentence()


def test_the_table(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    history = [record(1, 0.5, 0.4), record(2, 0.7, 0.65), record(3, 0.6, 0.66)]
    print_summary(console, history, compared(BASE), Timers(), [tmp_path / "last.pth"])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    assert rows == [["base", "0.7000", "2", "0.6000"], ["EMA", "0.6600", "3", "0.6600"]]
    assert "Better: neither, base and EMA are equal" in text
    assert (
        "Run:    the EMA was ahead in 1 of 3 epochs, at most by 0.0600 (epoch 3), behind at most by 0.1000 (epoch 1)"
    ) in " ".join(text.split("\n"))
    assert "last.pth in " in text


def test_the_table_of_several_averages(tmp_path: Path) -> None:
    """One of them started late."""
    console = Console(file=io.StringIO(), width=100)
    history = [
        replace(record(1, 0.5, 0.4), data_wait=0.5),
        replace(record(2, 0.7, 0.65), other_ema_ious={"0.999": 0.71}),
        replace(record(3, 0.6, 0.66), other_ema_ious={"0.999": 0.70}),
    ]
    print_summary(console, history, compared(BASE), Timers(), [tmp_path / "last.pth"], ["0.99", "0.999"])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    assert rows[1:] == [["EMA 0.99", "0.6600", "3", "0.6600"], ["EMA 0.999", "0.7100", "2", "0.7000"]]
    assert "Better: base or EMA 0.99? neither" in text
    assert "Data:   16.7% of the training time went by waiting for images" in text


def test_the_experts_in_a_line_and_those_that_idle() -> None:
    usage = [[0.5, 1.0, 0.0, 0.5], [0.9, 1.0, 0.005, 0.095]]
    names = ["texture", "edge", "contrast", "frequency"]
    assert usage_line(names, usage) == (
        "  Experts, share of images (mean of 2 levels): edge 100%, texture 70%, frequency 30%, contrast 0%"
    )
    assert idle_experts(names, usage) == ["contrast"], "one that a single level uses is not idle"


def test_the_table_without_an_ema(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    print_summary(console, [record(1, 0.5, None)], None, Timers(), [tmp_path / "last.pth"])
    assert "EMA" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_picture(tmp_path: Path) -> None:
    truth = torch.zeros(30, 40, dtype=torch.bool)
    truth[5:20, 5:20] = True
    example = Example("name", torch.rand(3, 16, 16), truth, {"base": truth, "EMA": ~truth})
    write_predictions(tmp_path / "p.png", [example, example])
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > picture.height > 300
        assert len(picture.convert("L").getcolors()) > 2


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastema.segmentation import console as progress_module

    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=100)
    with progress(console, "Epoch 1/2", 4) as advance:
        for seconds in (3.0, 9.0, 1.0, 60.0):
            now[0] += seconds
            advance("loss 0.5000")
    assert console.file.getvalue() == "  Epoch 1/2: 2/4 loss 0.5000\n"  # type: ignore[attr-defined]


def test_a_live_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress(console, "Epoch 1/2", 4) as advance:
        for _ in range(4):
            advance("loss 0.5000")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Epoch 1/2" in text
    assert "4/4" in text

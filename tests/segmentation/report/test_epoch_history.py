"""A run's history: the line, the file that grows by a row an epoch, the log for TensorBoard."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fastema import cli
from fastema.advisor.history_files import read_history
from fastema.segmentation.report import history as history_module
from fastema.segmentation.report.history import EpochRecord, TensorBoardLog, append_csv, write_csv


def record(epoch: int, ema: bool = True, **changes: Any) -> EpochRecord:
    values: dict[str, Any] = {
        "epoch": epoch,
        "loss": 1 / epoch,
        "iou": 0.7 - 0.3 / epoch,
        "ema_iou": 0.71 - 0.3 / epoch if ema else None,
        "lr": 2e-4,
        "ema_decay": 0.99 if ema else None,
        "seconds": 12.5,
        **changes,
    }
    return EpochRecord(**values)


def several(epoch: int) -> EpochRecord:
    """With everything that a record can have."""
    return record(
        epoch,
        stage=1 if epoch < 3 else 2,
        data_wait=0.25,
        other_ema_ious={"0.9": 0.6, "0.9999": 0.1},
        other_ema_decays={"0.9": 0.9, "0.9999": 0.95},
        expert_usage=((0.5, 1.0, 0.5), (1.0, 0.25, 0.75)),
    )


def epochs_in(path: Path) -> list[str]:
    return [row["epoch"] for row in csv.DictReader(path.open())]


# --- the record -------------------------------------------------------------------------------------------------------


def test_the_line_with_several_averages() -> None:
    assert several(2).line("0.99") == (
        "Epoch 2: Loss: 0.5000 | IoU: 0.5500 (base) | EMA IoU: 0.5600 (0.99), 0.6000 (0.9), 0.1000 (0.9999) | "
        "LR: 0.000200"
    )


def test_a_record_survives_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"history": [asdict(several(2))]}, tmp_path / "c.pth")
    (stored,) = torch.load(tmp_path / "c.pth", weights_only=True)["history"]
    assert EpochRecord(**stored) == several(2)


def test_a_record_of_an_older_version_can_be_read() -> None:
    old = {"epoch": 3, "loss": 0.4, "iou": 0.6, "ema_iou": None, "lr": 1e-3, "ema_decay": None, "seconds": 9.0}
    again = EpochRecord(**old)
    assert (again.stage, again.data_wait, again.other_ema_ious, again.expert_usage) == (2, 0.0, {}, ())
    assert again.row()["epoch"] == 3


# --- history.csv ------------------------------------------------------------------------------------------------------


def test_every_epoch_appends_its_row_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.csv"
    run = [several(epoch) for epoch in range(1, 6)]
    append_csv(path, run[:1])
    inode, before = path.stat().st_ino, path.read_text()
    monkeypatch.setattr(history_module, "write_csv", lambda *_: pytest.fail("the file was written anew"))
    for done in range(2, 6):
        append_csv(path, run[:done])
        assert path.stat().st_ino == inode
        assert path.read_text().startswith(before)
        before = path.read_text()
    assert before.count("epoch,loss,iou,ema_iou,") == 1
    assert epochs_in(path) == ["1", "2", "3", "4", "5"]
    assert len(before.splitlines()) == 6


def test_after_a_resume_no_later_epoch_is_left(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    write_csv(path, [record(epoch) for epoch in range(1, 8)])
    # Resumed from epoch 3, with another outcome of epoch 4.
    append_csv(path, [*(record(epoch) for epoch in range(1, 4)), record(4, loss=9.0)])
    assert epochs_in(path) == ["1", "2", "3", "4"]
    assert read_history(path).column("loss")[-1] == 9.0
    assert [file.name for file in tmp_path.iterdir()] == ["history.csv"]


def test_a_row_that_was_cut_off_can_be_read_and_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    run = [record(epoch) for epoch in range(1, 6)]
    write_csv(path, run[:4])
    whole = path.read_text()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_text(whole[:-cut])
        assert read_history(path).column("epoch")[:3] == [1, 2, 3]
        append_csv(path, run)
        assert epochs_in(path) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("there", [None, b"", b"epoch,loss\n", b"\xff\xfe\x00 not text", b"epoch,iou\n1,0.3\n"])
def test_whatever_is_there_the_file_says_what_the_history_says(tmp_path: Path, there: bytes | None) -> None:
    path = tmp_path / "history.csv"
    if there is not None:
        path.write_bytes(there)
    append_csv(path, [record(1), record(2)])
    assert epochs_in(path) == ["1", "2"]


def test_an_average_that_starts_late_gets_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    run = [record(1, ema=False), record(2, ema=False), several(3)]
    for done in range(1, 4):
        append_csv(path, run[:done])
    seen = read_history(path)
    assert seen.column("ema_iou") == [None, None, pytest.approx(0.61)]
    assert seen.column("ema_iou_0.9999") == [None, None, 0.1]
    assert seen.column("ema_decay_0.9") == [None, None, 0.9]
    assert path.read_text().partition("\n")[0].split(",")[3:6] == ["ema_iou", "ema_iou_0.9", "ema_iou_0.9999"]


def test_experts_are_one_compact_cell(tmp_path: Path) -> None:
    write_csv(tmp_path / "history.csv", [several(1)])
    (row,) = csv.DictReader((tmp_path / "history.csv").open())
    assert row["expert_usage"] == "0.500 1.000 0.500;1.000 0.250 0.750"
    assert (row["stage"], row["data_wait"], row["seconds"]) == ("1", "0.25", "12.5")


def test_a_disk_that_is_full_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.csv"
    write_csv(path, [record(1)])
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_csv(path, [record(1), record(2)])
    assert path.read_text() == before


def test_the_advisor_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "history.csv"
    for done in range(1, 21):
        append_csv(path, [several(epoch) for epoch in range(1, done + 1)])
    assert cli.main(["advise", "--history", str(path), "--decay", "0.99", "--updates-per-epoch", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert cli.main(["advise", "--history", str(path), "--ema-metric", "ema_iou_0.9999", "--decay", "0.9999",
                     "--updates-per-epoch", "50", "--json"]) == 0  # fmt: skip
    assert '"findings": []' not in capsys.readouterr().out


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    log = TensorBoardLog(tmp_path / "log")
    assert log.note == f"TensorBoard: tensorboard --logdir {tmp_path / 'log'}"
    for epoch in (1, 2):
        log.record(several(epoch))
    seen = read_history(tmp_path / "log")  # readable before it is closed: a kill loses no epoch
    assert seen.column("iou/base") == pytest.approx([0.4, 0.55])
    assert seen.column("iou/ema_0.9999") == pytest.approx([0.1, 0.1])
    assert seen.column("experts/level1_expert2") == pytest.approx([0.75, 0.75])
    assert set(seen.columns) >= {"loss", "iou/ema", "ema/decay", "learning_rate", "time/data_wait", "stage"}
    log.close()


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    first = TensorBoardLog(tmp_path)
    for epoch in (1, 2, 3):
        first.record(record(epoch, ema=False))
    first.close()
    resumed = TensorBoardLog(tmp_path, first_epoch=3)
    for epoch in (3, 4):
        resumed.record(record(epoch, ema=False, loss=9.0))
    resumed.close()
    seen = read_history(tmp_path)
    assert seen.column("loss") == pytest.approx([1.0, 0.5, 9.0, 9.0])
    assert "iou/ema" not in seen.columns


def test_without_tensorboard_there_is_one_line_and_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = TensorBoardLog(tmp_path / "log")
    log.record(record(1))
    log.close()
    assert log.note.startswith("TensorBoard: not installed")
    assert not (tmp_path / "log").exists()

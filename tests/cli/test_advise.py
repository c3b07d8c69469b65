"""`fastema advise` pages, JSON, pictures, and one line for an error."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from fastema import cli
from fastema.advisor.history_files import mode_of, read_history
from fastema.segmentation.report.history import EpochRecord, write_csv
from fastema.segmentation.train_extra import missing_packages

needs_train = pytest.mark.skipif(bool(missing_packages()), reason="the train extra is not installed")

BASE = [0.50 + 0.01 * epoch for epoch in range(20)]
OTHER = [value + 0.001 for value in BASE]
RUN = ["--epochs", "120", "--images", "3040", "--batch-size", "1", "--accumulation-steps", "4"]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["advise", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastema: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["advise", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def history(folder: Path, base: list[float], ema: list[float | None]) -> Path:
    """Return a history as `fastema train` writes it."""
    file = folder / "history.csv"
    records = [
        EpochRecord(i, 1.0 / i, b, e, 1e-3, 0.999, 1.0) for i, (b, e) in enumerate(zip(base, ema, strict=True), 1)
    ]
    write_csv(file, records)
    return file


def test_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["advise", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--history", "--metric", "--mode", "--epochs", "--images", "--json", "--plot", "--drop-last"):
        assert flag in text


def test_a_page_before_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", *RUN]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Use it? Yes." in text
    assert 'Settings decay 0.999, decay_type "threshold", from the first step' in text
    assert "Look from epoch 2 on" in text
    assert "Expect The learning rate stays high to the end" in text
    assert "999 updates (1.31 epochs, 1.1% of the run) old" in text
    assert "91,200 updates (120 epochs of 760)" in text
    assert "looks back" not in text  # said of a decay that is given
    assert cli.main(["advise", *RUN, "--lr-schedule", "cosine", "--decay", "0.99"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Use it? You may" in text
    assert "the learning rate falls to 0 from there" in text
    assert "Decay 0.99 (threshold) looks back over 100 updates" in text


def test_json_before_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, *RUN)
    assert found["updates_per_epoch"] == 760
    assert found["recommendation"]["decay"] == 0.999
    assert found["recommendation"]["outlook"]["case"] == "much"
    assert found["recommendation"]["outlook"]["use"] == "Yes."
    assert found["recommendation"]["outlook"]["ratio"] == 1
    assert json_of(capsys, *RUN, "--decay", "1")["window"]["updates"] is None  # infinite
    found = json_of(capsys, *RUN, "--lr-schedule", "wsd", "--recipe-decay", "0.9999", "--recipe-batch-size", "2")
    assert found["recommendation"]["decay"] == pytest.approx(0.9999**2)
    assert found["recommendation"]["outlook"]["case"] == "little"
    assert found["recommendation"]["outlook"]["ratio"] is None  # infinite


def test_the_schedules_are_the_advisors() -> None:
    from fastema.advisor.outlook import LR_SCHEDULES
    from fastema.cli import advise

    assert tuple(LR_SCHEDULES) == advise.LR_SCHEDULES


@needs_train
def test_a_page_for_a_history_with_an_average(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = history(tmp_path, BASE, [value - 0.05 for value in BASE])
    picture = tmp_path / "advice.png"
    flags = ["--history", str(file), "--decay", "0.999", "--updates-per-epoch", "200", "--plot", str(picture)]
    flags += ["--decay-type", "constant"]
    assert cli.main(["advise", *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "iou, 20 epochs, more is better; its average: ema_iou" in text
    assert "Use it? Not with this decay: the average lags behind. Why The average looks back 5 epochs" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_history_without_an_average(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json_of(capsys, "--history", str(history(tmp_path, [0.6712, 0.6823, 0.6912], [None] * 3)))
    assert (found["start"]["action"], found["start"]["pattern"]) == ("start", "improving")
    assert found["findings"] == []


def test_what_is_missing_for_a_diagnosis_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json_of(capsys, "--history", str(history(tmp_path, BASE, OTHER)), "--decay", "0.99")
    assert "With --updates-per-epoch" in found["notes"][0]


def test_the_start_of_a_late_average_is_seen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ema = [None] * 18 + [value - 0.1 for value in BASE[18:]]
    flags = ["--history", str(history(tmp_path, BASE, ema)), "--decay", "0.999", "--updates-per-epoch", "200"]
    flags += ["--decay-type", "constant"]
    finding = json_of(capsys, *flags)["findings"][0]
    assert finding["kind"] == "too early"
    assert finding["evidence"]["updates"] == 400
    assert json_of(capsys, *flags, "--started-at", "10")["findings"][0]["evidence"]["updates"] == 2000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", '[{"val_loss": 0.9}, {"val_loss": 0.7}, {"val_loss": 0.55}]'),
        ("lists.json", '{"val_loss": [0.9, 0.7, 0.55]}'),
        ("lines.jsonl", '{"val_loss": 0.9}\n{"val_loss": 0.7}\n{"val_loss": 0.55}\n'),
        ("log.csv", "\ufeffepoch, val_loss\n1,0.9\n2,0.7\n3,0.55\n"),
    ],
)
def test_any_table_of_numbers(name: str, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    found = json_of(capsys, "--history", str(file), "--metric", "val_loss")
    assert found["mode"] == "min"
    assert found["base"] == [0.9, 0.7, 0.55]
    assert found["start"]["action"] == "start"
    assert (
        json_of(capsys, "--history", str(file), "--metric", "val_loss", "--mode", "max")["start"]["action"] != "start"
    )


def test_tensorboards_csv(tmp_path: Path) -> None:
    file = tmp_path / "run.csv"
    file.write_text("Wall time,Step,Value\n1.7e9,1,0.5\n1.7e9,2,0.6\n")
    assert read_history(file).whole_column("Value") == [0.5, 0.6]


LIGHTNING = """epoch,step,train_loss,val_ema_loss,val_loss
0,4,1.5,,
0,9,,0.95,
0,9,,,0.9
1,14,1.2,,
1,19,,0.75,
1,19,,,0.7
2,29,,0.6,
2,29,,,0.55
"""
HUGGING_FACE = """{"best_metric": null, "log_history": [
 {"epoch": 0.5, "step": 5, "loss": 1.5}, {"epoch": 1.0, "step": 10, "eval_ema_loss": 0.95},
 {"epoch": 1.0, "step": 10, "eval_loss": 0.9, "eval_runtime": 0.1}, {"epoch": 1.5, "step": 15, "loss": 1.2},
 {"epoch": 2.0, "step": 20, "eval_ema_loss": 0.75}, {"epoch": 2.0, "step": 20, "eval_loss": 0.7},
 {"epoch": 3.0, "step": 30, "eval_ema_loss": 0.6}, {"epoch": 3.0, "step": 30, "eval_loss": 0.55}]}"""


@pytest.mark.parametrize(
    "text",
    [
        LIGHTNING,
        HUGGING_FACE,
        "epoch;val_loss;val_ema_loss\n1;0,9;0,95\n2;0,7;0,75\n3;0,55;0,6\n",
        "epoch\tval/loss\tval_ema/loss\n1\t0.9\t0.95\n2\t0.7\t0.75\n3\t0.55\t0.6\n",
        "epoch,acc_error,val_ema_acc_error\n1,0.9,0.95\n2,0.7,0.75\n3,0.55,0.6\n",
    ],
    ids=["metrics.csv", "trainer_state.json", "semicolons", "tabs", "another name"],
)
def test_logs_of_trainers_are_read_and_the_average_is_found(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "log"
    file.write_text(text)
    found = json_of(capsys, "--history", str(file))
    assert found["mode"] == "min"
    assert found["base"] == [0.9, 0.7, 0.55]
    assert found["ema"] == [0.95, 0.75, 0.6]


def test_of_several_metrics_the_main_one_is_judged_and_the_others_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "log.csv"
    file.write_text("val_loss,val_ema_loss,val_acc,val_ema_acc\n1,2,3,4\n")
    found = json_of(capsys, "--history", str(file))
    assert (found["metric"], found["base"], found["ema"], found["others"]) == ("val_acc", [3], [4], ["val_loss"])
    assert json_of(capsys, "--history", str(file), "--metric", "val_loss")["ema"] == [2]


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("", [], "is empty"),
        ("\n \n", [], "is empty"),
        ("epoch,iou\n", [], "holds no metric"),
        ("epoch,foo,bar\n1,0.5,2\n", [], "Give --metric: foo, bar"),
        ("epoch,val_foo\n1,0.5\n", [], "is more or less of 'val_foo' better? Give --mode max or --mode min"),
        ("epoch,iou\n1,0.5\n", ["--metric", "dice"], "has no column 'dice'; it has epoch, iou"),
        ("epoch,iou\n1,nan\n2,nan\n", ["--metric", "iou"], "column 'iou' has no finite number"),
        ("epoch,iou\n1,0.5\n2,0.6\n", ["--ema-metric", "x"], "has no column 'x'; it has epoch, iou"),
        ("epoch,iou\n1,0.5\n2,0.6\n", ["--decay", "1.5"], "decay must be in [0, 1], got 1.5"),
        (
            "iou,ema_iou\n1,1\n2,3\n",
            ["--decay", "0.9", "--updates-per-epoch", "5", "--started-at", "2"],
            "0 to 1, got 2",
        ),
        ("iou\n1\n", ["--updates-per-epoch", "0"], "updates_per_epoch must be a positive number"),
        ("iou\n1\n", ["--decay", "0.9", "--decay-type", "no", "--images", "9"], "unknown decay_type 'no'"),
        ("{nonsense", [], "neither JSON nor JSON Lines"),
        ("[1, 2]", [], "must be a list of objects"),
    ],
)
def test_bad_histories_are_one_line(
    text: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "history"
    file.write_text(text)
    assert message in error_of(capsys, "--json", "--history", str(file), *flags)


def test_one_epoch_is_too_short_and_no_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert json_of(capsys, "--history", str(history(tmp_path, [0.5], [None])))["start"]["pattern"] == "too short"


def test_what_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "No such file" in error_of(capsys, "--json", "--history", str(tmp_path / "none.csv"))
    binary = tmp_path / "history.csv"
    binary.write_bytes(b"\x18\xff\x00\xfe")
    assert "is not a text file" in error_of(capsys, "--json", "--history", str(binary))


def test_tensorboards_event_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Read the file and its folder; the metric may be logged at other steps than the rest."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    values = [0.6712, 0.6823, 0.6912]
    with SummaryWriter(str(tmp_path / "log")) as writer:
        for epoch, value in enumerate(values):
            writer.add_scalar("val/iou", value, 10 * epoch)
            writer.add_scalar("train/loss", 1.0, 10 * epoch + 3)
    for path in (tmp_path / "log", next((tmp_path / "log").iterdir())):
        found = json_of(capsys, "--history", str(path), "--metric", "val/iou")
        assert found["start"]["action"] == "start"
    assert "it has" in error_of(capsys, "--json", "--history", str(tmp_path / "log"), "--metric", "val/iuo")


def test_a_tensorboard_log_without_its_package_or_without_scalars(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "events.out.tfevents.1"
    events.write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
        assert "pip install tensorboard" in error_of(capsys, "--json", "--history", str(events))
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert "has no scalar in it" in error_of(capsys, "--json", "--history", str(events))


def test_too_little_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --history FILE, or --epochs" in error_of(capsys)
    assert "--epochs needs --images" in error_of(capsys, "--json", "--epochs", "3")
    assert "give both" in error_of(capsys, "--json", *RUN, "--recipe-batch-size", "2")
    assert "--plot draws a history" in error_of(capsys, "--epochs", "3", "--images", "9", "--plot", "x.png")
    assert "no optimizer step" in error_of(
        capsys, "--json", "--epochs", "3", "--images", "9", "--batch-size", "10", "--drop-last"
    )


@needs_train
def test_a_picture_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = history(tmp_path, [0.5, 0.6, 0.7], [None] * 3)
    assert "there is no folder" in error_of(capsys, "--history", str(file), "--plot", str(tmp_path / "no" / "a.png"))
    assert cli.main(["advise", "--json", "--history", str(file), "--plot", str(tmp_path / "a.unknown")]) == 2
    assert "a.unknown" in capsys.readouterr().err


def test_which_way_is_better() -> None:
    for name in ("loss", "val/loss", "eval-loss", "test_MAE", "train.err"):
        assert mode_of(name) == "min", name
    for name in ("iou", "accuracy", "AUC"):
        assert mode_of(name) == "max", name
    for name in ("glossary", "Value"):
        with pytest.raises(ValueError, match="--mode"):
            mode_of(name)


def test_a_recommendation_is_not_taken_for_the_decay_of_a_history(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The average's decay is not given."""
    file = history(tmp_path, BASE, OTHER)
    found = json_of(capsys, *RUN, "--history", str(file))
    assert "initial_share" not in found["findings"][0]["evidence"]
    assert "--decay" in found["notes"][0]
    assert math.isclose(found["recommendation"]["decay"], 0.999)

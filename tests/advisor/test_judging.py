"""Whole logs, and what a good engineer says of them; the guide's blocks with their own numbers among them."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest

from advisor.log_writers import FORMATS
from fastema import cli
from fastema.advisor import should_start
from fastema.advisor.clock import Clock
from fastema.advisor.outlook import schedule_of


def advise(capsys: pytest.CaptureFixture[str], folder: Path, text: str, *flags: str, name: str = "log.txt") -> dict:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    assert cli.main(["advise", "--json", "--history", str(file), *flags]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


GUIDE = {
    "phase 1": (
        "Epoch 87: Loss: 0.2341 | IoU: 0.6350 | LR: 0.000200\nEpoch 95: Loss: 0.2245 | IoU: 0.6534 | LR: 0.000180\n"
        "Epoch 103: Loss: 0.2167 | IoU: 0.6712 | LR: 0.000150\n",
        "improving",
        "Yes",
    ),
    "phase 2": (
        "Epoch 110: IoU: 0.6912\n\nEpoch 115: IoU: 0.6912 (base) | EMA IoU: 0.6925\n"
        "Epoch 120: IoU: 0.6934 (base) | EMA IoU: 0.6958\nEpoch 130: IoU: 0.6956 (base) | EMA IoU: 0.6989\n"
        "Epoch 140: IoU: 0.6978 (base) | EMA IoU: 0.7012\n",
        "fine",
        "Yes",
    ),
    "unstable": (
        "Epoch 85: IoU: 0.6234\nEpoch 86: IoU: 0.5987\nEpoch 87: IoU: 0.6123\nEpoch 88: IoU: 0.5856\n",
        "unstable",
        "Not yet: fix",
    ),
    "hyperparameters": ("Epoch 30: IoU: 0.1136 (collapsed from 0.5480)\n", "collapse", "Not yet: fix"),
    "plateau": ("Epoch 86: IoU: 0.6221 (stuck for 17 epochs)\n", "plateau", "Not yet"),
    "improving": ("Epoch 100: IoU: 0.6712\nEpoch 105: IoU: 0.6823\nEpoch 110: IoU: 0.6912\n", "improving", "Yes"),
    "a good baseline": ("Epoch 110: IoU: 0.70 (target was 0.72)\n", "too short", "Yes"),
    "oscillation": ("Validation IoU oscillates between 0.68-0.71\n", "oscillation", "Yes"),
    "success": (
        "Epoch 100: Base IoU: 0.6823 | EMA IoU: 0.6823 (same initially)\nEpoch 110: Base IoU: 0.6912 | EMA IoU: 0.6934 "
        "(+0.002)\nEpoch 120: Base IoU: 0.6978 | EMA IoU: 0.7012 (+0.003)\n"
        "Epoch 130: Base IoU: 0.7045 | EMA IoU: 0.7089 (+0.004)\n",
        "fine",
        "Yes",
    ),
    "failure": (
        "Epoch 30: Base IoU: 0.1136 | EMA IoU: 0.0856\nEpoch 40: Base IoU: 0.0567 | EMA IoU: 0.0234\n"
        "Epoch 50: Base IoU: 0.0000 | EMA IoU: 0.0000 (total collapse)\n",
        "collapse",
        "Not yet: fix",
    ),
    "problem 1": ("Epoch 100: Base IoU: 0.6823 | EMA IoU: 0.6512\n", "behind", "Not yet"),
    "problem 2": ("Epoch 120: Base IoU: 0.7045 | EMA IoU: 0.7048 (+0.0003)\n", "marginal", "As you like"),
    "problem 3": (
        "Epoch 110: Base IoU: 0.6912 | EMA IoU: 0.6523 (way behind)\n"
        "Epoch 120: Base IoU: 0.7045 | EMA IoU: 0.6678 (still behind)\n",
        "lags",
        "Not with this decay",
    ),
}


@pytest.mark.parametrize("name", GUIDE)
def test_the_guides_blocks(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, kind, use = GUIDE[name]
    found = advise(capsys, tmp_path, f"```\n{text}```\n")
    assert found["verdict"]["kind"] == kind
    assert found["verdict"]["use"].startswith(use)
    if name == "failure":
        assert "epoch 40" in found["verdict"]["why"][0]
    if name in ("problem 1", "problem 3"):
        assert "smaller decay" in found["verdict"]["next_step"]


def wobble(values: list[float], size: float, seed: int = 0) -> list[float]:
    dice = random.Random(seed)
    return [value + dice.gauss(0, size) for value in values]


RISE = [0.3 + 0.4 * (1 - math.exp(-epoch / 8)) for epoch in range(20)]
SHAPES = {
    "improving": (wobble(RISE, 0.002), "Yes"),
    "plateau": ([*RISE[:12], *wobble([0.65] * 17, 0.001)], "Not yet: it would"),
    "oscillation": ([*RISE[:12], *wobble([0.65] * 17, 0.02)], "Yes"),
    "overfitted": ([*RISE[:12], *wobble([0.62 - 0.004 * i for i in range(20)], 0.003)], "No: stop"),
    "collapse": ([*RISE[:12], 0.1, 0.09, 0.1, 0.09], "Not yet: fix"),
    "not learning": (wobble([0.1] * 12, 0.003), "Not yet: fix"),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.average is None])
def test_every_format_is_judged_alike(
    name: str, shape: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kind, (values, use) = FORMATS[name], SHAPES[shape]
    if name == "Megatron":  # less is better there
        values = [1 - value for value in values]
    found = advise(capsys, tmp_path, kind.write(values, values), name=kind.file)
    # Without epochs a log may begin in mid-run, and of a loss nothing is known to be a guess.
    if shape == "not learning" and (found["clock"]["unit"] != "epoch" or found["mode"] == "min"):
        assert found["verdict"]["kind"] in ("oscillation", "plateau")
        return
    assert found["verdict"]["kind"] == shape
    if name != "ultralytics":
        assert found["verdict"]["use"].startswith(use)
    elif use.startswith("Yes") or shape == "plateau":
        assert found["verdict"]["use"] == "It is in use."


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.average is not None])
@pytest.mark.parametrize(("gain", "kind"), [(0.02, "fine"), (-0.1, "lags"), (0.0, "marginal")])
def test_every_format_with_an_average_is_judged_alike(
    name: str, gain: float, kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    steady = [0.3 + 0.02 * i for i in range(16)]
    ema = wobble([value + gain for value in steady], 0.0005, seed=1)
    found = advise(capsys, tmp_path, FORMATS[name].write(wobble(steady, 0.0005), ema), name=FORMATS[name].file)
    assert found["verdict"]["kind"] == kind


# --- the newcomer's logs ----------------------------------------------------------------------------------------------


def test_a_run_past_its_best_is_told_to_stop_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    losses = [5.7, 1.11, 1.13, 1.35, 1.55, 1.6, 1.85, 1.9, 2.0, 2.15, 2.3, 2.4, 2.6, 2.5, 2.7, 2.5, 2.65, 2.6, 2.7, 2.5]
    rows = [f"{epoch},{loss}" for epoch, loss in enumerate(losses, 1)]
    verdict = advise(capsys, tmp_path, "\n".join(["epoch,val_loss", *rows]))["verdict"]
    assert verdict["kind"] == "overfitted"
    assert "best in epoch 2, at 1.11, and since then it is worse by 1.4" in verdict["why"][0]
    # Nor does a score that swings say otherwise.
    rows = [f"{epoch},{loss},{0.6 + 0.01 * (-1) ** epoch}" for epoch, loss in enumerate(losses, 1)]
    verdict = advise(capsys, tmp_path, "\n".join(["epoch,val_loss,val_acc", *rows]))["verdict"]
    assert verdict["use"] == "No: stop this run."
    assert "val_loss it was best in epoch 2" in verdict["why"][0]


def test_a_long_plateau_is_no_oscillation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [f"{e},{0.62 - 0.3 * 0.9**e if e < 69 else 0.6215 + 0.0015 * ((e * 7) % 3 - 1):.4f}" for e in range(1, 87)]
    verdict = advise(capsys, tmp_path, "\n".join(["epoch,iou", *rows]))["verdict"]
    assert verdict["kind"] == "plateau"


def test_a_run_that_was_best_early_is_told_when(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    losses = [0.52, 0.5, 0.55, 0.62, 0.7, 0.78, 0.85, 0.92, 1.0, 1.05]
    rows = [f"{epoch},{loss}" for epoch, loss in enumerate(losses, 1)]
    verdict = advise(capsys, tmp_path, "\n".join(["epoch,val_loss", *rows]))["verdict"]
    assert verdict["kind"] == "declining"
    assert verdict["why"][1] == "It was best in epoch 2, at 0.5; now it is at 1.05."


def test_what_is_said_of_the_last_value_and_of_a_plateau() -> None:
    fallen = [0.6, 0.65, 0.66, 0.67, 0.67, 0.67, 0.2]
    assert should_start(fallen).reason == "it went from 0.67 to 0.2 in epoch 7"
    assert should_start([*fallen, 0.2]).reason.endswith("in epoch 7 and stayed there")
    # Of a plateau whose last two values are a little off it is not said that it has lasted for none.
    still = should_start([*(0.85 - 0.5 * 0.8**e for e in range(30)), *[0.85] * 8, 0.862, 0.862])
    assert (still.pattern, still.evidence["held"]) == ("plateau", 10)


def test_a_run_that_is_over_is_told_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [f"{e},{0.8 - 0.5 * 0.9**e + 0.002 * (-1) ** e:.4f},{0.01 * (1 - e / 60):.6f}" for e in range(1, 61)]
    text = "\n".join(["epoch,iou,lr", *rows])
    found = advise(capsys, tmp_path, text, "--epochs", "60", "--updates-per-epoch", "50")
    assert found["verdict"]["use"] == "Too late for this run: it is over."
    assert found["recommendation"]["outlook"]["case"] == "little"  # by the file's own rate
    rows = [f"{e},{v:.4f},{0.01 if e < 40 else 0.001}" for e, v in enumerate([*RISE, *wobble([0.68] * 40, 0.001)], 1)]
    verdict = advise(capsys, tmp_path, "\n".join(["epoch,iou,lr", *rows]))["verdict"]
    assert verdict["use"] == "Not for this run: it is done."
    assert "lowered to 0.1 of its highest" in verdict["why"][1]


def test_the_schedule_of_a_history() -> None:
    rates = [0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(41)]
    name, end = schedule_of(rates, done=0.4)
    assert (name, end <= 0.01) == ("cosine", True)
    assert schedule_of([0.1] * 30, done=1.0) == ("constant", 0.0)


def test_the_lag_follows_the_files_own_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Twenty evaluations in two epochs of 1,000 steps; the average is that of decay 0.999."""
    average = 0.0
    rows = []
    for step in range(1, 2001):
        decay = min(0.999, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * step
        if step % 100 == 0:
            base, ema = (0.5 + 0.4 * (1 - math.exp(-at / 1500)) for at in (step, average))
            rows.append({"epoch": step / 1000, "step": step, "eval_acc": base, "eval_ema_acc": ema})
    flags = ("--decay", "0.999", "--updates-per-epoch", "1000")
    for more in (flags, flags[:2]):
        found = advise(capsys, tmp_path, json.dumps({"log_history": rows}), *more)
        assert found["length"] == "20 evaluations in 2 epochs"
        assert found["findings"][0]["kind"] == "lags"
        assert found["updates_per_epoch"] == pytest.approx(1000)


def test_the_epoch_that_an_average_reflects(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text("epoch,iou,ema_iou\n" + "".join(f"{e},0.{e},0.{e}\n" for e in range(70, 87)))
    flags = ["--decay", "0.9999", "--decay-type", "constant", "--updates-per-epoch", "400"]
    assert cli.main(["advise", "--history", str(file), "--ema-metric", "ema_iou", *flags]) == 0
    assert "at epoch 86 it reflects epoch 61" in " ".join(capsys.readouterr().out.split())


def test_metrics_that_are_an_averages_already(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kind = FORMATS["RF-DETR"]
    found = advise(capsys, tmp_path, kind.write(RISE, RISE), name=kind.file)
    assert found["verdict"]["use"] == "It is in use."
    assert "both are the average's" in found["verdict"]["why"][0]


def test_a_metric_that_became_nan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [f"{e},{'nan' if e > 15 else RISE[e]}" for e in range(20)]
    verdict = advise(capsys, tmp_path, "\n".join(["epoch,val_iou", *rows]))["verdict"]
    assert (verdict["kind"], verdict["use"]) == ("collapse", "Not yet: fix the training first.")


def test_one_verdict_on_the_page_without_the_trainers_packages(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rich", "matplotlib", "timm", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)
    file = tmp_path / "log.txt"
    file.write_text(GUIDE["unstable"][0])
    flags = ["--epochs", "100", "--updates-per-epoch", "400"]
    assert cli.main(["advise", "--history", str(file), *flags]) == 0
    text = capsys.readouterr().out
    assert text.count("Use it?") == 1
    assert "Use it?   Not yet: fix the training first." in text


def test_collapse_is_named_by_the_logs_own_epoch() -> None:
    advice = should_start([0.1136, 0.0567, 0.0], clock=Clock([30, 40, 50]))
    assert "in epoch 40" in advice.reason

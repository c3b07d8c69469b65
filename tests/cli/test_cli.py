"""The `fastema` command help, one line for an error, exit statuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastema
from fastema import backends, cli
from fastema.segmentation import train_extra
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.train_extra import missing_packages

needs_train = pytest.mark.skipif(bool(missing_packages()), reason="the train extra is not installed")
NUCLEI = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "nuclei-dsb2018"
FLAGS = (
    "--dataset-path --checkpoint-dir --backbone --img-size --batch-size --epochs --lr --min-lr --weight-decay "
    "--warmup-epochs --accumulation-steps --num-workers --seed --val-fraction --use-ema --ema-decay "
    "--ema-decay-type --ema-start --resume-from --device --no-pretrained"
)
TINY = [
    "--backbone",
    "mobilenetv3_small_050",
    "--no-pretrained",
    "--num-experts",
    "2",
    "--img-size",
    "64",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures at the end of a run, which take a second."""
    if not missing_packages():
        from fastema.segmentation.train import trainer

        monkeypatch.setattr(trainer, "write_curves", lambda *_: None)
        monkeypatch.setattr(trainer, "write_predictions", lambda *_: None)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with a user's error; return its message."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastema: error: ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("command", ["", "train", "distill", "evaluate", "predict", "advise", "posthoc", "info"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert "usage: fastema" in capsys.readouterr().out


def test_train_help_shows_every_option_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for flag in FLAGS.split():
        assert flag in text
    assert "(default: 0.999)" in " ".join(text.split())


def test_a_wrong_flag_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--dataset-path", "x", "--checkpoint-dir", "y", "--epochs", "many"])
    assert caught.value.code == 2
    assert "argument --epochs: invalid int value: 'many'" in capsys.readouterr().err


def test_the_command_starts_without_the_heavy_packages() -> None:
    code = (
        "import sys, fastema.cli\n"
        "heavy = {'timm', 'torchvision', 'matplotlib', 'rich', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"fastema  {fastema.__version__}" in text
    assert "torch    " in text
    for backend in backends.report():
        state = "usable" if backend.usable else "not usable"
        assert re.search(rf"^  {re.escape(backend.name)} +{state}: {re.escape(backend.detail)}$", text, re.MULTILINE)

    broken = SimpleNamespace(name="native", usable=False, detail="fastema._C was not built: no compiler")
    monkeypatch.setattr(backends, "report", lambda: [broken])
    assert cli.main(["info"]) == 0
    assert "native  not usable: fastema._C was not built: no compiler" in capsys.readouterr().out


def test_a_missing_extra_names_the_command_that_helps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(train_extra._NEEDED, "a_module_that_is_not_there", "some-package")
    message = error_of(capsys, "train", "--dataset-path", "x", "--checkpoint-dir", str(tmp_path / "run"))
    assert "some-package not installed: pip install 'fastema[train]'" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_interrupt_leaves_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.train, "run", interrupted)
    assert cli.main(["train", "--dataset-path", "x", "--checkpoint-dir", "y"]) == 130
    assert capsys.readouterr().err == "fastema: interrupted\n"


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(cli.train, "run", broken)
    with pytest.raises(KeyError):
        cli.main(["train", "--dataset-path", "x", "--checkpoint-dir", "y"])


@needs_train
def test_errors_of_the_user(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = ["train", "--checkpoint-dir", str(tmp_path / "run"), *TINY, "--dataset-path"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert "no data set at" in error_of(capsys, *run, str(tmp_path / "gone"))
    assert "is not a data set that is understood" in error_of(capsys, *run, str(tmp_path / "empty"))
    assert "--ema-decay must be in [0, 1], got 2.0" in error_of(capsys, *run, "x", "--ema-decay", "2")
    assert "one of constant, debiased, exp" in error_of(capsys, *run, "x", "--ema-decay-type", "cosine")
    blocked = ["train", "--dataset-path", "x", "--checkpoint-dir", str(tmp_path / "file" / "run")]
    assert "Not a directory" in error_of(capsys, *blocked)


@needs_train
def test_a_whole_training(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_synthetic_set(monkeypatch)
    run = ["train", "--dataset-path", "synthetic", "--checkpoint-dir", str(tmp_path / "run"), *TINY, "--use-ema"]
    assert cli.main([*run, "--epochs", "1"]) == 0
    text = capsys.readouterr().out
    assert "Epoch 1: Loss: " in text
    assert "EMA IoU: " in text
    assert "\x1b" not in text, "plain text where there is no terminal"

    # Going on, and starting again: both find the generated images, neither loses a checkpoint.
    last = str(tmp_path / "run" / "last.pth")
    assert cli.main([*run, "--epochs", "2", "--resume-from", last]) == 0
    assert "Epoch 2: Loss: " in capsys.readouterr().out
    assert cli.main([*run, "--epochs", "1"]) == 0
    assert f"are in {tmp_path / 'run' / 'previous'} now" in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "run" / "previous" / "best_ema.pth").exists()
    assert "has done its 1 epochs" in error_of(capsys, *run, "--epochs", "1", "--resume-from", last)


@needs_train
def test_an_interrupted_training_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastema.segmentation.train.trainer import Trainer

    small_synthetic_set(monkeypatch)
    run = ["train", "--dataset-path", "synthetic", "--checkpoint-dir", str(tmp_path / "run"), *TINY, "--epochs", "2"]
    train_epoch = Trainer._train_epoch

    def interrupted_in_the_second(self: Trainer, epoch: int) -> float:
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(self, epoch)

    monkeypatch.setattr(Trainer, "_train_epoch", interrupted_in_the_second)
    assert cli.main(run) == 130
    last = tmp_path / "run" / "last.pth"
    assert capsys.readouterr().err == f"fastema: interrupted: go on with --resume-from {last}\n"
    monkeypatch.undo()
    small_synthetic_set(monkeypatch)
    assert cli.main([*run, "--resume-from", str(last)]) == 0


@needs_train
def test_a_damaged_checkpoint_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_synthetic_set(monkeypatch)
    (tmp_path / "bad.pth").write_bytes(b"PK\x03\x04 and then the disk was full")
    run = ["train", "--dataset-path", "synthetic", "--checkpoint-dir", str(tmp_path / "run"), *TINY]
    message = error_of(capsys, *run, "--resume-from", str(tmp_path / "bad.pth"))
    assert "bad.pth is not a checkpoint, or is cut short" in message
    assert message.count("\n") == 1


def small_synthetic_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastema.segmentation.data import synthetic

    original = synthetic.ensure_dataset
    monkeypatch.setattr(synthetic, "ensure_dataset", lambda parent, seed: original(parent, seed, count=10, size=64))


@needs_train
@pytest.mark.skipif(not NUCLEI.is_dir(), reason="../shared/data/nuclei-dsb2018 is not here")
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_in_a_real_training_leaves_cleanly(tmp_path: Path) -> None:
    arguments = ["train", "--dataset-path", str(NUCLEI), "--checkpoint-dir", str(tmp_path / "run"), *TINY]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fastema", *arguments, "--epochs", "50", "--num-workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Model:"):
            break
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.count("fastema: interrupted\n") == 1, errors
    # Nothing of ours is left to be printed. Python's own thread that hands tensors from worker to trainer may complain
    # that the other end is gone; whether it gets to it before the process ends is a race.
    assert "KeyboardInterrupt" not in errors, errors
    assert "fastema/cli" not in errors and "fastema/segmentation" not in errors, errors


def test_the_flags_and_the_options_have_the_same_names() -> None:
    required = {field.name for field in fields(TrainOptions) if field.default is MISSING}
    assert required == {"dataset_path", "checkpoint_dir"}
    parsed = cli._parser().parse_args(["train", "--dataset-path", "x", "--checkpoint-dir", "y"])
    for field in fields(TrainOptions):
        if field.name not in required:
            assert getattr(parsed, field.name) == field.default, field.name

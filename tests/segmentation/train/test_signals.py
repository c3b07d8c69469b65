"""Signals in blocks, and to trainings in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import pytest

from fastema.checkpoint import load_checkpoint
from fastema.errors import Terminated
from fastema.segmentation.train.signals import defer_signals, sigterm_raises
from fastema.segmentation.train_extra import missing_packages
from segmentation.commands import Command

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
needs_train = pytest.mark.skipif(bool(missing_packages()), reason="the train extra is not installed")


def test_termination_is_an_exception_and_only_within_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_waits_for_the_end_of_an_uninterrupted_block(number: int, raised: type[BaseException]) -> None:
    done = []
    with pytest.raises(raised), sigterm_raises():
        with defer_signals():
            signal.raise_signal(number)
            signal.raise_signal(number)  # a second time
            done.append("written")
        done.append("not reached")
    assert done == ["written"]


def test_an_error_in_an_uninterrupted_block_comes_out_and_handlers_are_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match="disk"), defer_signals():
        raise OSError("disk")
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_have_no_signals_to_wait_for() -> None:
    passed = []

    def run() -> None:
        with sigterm_raises(), defer_signals():
            passed.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert passed == [True]


def start(folder: Path, *more: str) -> Command:
    """Start a training that does not end by itself."""
    tiny = "--backbone mobilenetv3_small_050 --no-pretrained --img-size 64 --device cpu --num-experts 0 --use-ema"
    arguments = ["train", "--dataset-path", "synthetic", "--checkpoint-dir", str(folder), *tiny.split()]
    return Command(folder.parent / "output", [*arguments, "--epochs", "999", *more])


@needs_train
def test_a_terminated_training_says_how_to_go_on(tmp_path: Path) -> None:
    command = start(tmp_path / "run", "--num-workers", "1")
    command.wait_for("Epoch 2:")
    assert command.process.pid is not None
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.end() == 143, command.errors
    last = tmp_path / "run" / "last.pth"
    assert f"fastema: terminated: go on with --resume-from {last}\n" in command.errors
    assert "Traceback" not in command.errors
    assert load_checkpoint(last)["epoch"] >= 1


@needs_train
def test_a_killed_training_loses_no_file_and_at_most_an_epoch(tmp_path: Path) -> None:
    command = start(tmp_path / "run")
    command.wait_for("Epoch 3:")
    command.signal_group(signal.SIGKILL)
    command.end()
    said = [*map(int, re.findall(r"^Epoch (\d+):", command.output, re.MULTILINE))]
    epoch = load_checkpoint(tmp_path / "run" / "last.pth")["epoch"]
    assert said[-1] - 1 <= epoch <= said[-1]
    for name in ("best_model.pth", "best_ema.pth"):
        assert load_checkpoint(tmp_path / "run" / name)["net"]
    rows = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert len(rows) - 1 in (epoch, epoch - 1)

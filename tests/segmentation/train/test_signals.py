"""Signals, in blocks and to whole trainings in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastema.checkpoint import load_checkpoint
from fastema.segmentation.errors import Terminated
from fastema.segmentation.train.signals import defer_signals, sigterm_raises
from fastema.segmentation.train_extra import missing_packages

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
needs_train = pytest.mark.skipif(bool(missing_packages()), reason="the train extra is not installed")

# The generated set, small enough for a test.
TRAIN = """
import sys
from fastema.segmentation.data import synthetic
full = synthetic.ensure_dataset
synthetic.ensure_dataset = lambda parent, seed: full(parent, seed, count=12, size=64)
from fastema import cli
sys.exit(cli.main(sys.argv[1:]))
"""


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
            signal.raise_signal(number)  # somebody who is impatient
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


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A training that would not end by itself."""
    tiny = "--backbone mobilenetv3_small_050 --no-pretrained --img-size 64 --device cpu --num-experts 0 --use-ema"
    arguments = ["train", "--dataset-path", "synthetic", "--checkpoint-dir", str(folder), *tiny.split()]
    return subprocess.Popen(
        [sys.executable, "-u", "-c", TRAIN, *arguments, "--epochs", "999", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"no line {beginning!r}; stderr: {process.communicate()[1]}")


@needs_train
def test_a_terminated_training_says_how_to_go_on(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--num-workers", "1")
    wait_for(process, "Epoch 2:")
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    last = tmp_path / "run" / "last.pth"
    assert f"fastema: terminated: go on with --resume-from {last}\n" in errors
    assert "Traceback" not in errors
    assert load_checkpoint(last)["epoch"] >= 1


@needs_train
def test_a_killed_training_loses_no_file_and_at_most_an_epoch(tmp_path: Path) -> None:
    process = start(tmp_path / "run")
    wait_for(process, "Epoch 3:")
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    said = [3, *map(int, re.findall(r"^Epoch (\d+):", output, re.MULTILINE))]
    epoch = load_checkpoint(tmp_path / "run" / "last.pth")["epoch"]
    assert said[-1] - 1 <= epoch <= said[-1]
    for name in ("best_model.pth", "best_ema.pth"):
        assert load_checkpoint(tmp_path / "run" / name)["net"]
    rows = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert len(rows) - 1 in (epoch, epoch - 1)

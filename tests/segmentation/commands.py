"""The `fastema` command in processes of its own, forked from one that has imported the trainer, which takes seconds."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT = 120.0  # seconds; a command that hangs fails its test

_context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
_context.set_forkserver_preload(["pytest", "fastema.segmentation.train.run", "torch.utils.tensorboard"])


class Command:
    """A running command; its output goes to files in `folder`.

    Args:
        folder: made for this command alone.
        arguments: of the command.
        environment: added to this process's.
        generated: training images of the data set that is called `synthetic`, 64 px each.
    """

    def __init__(
        self, folder: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None, generated: int = 12
    ) -> None:
        folder.mkdir()
        self._folder = folder
        given = (list(arguments), dict(environment or {}), str(folder), generated)
        self.process = _context.Process(target=_run, args=given)
        self.process.start()

    def wait_for(self, beginning: str) -> None:
        """Wait for a line of output with this beginning."""
        end = time.monotonic() + TIMEOUT
        while not any(line.startswith(beginning) for line in self.output.splitlines()):
            assert self.process.is_alive() and time.monotonic() < end, f"no line {beginning!r}; stderr: {self.errors}"
            time.sleep(0.02)

    def signal_group(self, number: int) -> None:
        """Send a signal to the command and to the processes that it has started."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Wait for the end and return the exit status."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, f"it hangs; stderr: {self.errors}"
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self._text("out")

    @property
    def errors(self) -> str:
        return self._text("err")

    def _text(self, name: str) -> str:
        file = self._folder / name
        return file.read_text() if file.exists() else ""


def _run(arguments: list[str], environment: dict[str, str], folder: str, generated: int) -> None:
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the platform's own
    os.setsid()
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from fastema import cli
    from fastema.segmentation.data import synthetic

    torch.set_num_threads(1)
    ensure_dataset = synthetic.ensure_dataset
    synthetic.ensure_dataset = lambda parent, seed: ensure_dataset(parent, seed, count=generated, size=64)
    try:
        sys.exit(cli.main(arguments))
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
